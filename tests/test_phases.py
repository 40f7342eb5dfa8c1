"""Predicted bytes of a training step next to XLA's own account of the compiled one; nothing is run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, init_params
from models.llama.presets import PRESETS
from models.llama.quantize import quantize_params
from tests import compiling
from trainers.distill_trainer import SoftTrainer
from trainers.planning.compile import Compiler
from trainers.planning.estimate import estimate_job, teacher_bytes
from trainers.planning.job import Job
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.sharding import MESH_AXES, make_mesh

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
    prompt_len: int = 0  # of GRPO's prompts, each with all its completions
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
        return SFTConfig(**dict(micro_batch_size=None) | self.train)

    @property
    def job(self):
        kind = "grpo" if self.prompt_len else "lora" if self.rank else "sft"
        shape = dict(batch=self.rows, seq=self.seq_len, prompt_len=self.prompt_len or 1)
        config = dataclasses.asdict(self.sft)
        names = ("micro_batch_size", "param_dtype", "state_dtype", "optimizer")
        bits = {name: config[name] for name in names}
        bits |= dict(remat=self.remat, dtype=self.dtype, lora_rank=self.rank)
        return Job(model=self.config, kind=kind, **shape, **bits)

    def predicted(self):
        [step] = (p for p in estimate_job(self.job, None) if p.name == "train step")
        return step

    def shapes(self):
        """(trainer, shapes of train_step's arguments)."""
        model = LLaMa(self.config, dtype=jnp.dtype(self.dtype), remat=self.remat)
        trainer = SFTTrainer(model=model, config=self.sft, lora=self.lora)
        dtype = self.dtype if self.lora else self.sft.param_dtype
        init = lambda key: init_params(self.config, key, dtype=dtype)
        params = jax.eval_shape(init, jax.random.key(0))
        state, frozen = jax.eval_shape(trainer.init, params, jax.random.key(0))
        array = lambda dtype: jax.ShapeDtypeStruct((self.rows, self.seq_len), dtype)
        batch = {"tokens": array(jnp.int32), "target_mask": array(jnp.bool_)}
        if self.packed:
            batch |= {"segment_ids": array(jnp.int32), "positions": array(jnp.int32)}
        return trainer, state, frozen, batch

    def grpo_shapes(self):
        mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
        with jax.set_mesh(mesh):
            real = Compiler(self.job, mesh, True, lambda what: None)
            return real.trainer, real.state, real.frozen, real.batch()

    def compiled_peak(self):
        return compiled_peak(*(self.grpo_shapes() if self.prompt_len else self.shapes()))


def compiled_peak(trainer, *arguments):
    lowered = type(trainer).train_step.lower(trainer, *arguments)
    xla = lowered.compile(compiling.in_haste()).memory_analysis()
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
    Case(remat="none", dtype="bfloat16"),
    Case(rows=8, seq_len=512, dtype="bfloat16"),
    Case(rows=8, seq_len=512, remat="none"),
    Case(rows=8, seq_len=512, remat="dots", dtype="bfloat16"),
    Case(rows=1, seq_len=1024, packed=True),
    Case(rows=8, remat="dots", train=dict(micro_batch_size=2)),
    Case(vocab_times=4),
    Case(rank=16, rows=2, dtype="bfloat16"),
    Case(rank=16, remat="none"),
    Case(rows=8, seq_len=512, rank=16, remat="dots"),
    *(Case(train=dict(optimizer=name)) for name in ("lion", "adafactor", "muon")),
    Case(name="llama-3.2-1b", rows=2, seq_len=512, remat="dots", dtype="bfloat16", train=BF16),
    Case(name="tinyllama-1.1b", rows=2, seq_len=512, remat="dots"),
    Case(name="qwen3-0.6b", rows=4, seq_len=512, remat="none", model=dict(n_layers=8)),
    Case(rows=16, seq_len=512, prompt_len=128),
    Case(rows=16, seq_len=512, prompt_len=384, remat="none"),
    Case(rows=16, seq_len=512, prompt_len=128, rank=16, remat="dots"),
    Case(rows=16, seq_len=512, prompt_len=128, remat="dots", train=dict(micro_batch_size=2)),
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_predicted_peak_is_that_of_the_compiled_step(case):
    assert case.predicted().peak_bytes == pytest.approx(case.compiled_peak(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_predicted_peak_is_that_of_the_compiled_step_at_other_sizes(case):
    assert case.predicted().peak_bytes == pytest.approx(case.compiled_peak(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_teacher_adds_what_is_announced(quantize):
    """Its parameters, and the logits of a chunk."""
    case = Case(model=dict(n_layers=4), rank=4)
    trainer, state, frozen, batch = case.shapes()
    alone = compiled_peak(trainer, state, frozen, batch)
    teacher = dataclasses.replace(case.config, n_layers=8)
    taught = SoftTrainer(trainer.model, trainer.config, case.lora, None, LLaMa(teacher))
    params = jax.eval_shape(lambda: init_params(teacher, jax.random.key(0), dtype="float32"))
    if quantize is not None:
        params = jax.eval_shape(quantize_params, params)
    added = compiled_peak(taught, state, {**frozen, "teacher": params}, batch) - alone
    found = teacher_bytes(taught, quantize)
    assert found["teacher"] == shape_bytes(params)
    assert sum(found.values()) == pytest.approx(added, rel=0.1)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_moments_are_exact(optimizer, rank, tied):
    case = Case(rank=rank, train=dict(optimizer=optimizer), model=dict(tie_embeddings=tied))
    _, state, frozen, _ = case.shapes()
    parts = case.predicted().parts
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
    assert less.predicted().peak_bytes < more.predicted().peak_bytes
