"""Writes conversations in which a calculator is used, for a first taste of the format.

    python examples/calculator/demonstrations.py demonstrations.jsonl

The default model's chat template has no place for tools, so they stand in the messages' texts, as
`train.py grpo --env calculator` writes them there.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from anywhere

from models.llama.chat.tools import function_schema, run_call, with_tools
from trainers.environments.games import Calculator, calculate

SIZE, SEED = 200, 7


def conversation(example: dict) -> list[dict]:
    """A question, a call, its result and an answer."""
    expression = example["question"].removeprefix("What is ").removesuffix("?")
    function = {"name": "calculate", "arguments": {"expression": expression}}
    call = {"id": "123456789", "type": "function", "function": function}
    return [
        {"role": "user", "content": example["question"]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        run_call(call, {"calculate": calculate}),
        {"role": "assistant", "content": f"The answer is {example['answer']}."},
    ]


def main(path: str) -> None:
    """Writes a file of SIZE conversations."""
    tools = [function_schema(calculate)]
    with open(path, "w") as file:
        for example in Calculator(digits=3, terms=2).examples(SIZE, SEED):
            messages = with_tools(conversation(example), tools)
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
