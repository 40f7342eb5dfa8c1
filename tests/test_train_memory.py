"""Predicted bytes of a training step next to XLA's own account of the compiled one; nothing is run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, init_params
from models.llama.presets import PRESETS
from trainers.planning import train_memory
from trainers.planning.train_memory import check_training_fits, peak_bytes, training_bytes
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.errors import ConfigError

SMOL = "smollm2-135m"
BF16 = dict(param_dtype="bfloat16", state_dtype="bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    name: str = SMOL
    rows: int = 4
    seq_len: int = 256
    vocab_times: int = 1
    remat: str = "block"
    dtype: str = "float32"
    rank: int = 0
    frozen_dtype: str | None = None
    packed: bool = False
    train: dict = dataclasses.field(default_factory=dict)
    model: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        values = [f"{f.name}={v}" for f in dataclasses.fields(self) if (v := getattr(self, f.name))]
        return ",".join(values)

    @property
    def config(self):
        config = PRESETS[self.name]
        vocab_size = config.vocab_size * self.vocab_times
        return dataclasses.replace(config, vocab_size=vocab_size, **self.model)

    @property
    def lora(self):
        return LoRAConfig(rank=self.rank) if self.rank else None

    @property
    def sft(self):
        return SFTConfig(**self.train)

    def predicted(self):
        kind = dict(dtype=self.dtype, remat=self.remat, lora=self.lora)
        kind |= dict(frozen_dtype=self.frozen_dtype)
        return training_bytes(self.config, self.sft, rows=self.rows, seq_len=self.seq_len, **kind)

    def shapes(self):
        """(trainer, shapes of train_step's arguments)."""
        model = LLaMa(self.config, dtype=jnp.dtype(self.dtype), remat=self.remat)
        trainer = SFTTrainer(model=model, config=self.sft, lora=self.lora)
        init = lambda key: init_params(
            self.config, key, dtype=self.frozen_dtype or self.sft.param_dtype
        )
        params = jax.eval_shape(init, jax.random.key(0))
        state, frozen = jax.eval_shape(trainer.init, params, jax.random.key(0))
        array = lambda dtype: jax.ShapeDtypeStruct((self.rows, self.seq_len), dtype)
        batch = {"tokens": array(jnp.int32), "target_mask": array(jnp.bool_)}
        if self.packed:
            batch |= {"segment_ids": array(jnp.int32), "positions": array(jnp.int32)}
        return trainer, state, frozen, batch

    def compiled_peak(self):
        trainer, *arguments = self.shapes()
        # No pass of LLVM changes a buffer.
        options = {"xla_backend_optimization_level": 0}
        lowered = SFTTrainer.train_step.lower(trainer, *arguments)
        xla = lowered.compile(compiler_options=options).memory_analysis()
        kept = xla.argument_size_in_bytes + xla.output_size_in_bytes - xla.alias_size_in_bytes
        return kept + xla.temp_size_in_bytes


def shape_bytes(tree):
    """Bytes of a tree of shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


FAST = [
    Case(remat="dots"),
    Case(rows=2, train=dict(micro_batch_size=1), model=dict(tie_embeddings=False)),
]
SLOW = [
    Case(),
    Case(remat="none"),
    Case(dtype="bfloat16"),
    Case(remat="none", dtype="bfloat16"),
    Case(rows=8, seq_len=512),
    Case(rows=8, seq_len=512, remat="none"),
    Case(rows=8, seq_len=512, remat="dots", dtype="bfloat16"),
    Case(rows=1, seq_len=1024, remat="none"),
    Case(rows=1, seq_len=1024, packed=True),
    Case(rows=8, remat="dots", train=dict(micro_batch_size=2)),
    Case(vocab_times=4),
    Case(rank=16, rows=2, dtype="bfloat16"),
    Case(rank=16, rows=2, dtype="bfloat16", frozen_dtype="bfloat16"),
    Case(rank=16, remat="none"),
    Case(rows=8, seq_len=512, rank=16, remat="dots"),
    *(Case(train=dict(optimizer=name)) for name in ("lion", "adafactor", "muon")),
    Case(name="llama-3.2-1b", rows=2, seq_len=512),
    Case(name="llama-3.2-1b", rows=2, seq_len=512, remat="dots", dtype="bfloat16", train=BF16),
    Case(name="tinyllama-1.1b", rows=2, seq_len=512, remat="dots"),
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_predicted_peak_is_that_of_the_compiled_step(case):
    assert peak_bytes(case.predicted()) == pytest.approx(case.compiled_peak(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_predicted_peak_is_that_of_the_compiled_step_at_other_sizes(case):
    assert peak_bytes(case.predicted()) == pytest.approx(case.compiled_peak(), rel=0.1)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_moments_are_exact(optimizer, rank, tied):
    case = Case(rank=rank, train=dict(optimizer=optimizer), model=dict(tie_embeddings=tied))
    _, state, frozen, _ = case.shapes()
    parts = case.predicted()
    assert parts["parameters"] == shape_bytes(state.params)
    assert parts.get("frozen parameters", 0) == shape_bytes(frozen)
    # Counters and placeholders are left out.
    assert parts["optimizer"] == pytest.approx(shape_bytes(state.opt_state), rel=2e-3)


@pytest.mark.parametrize(
    "less",
    [
        Case(rows=2, remat="dots"),
        Case(seq_len=128, remat="dots"),
        Case(remat="block", rows=8),
        Case(remat="dots", train=dict(optimizer="lion")),
        Case(remat="dots", rank=8),
    ],
    ids=str,
)
def test_what_the_message_recommends_needs_less(less):
    more = Case(remat="dots", rows=max(less.rows, 4))
    assert peak_bytes(less.predicted()) < peak_bytes(more.predicted())


def test_a_step_that_does_not_fit_is_refused_with_every_part(monkeypatch):
    parts = Case(remat="none").predicted()
    total = peak_bytes(parts)
    monkeypatch.setattr(train_memory, "available_bytes", lambda: total)
    check_training_fits(parts)
    monkeypatch.setattr(train_memory, "available_bytes", lambda: None)
    check_training_fits(parts)
    monkeypatch.setattr(train_memory, "available_bytes", lambda: total - 1)
    with pytest.raises(ConfigError, match="out of memory: a step needs 4.5 GB") as caught:
        check_training_fits(parts)
    message = str(caught.value)
    for word in (*parts, "micro_batch_size", "seq_len", "remat=block", "LoRA"):
        assert word in message
    assert "\n" not in message
