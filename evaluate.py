"""Measures a model from the command line: `python evaluate.py ppl --data …`."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json as jsonlib
import math
from collections.abc import Iterator

import console
from models.llama.hub import DEFAULT_MODEL, resolve
from models.llama.load import load_checkpoint, load_config
from models.llama.model import LLaMa
from models.llama.tokenizer import check_against_model, load_tokenizer
from trainers.data import DataConfig, Dataset, load_dataset
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Batch


def ppl(
    data: str,
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    seq_len: int | None = None,
    batch_size: int = 4,
    packing: bool = False,
    mask: str = "auto",
    overlong: str = "truncate",
    chat_format: str | None = None,
    skip_bad: int = 0,
    dtype: str = "auto",
    json: bool = False,
    debug: bool = False,
) -> None:
    """Perplexity of a data set: exp of the mean loss over all its targets.

    Args:
        data: a .jsonl or .jsonl.gz file, or a data set on the hub, of {"messages": […]},
            {"prompt": …, "completion": …} or {"text": …}.
        ckpt_dir: a checkpoint folder, a .gguf file, a Hugging Face id, or the default model's name.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        seq_len: tokens of the longest row; default: 512, or the model's context if that is less.
        batch_size: rows at once.
        packing: several examples share a row: the same numbers, sooner.
        mask: what is predicted: auto, assistant, last, completion or all.
        overlong: what happens to longer examples: truncate, drop or split.
        chat_format: llama2, llama3 or the name of one of the checkpoint's templates.
        skip_bad: so many broken rows are left out.
        dtype: float32, bfloat16, or auto: float32 on a CPU, bfloat16 elsewhere.
        json: one JSON object, with the counts of what became of the rows.
        debug: show the traceback of an error.
    """
    console.Interrupts().set(raises=False, leave_at=1)
    console.keep_compilations()
    config = DataConfig(
        seq_len=512 if seq_len is None else seq_len,
        batch_size=batch_size,
        packing=packing,
        mask=mask,
        overlong=overlong,
        shuffle=False,
        chat_format=chat_format,
    )
    dtype = console.compute_dtype(dtype)
    with console.progress() as report:
        path = resolve(ckpt_dir, report)
        tokenizer = load_tokenizer(tokenizer_path or path)
        context = load_config(path).max_seq_len
        if seq_len is None:
            config = dataclasses.replace(config, seq_len=min(config.seq_len, context))
        dataset = load_dataset(data, tokenizer, config, skip_bad=skip_bad)
        dataset.check_context(context)
        model_config, params = load_checkpoint(path, dtype=dtype, progress=report)
        check_against_model(tokenizer, model_config.vocab_size)
        trainer = SFTTrainer(LLaMa(model_config), SFTConfig())
        means = trainer.derive(trainer.evaluate(params, {}, _reported(dataset, report)))
    means["targets"] = int(means.pop("weight"))
    if json:
        console.write(jsonlib.dumps(means | {"counts": dataset.counts}) + "\n")
        return
    console.write(
        f"perplexity {means['perplexity']:.4f}, loss {means['loss']:.4f} nats, "
        f"accuracy {means['accuracy']:.1%}, over {means['targets']:,} tokens of "
        f"{dataset.counts['examples']:,} examples\n"
    )


def _reported(dataset: Dataset, report) -> Iterator[Batch]:
    total = math.ceil(len(dataset) / dataset.config.batch_size)
    for done, batch in enumerate(dataset.epoch_batches()):
        report("batches", done, total)
        yield batch


if __name__ == "__main__":
    console.run_one_of({"ppl": ppl})
