"""A planned job, and the programs that each device runs for it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.llama.config import ModelConfig
from models.llama.presets import PRESETS
from models.llama.formats import hf
from models.llama.checkpoint import open_checkpoint
from models.llama.lora import TARGETS
from models.llama.model import REMATS
from trainers.optimizer import DTYPES, OPTIMIZERS
from trainers.planning.hlo import Cost, KernelCost, analyse
from utils.errors import ConfigError, is_int
from utils.fields import Config, field, integer, one_of
from utils.files import parse_json

KINDS = ("sft", "lora", "grpo", "generate")


def rows_at_once(micro_batch_size: Any, group_size: Any) -> tuple[Any, int | None]:
    """Completions at once as (rows at once, completions per row, see RolloutConfig.branches)."""
    both = is_int(micro_batch_size) and is_int(group_size)
    if not both or micro_batch_size < 1 or group_size < 1:
        return micro_batch_size, None  # the configs complain
    divisors = (n for n in range(min(micro_batch_size, group_size), 0, -1) if group_size % n == 0)
    branches = next(divisors)
    return max(micro_batch_size // branches, 1), branches


def model_config(name: str) -> ModelConfig:
    """The config of a preset, a config.json or a checkpoint. Raises ConfigError that names the presets."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.is_file() and path.suffix == ".json":
        return hf.to_config(parse_json(path.read_bytes(), str(path), ConfigError))
    if path.exists():
        return open_checkpoint(path).config
    known = ", ".join(PRESETS)
    raise ConfigError(
        f"--model {name!r:.60}, expected a checkpoint, its config.json or one of {known}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Config):
    """Settings of a planned job: a step of training, of GRPO or of generation.

    `lora` is `sft` with adapters; lora_rank makes `grpo` train adapters too.
    """

    model: ModelConfig = field(
        help=f"checkpoint or its config.json (no weights needed), or one of {', '.join(PRESETS)}",
        parse=model_config,
    )
    kind: str = field("sft", "job to plan", one_of(*KINDS), flag="job")
    batch: int | None = field(
        None, "rows per step, for grpo completions; default: one per device", integer(1)
    )
    seq: int = field(2048, "tokens per row, prompt and completion together", integer(2))
    prompt_len: int | None = field(
        None, "tokens per prompt, for grpo and generate; default: a quarter of seq", integer(1)
    )
    group_size: int = field(8, "completions per prompt, for grpo", integer(1))
    micro_batch_size: int | None = field(
        None,
        "rows, for grpo completions, in memory at once (at least one per device); default: all",
        integer(1),
    )
    lora_rank: int | None = field(
        None, "rank of adapters, 0 for none; default: 16 for lora, else 0", integer(0)
    )
    lora_targets: tuple[str, ...] = field(TARGETS, "matrices that have adapters", flag="")
    remat: str = field("dots", "what the backward pass computes again", one_of(*REMATS))
    dtype: str = field("bfloat16", "dtype of activations", one_of(*DTYPES))
    quantize: str | None = field(
        None, "int8: a frozen base, or a model that generates, in eight bits", one_of("int8")
    )
    param_dtype: str = field("float32", "dtype of trained parameters", one_of(*DTYPES))
    state_dtype: str = field("float32", "dtype of the optimizer's first moments", one_of(*DTYPES))
    optimizer: str = field("adamw", "optimizer", one_of(*OPTIMIZERS))

    def __post_init__(self):
        if self.lora_rank is None:
            object.__setattr__(self, "lora_rank", 16 if self.kind == "lora" else 0)
        super().__post_init__()
        if self.prompt_len is None:
            object.__setattr__(self, "prompt_len", max(self.seq // 4, 1))

    def problems(self) -> list[str]:
        """Problems with the values, one text each."""
        bad = super().problems()
        if bad:
            return bad
        if self.seq > self.model.max_seq_len:
            bad.append(f"seq={self.seq} exceeds the model's context of {self.model.max_seq_len}")
        if self.samples and (self.prompt_len or 0) >= self.seq:
            bad.append(
                f"prompt_len={self.prompt_len} leaves no room for a completion in seq={self.seq}"
            )
        if self.kind == "grpo" and (self.batch or 0) % self.group_size:
            bad.append(f"batch={self.batch} is not a multiple of group_size={self.group_size}")
        if self.quantize and self.trains and not self.lora_rank:
            bad.append("parameters in eight bits cannot be trained; pass --lora_rank")
        if self.kind == "lora" and not self.lora_rank:
            bad.append("lora_rank=0 for a lora job, expected an integer from 1")
        return bad

    @property
    def trains(self) -> bool:
        """Whether it has a training step."""
        return self.kind != "generate"

    @property
    def samples(self) -> bool:
        """Whether it generates."""
        return self.kind in ("grpo", "generate")

    @property
    def samples_a_prompt(self) -> int:
        """Completions that share a prefill."""
        return self.group_size if self.kind == "grpo" else 1

    @property
    def branches(self) -> int:
        """Completions per row of a training step. A prompt is computed once per row, so a micro-batch of
        less than a group computes it again.
        """
        return (
            rows_at_once(self.micro_batch_size, self.samples_a_prompt)[1] or self.samples_a_prompt
        )

    @property
    def rows_at_once(self) -> int | None:
        """Rows of a micro-batch; None: all."""
        return rows_at_once(self.micro_batch_size, self.samples_a_prompt)[0]

    @property
    def length(self) -> int:
        """Tokens of a row, or of a completion, that are trained on or generated."""
        return self.seq - self.prompt_len if self.samples else self.seq

    @property
    def tokens(self) -> int:
        """Tokens per step that are trained on or generated."""
        return self.batch * self.length

    def check_shared(self, mesh: Mapping[str, int]) -> None:
        """Raises ConfigError if a mesh of these sizes cannot share a training step's rows, as train.py does."""
        parts, rows = mesh["data"] * mesh["fsdp"], self.batch // self.branches
        if self.trains and rows % parts:
            of = f" of {self.branches} completions" * (self.kind == "grpo")
            raise ConfigError(
                f"batch={self.batch} is {rows} rows{of}, which data={mesh['data']} x "
                f"fsdp={mesh['fsdp']} devices cannot share; use a multiple of {parts * self.branches}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program of a job, on one device.

    Attributes:
        name: train step, prefill or decode step.
        runs: calls per step of the job.
        parts: bytes by what they are for; they add up to `peak_bytes`.
        argument_bytes, temp_bytes: what it is given, and what it holds for itself. What else is in
            memory at the same time is in `parts` alone.
        cost: of one run.
        compile_seconds: tracing included; None: it was not compiled, and all numbers are estimates.
        hurried: compiled without the passes that keep arrays on the chip: a run moves fewer bytes.
        reserved_bytes: for temporaries where there is room, XLA's `temp_size_in_bytes`, which others
            report; None: it was not compiled.
    """

    name: str
    runs: int
    parts: dict[str, int]
    argument_bytes: int
    temp_bytes: int
    cost: Cost
    compile_seconds: float | None = None
    hurried: bool = False
    reserved_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Bytes in memory while it runs."""
        return sum(self.parts.values())

    def compiled(
        self,
        program: Any,
        held: Mapping[str, int],
        kernel: KernelCost,
        rounds: Callable[[str], float],
        **how: Any,
    ) -> "Program":
        """This estimate with what XLA says of the compiled program.

        Args:
            program: a jax.stages.Compiled.
            held: bytes in memory before it allocates, by what they are for.
            kernel, rounds: see `hlo.analyse`.
            how: compile_seconds and hurried.
        """
        memory = program.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        # XLA refuses a program that has less than what lives at once. `temp_size_in_bytes` adds holes
        # between arrays, some more than once, and XLA compiles within less than that.
        temp = max(memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results, 0)
        return dataclasses.replace(
            self,
            parts=without_zeros({**held, "results": results, "temporaries": temp}),
            argument_bytes=memory.argument_size_in_bytes,
            temp_bytes=temp,
            reserved_bytes=memory.temp_size_in_bytes,
            cost=analyse(program.as_text(), kernel, rounds),
            **how,
        )

    def refused(
        self, needed: int, held: Mapping[str, int], given: int, compile_seconds: float
    ) -> "Program":
        """This estimate for a program that XLA refused because it needs too many bytes.

        Args:
            needed: bytes that XLA counted.
            held: see `compiled`.
            given: the bytes of its arguments.
            compile_seconds: until the refusal.
        """
        temp = max(needed - given, 0)
        return dataclasses.replace(
            self,
            parts=without_zeros({**held, "temporaries": temp}),
            argument_bytes=given,
            temp_bytes=temp,
            compile_seconds=compile_seconds,
        )


def without_zeros(parts: Mapping[str, float]) -> dict[str, int]:
    """Bytes by what they are for, without the parts that take none."""
    return {part: int(n) for part, n in parts.items() if n > 0}
