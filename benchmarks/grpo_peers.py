"""GRPO as a user of TRL writes it; measured by benchmarks/grpo.py."""

import queue
import tempfile
import threading
import time
import warnings

import datasets
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from benchmarks.grpo_reward import distinct_ids
from benchmarks.workers import serve


class TRL(TrainerCallback):
    """trl.GRPOTrainer with transformers' `generate`, held between its steps.

    In bfloat16 the parameters, gradients and AdamW's moments are bfloat16 too, its fastest way.
    Gradients are not checkpointed, which needs more memory and less time.

    Args:
        folder: a Hugging Face checkpoint with a tokenizer.
        prompts: their ids; all of them make a step.
        group_size: completions of each.
        length: tokens of each.
        dtype: of everything.
        at_once: completions of which gradients are computed at once.
    """

    def __init__(
        self,
        folder: str,
        prompts: list[list[int]],
        group_size: int,
        length: int,
        dtype: str,
        at_once: int,
    ):
        logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # of what TRL itself calls
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer.decode(ids) for ids in prompts]
        if tokenizer(text=texts)["input_ids"] != prompts:
            raise ValueError(f"{texts} have other tokens in transformers than {prompts}")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._scratch = tempfile.TemporaryDirectory()
        config = trl.GRPOConfig(
            output_dir=self._scratch.name,
            use_cpu=True,
            bf16=False,  # that is autocast of float32 weights, which casts all of them every time
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_steps=1_000_000,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=len(prompts) * group_size // at_once,
            num_generations=group_size,
            max_completion_length=length,
            # The only id that ends a completion is not sampled before.
            generation_kwargs={"min_new_tokens": length},
            beta=0.0,
            loss_type="dapo",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        self._trainer = trl.GRPOTrainer(
            model,
            self._reward,
            config,
            datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[self],
        )
        self._go, self._done = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._train, daemon=True).start()

    def step(self) -> dict:
        """Of one rollout and one optimizer step: "seconds", those by "phases", and "lengths"."""
        self._go.put(None)
        if (done := self._done.get()) is None:
            raise RuntimeError("TRL's training has ended, see its messages above")
        (begin, asked, answered, end), lengths = done
        phases = {"rollout": asked - begin, "reward": answered - asked, "update": end - answered}
        return {"seconds": end - begin, "phases": phases, "lengths": lengths}

    def _train(self) -> None:
        try:
            self._trainer.train()
        finally:
            self._done.put(None)  # only an error ends it: `step` must not wait for ever

    def _reward(self, completion_ids: list[list[int]], **_) -> list[float]:
        self._times.append(time.perf_counter())
        lengths = [len(ids) for ids in completion_ids]
        self._lengths = [sum(lengths) / len(lengths), max(lengths)]
        rewards = distinct_ids(completion_ids)
        self._times.append(time.perf_counter())
        return rewards

    def on_step_begin(self, *_, **__) -> None:
        """Waits until a step is asked for."""
        self._go.get()
        self._times = [time.perf_counter()]

    def on_step_end(self, *_, **__) -> None:
        """Hands out the step's times."""
        self._done.put(([*self._times, time.perf_counter()], self._lengths))


if __name__ == "__main__":
    serve(TRL)
