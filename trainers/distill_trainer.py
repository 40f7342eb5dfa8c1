"""Distillation: a student learns the distributions of a teacher, on its own samples or on given rows.

The logits of all tokens never exist at once: both heads are multiplied with a chunk of tokens, whose
gradients are computed while its logits are there, as in `utils.cross_entropy`, whose chunks and meshes
these are. Dimension key: T tokens (one axis, or rows and their tokens), C tokens of a chunk, D the
student's model dim, E the teacher's, V vocab.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.checkpoint import Checkpoint, open_checkpoint
from models.llama.model import LLaMa, Params, head_matrix
from models.llama.stream import Progress
from models.llama.tokenizer import Tokenizer, load_tokenizer
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer, importance_ratio
from trainers.rollout import RolloutConfig
from trainers.sft_trainer import SFTTrainer, hidden_states, next_tokens
from trainers.trainer import Batch, Loss, TrainConfig, Trainer, TrainState, Work
from utils import detours
from utils.cross_entropy import Chunks, Parts
from utils.errors import ConfigError
from utils.fields import CONFIG, Config, again, field, integer, one_of
from utils.ops import matmul

Array = jax.Array

KINDS = ("reverse", "forward")
# How arguments and results are sharded, see `cross_entropy.Parts`.
_GIVEN = ("tokens", "head", "tokens", "head", "tokens")
_RESULTS = {"kl": "all", "entropy": "all", "dx": "tokens", "dhead": "head"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherFlags(Config):
    """The teacher: a model of any size with the student's tokenizer."""

    teacher: str = field(
        help="the teacher: a checkpoint folder, a .gguf file, a Hugging Face id, or the default "
        "model's name; its tokenizer must be the model's"
    )
    teacher_quantize: str | None = field(
        None, "int8: hold the teacher's matrices in eight bits", one_of("int8")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftTeacherFlags(TeacherFlags):
    """A teacher, whose distributions are learnt in place of the rows' own tokens."""

    teacher: str | None = again(
        TeacherFlags,
        "teacher",
        None,
        help="learn this model's distribution of each target, in place of the target alone: a "
        "checkpoint with the model's tokenizer",
    )

    def problems(self) -> list[str]:
        alone = self.teacher is None and self.teacher_quantize is not None
        return super().problems() + ["teacher_quantize needs a teacher"] * alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """The numbers of on-policy distillation."""

    base_rates = GRPOConfig.base_rates
    learning_rate: float | None = again(GRPOConfig, "learning_rate", None)
    schedule: str = again(GRPOConfig, "schedule", "constant")
    micro_batch_size: int | None = again(GRPOConfig, "micro_batch_size", 8)
    eval_every: int = again(GRPOConfig, "eval_every", 0)
    divergence: str = field(
        "reverse",
        "KL(student || teacher) of each token: exact, over the vocabulary (reverse), or estimated at "
        "the sampled token",
        one_of("reverse", "sampled"),
        resume=CONFIG,
    )
    mask_truncated: bool = again(GRPOConfig, "mask_truncated", False)
    temperature: float = again(
        GRPOConfig, "temperature", 1.0, help="temperature of sampling and of both distributions"
    )
    max_completion_len: int = again(
        GRPOConfig, "max_completion_len", 512, help="tokens per completion; a longer one is cut"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig(RolloutConfig):
    """Sampling of the student's completions, of which one per prompt is enough."""

    group_size: int = again(RolloutConfig, "group_size", 4, allowed=integer(1))
    scale: str = again(RolloutConfig, "scale", "none", flag="")
    refills: int = again(RolloutConfig, "refills", 0, flag="")


class Teacher:
    """A teacher's checkpoint: opened, not yet read.

    Attributes:
        checkpoint: its files.
        settings: by which a run that resumes knows it.
    """

    def __init__(self, flags: TeacherFlags, student: Tokenizer, progress: Progress | None = None):
        """Raises ConfigError if its tokenizer is not the student's."""
        quantize = flags.teacher_quantize is not None
        self.checkpoint: Checkpoint = open_checkpoint(
            flags.teacher, quantize=quantize, progress=progress
        )
        check_tokenizers(student, load_tokenizer(self.checkpoint.path), self.checkpoint.path)
        kind = "int8" if self.checkpoint.quantize else None
        self.settings = {"teacher": self.checkpoint.digest(), "teacher_quantize": kind}

    def model(self, student: LLaMa) -> LLaMa:
        """Computes in the student's dtype; nothing is kept for a backward pass."""
        return LLaMa(self.checkpoint.config, student.dtype)

    def vocab_limit(self, student: int) -> int | None:
        """The first id that one of both models has no row for; None: both have the same rows."""
        rows = self.checkpoint.config.vocab_size
        return None if rows == student else min(rows, student)


def check_tokenizers(student: Tokenizer, teacher: Tokenizer, path: Path) -> None:
    """Raises ConfigError unless each id means the same to both, naming the first that does not."""

    def facts(of: Tokenizer) -> Iterator[tuple[str, Any]]:
        yield "number of tokens", of.vocab_size
        yield from ((f"token {i}", of.token_bytes(i)) for i in range(of.vocab_size))
        control = sorted(of.special_tokens.items(), key=operator.itemgetter(1))
        yield from (("control token", token) for token in [*control, ("none is left", None)])

    for (what, theirs), (_, ours) in zip(facts(teacher), facts(student)):
        if theirs != ours:
            raise ConfigError(
                f"the teacher {path} has another tokenizer: {what} {theirs!r:.80}, the model's "
                f"{ours!r:.80}; both must read the same ids"
            )


def divergence(
    kind: str,
    x_TD: Array,
    head_VD: Array,
    y_TE: Array,
    teacher_VE: Array,
    weights_T: Array,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Sums over tokens of the KL divergence and of the student's entropy, each times its weight.

    >>> x_TD, y_TE, head_VD = jnp.eye(2, 4), jnp.zeros((2, 3)), jnp.eye(5, 4)
    >>> kl, entropy = divergence("forward", x_TD, head_VD, y_TE, jnp.eye(5, 3), jnp.ones(2))
    >>> round(float(kl), 4), round(float(entropy), 4)
    (0.1908, 3.0004)

    With s the student's distribution, t the teacher's and z the student's logits: reverse KL is
    KL(s ‖ t) = Σ s (log s - log t), its gradient by z is s (log s - log t - KL); forward KL is
    KL(t ‖ s), its gradient s - t. Source: GKD (2306.13649) section 2, equation 1.

    Args:
        kind: one of KINDS.
        x_TD, y_TE: [T, D] and [T, E], the inputs of both heads.
        head_VD, teacher_VE: [V, D] and [V, E], cast to their inputs' dtypes.
        weights_T: [T] float32; tokens of weight 0 cost nothing.
        temperature: divides the logits of both.

    Returns:
        (KL, entropy), float32 scalars, in nats. Only KL has a gradient, by x and head.
    """
    arguments = (x_TD, head_VD, y_TE, teacher_VE, weights_T)
    return _divergence(kind, float(temperature), *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(kind, temperature, *arguments):
    found = _walk(kind, temperature, {"kl", "entropy"}, arguments)
    return found["kl"], found["entropy"]


def _forward(kind, temperature, *arguments):
    wanted = {name for name, of in zip(("dx", "dhead"), arguments) if of.perturbed}
    values = tuple(argument.value for argument in arguments)
    found = _walk(kind, temperature, {"kl", "entropy"} | wanted, values)
    return (found.pop("kl"), found.pop("entropy")), found


def _backward(kind, temperature, gradients, cotangents):
    dkl = cotangents[0]
    gradients = {name: g * dkl.astype(g.dtype) for name, g in gradients.items()}
    return gradients.get("dx"), gradients.get("dhead"), None, None, None


_divergence.defvjp(_forward, _backward, symbolic_zeros=True)


def _walk(kind: str, temperature: float, wanted: set[str], arguments: tuple) -> dict[str, Array]:
    """The wanted ones of _RESULTS, by one walk over the tokens whose weight is not 0."""
    parts = Parts.of(arguments[-1], arguments[1])
    names = tuple(name for name in _RESULTS if name in wanted)
    local = functools.partial(_local_walk, parts, names, kind, np.float32(1 / temperature))
    results = parts.run(local, arguments, _GIVEN, tuple(_RESULTS[name] for name in names))
    return dict(zip(names, results, strict=True))


def _local_walk(parts, names, kind, scale, *arguments):
    x_TD, head_VD, y_TE, teacher_VE, weights_T = arguments
    head, teacher = head_VD.astype(x_TD.dtype), teacher_VE.astype(y_TE.dtype)
    chunks, total = Chunks(weights_T != 0, head, parts), functools.partial(_total, parts)

    def chunk(take, put, found):
        x_CD, y_CE, weights_C = (parts.gather(take(array)) for array in (x_TD, y_TE, weights_T))
        log_s_CV = _log_softmax(x_CD, head, scale, parts)
        log_t_CV = _log_softmax(y_CE, teacher, scale, parts)
        s_CV, t_CV, gap_CV = jnp.exp(log_s_CV), jnp.exp(log_t_CV), log_s_CV - log_t_CV
        if kind == "forward":
            kl_C, dlogits_CV = -total(t_CV * gap_CV), s_CV - t_CV
        else:
            kl_C = total(s_CV * gap_CV)
            dlogits_CV = s_CV * (gap_CV - kl_C[:, None])
        dlogits_CV = (dlogits_CV * (weights_C * scale)[:, None]).astype(x_CD.dtype)
        entropy_C = -total(s_CV * log_s_CV)
        steps = {
            "kl": lambda sum: sum + jnp.sum(kl_C * weights_C),
            "entropy": lambda sum: sum + jnp.sum(entropy_C * weights_C),
            "dx": lambda out: put(out, parts.sum_own(matmul(dlogits_CV, head, 1, 0))),
            "dhead": lambda sum: sum + matmul(dlogits_CV, x_CD, 0, 0),
        }
        return {name: steps[name](value) for name, value in found.items()}

    zero = jnp.zeros((), jnp.float32)
    start = {"kl": zero, "entropy": zero, "dx": jnp.zeros_like(x_TD)}
    start |= {"dhead": jnp.zeros(head.shape, jnp.float32)}
    found = chunks.loop(chunk, {name: start[name] for name in names})
    for name in {"kl", "entropy", "dhead"} & found.keys():
        found[name] = parts.over_copies(found[name])
    if "dhead" in found:
        found["dhead"] = found["dhead"].astype(head_VD.dtype)
        if "dx" in found and head_VD.dtype != jnp.float32:
            found["dx"], found["dhead"] = detours.ready_together(found["dx"], found["dhead"])
    return tuple(found[name] for name in names)


def _log_softmax(x_CD: Array, head_VD: Array, scale: np.float32, parts: Parts) -> Array:
    logits_CV = matmul(x_CD, head_VD, 1, 1) * scale
    logits_CV -= parts.over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=-1))[:, None]
    return logits_CV - jnp.log(_total(parts, jnp.exp(logits_CV)))[:, None]


def _total(parts: Parts, x_CV: Array) -> Array:
    return parts.over_vocab(jax.lax.psum, jnp.sum(x_CV, axis=-1))


@dataclasses.dataclass(frozen=True)
class Taught(Trainer):
    """A Trainer with a teacher, whose parameters stand in the frozen ones as "teacher".

    Add them to what `init` returns: frozen | {"teacher": params}.

    Attributes:
        teacher: the teacher's model, without its parameters.
        vocab_limit: ids from here on have no probability, for either model; None: all rows are tokens.
    """

    vocab_limit: int | None = None
    teacher: LLaMa | None = None

    def model_params(self, params: Params, frozen: Params) -> Params:
        """The student's parameters, with the teacher's as one more entry."""
        return {**super().model_params(params, frozen), "teacher": frozen["teacher"]}

    def export_params(self, state: TrainState, frozen: Params) -> Params:
        """The student in its usual shape, adapters merged."""
        return super().export_params(state, {k: v for k, v in frozen.items() if k != "teacher"})

    def compare(
        self, kind: str, x_BTD: Array, y_BTE: Array, params: Params, mask: Array, temperature: float
    ) -> Loss:
        """The mean divergence of the tokens that count, from the inputs of both heads; also `entropy`."""
        head, teacher = (head_matrix(p)[: self.vocab_limit] for p in (params, params["teacher"]))
        kl, entropy = divergence(kind, x_BTD, head, y_BTE, teacher, mask, temperature)
        return Loss(total=kl, weight=jnp.sum(mask), sums={"entropy": entropy})

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the means per token as they are: exp of a divergence is no perplexity."""
        return means


@dataclasses.dataclass(frozen=True)
class DistillTrainer(Taught, GRPOTrainer):
    """On-policy distillation: the student's own completions, see `trainers.rollout`, rewards unused.

    The loss is the mean over all tokens of KL(student ‖ teacher), in the contexts that the student
    visits. "reverse": exact, over the vocabulary (GKD, 2306.13649, with λ = 1 and reverse KL; MiniLLM,
    2306.08543). "sampled": its estimate log s - log t at the sampled token, as a policy gradient whose
    advantage is its negative (Lu and Thinking Machines Lab 2025, "On-Policy Distillation").
    Both have the same expected gradient; the first has less noise.
    """

    config: DistillConfig

    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """Sums over a micro-batch's tokens; also `kl` and `entropy`."""
        taught = dataclasses.replace(self, model=self.teacher)
        mask = batch["target_mask"].astype(jnp.float32)
        if self.config.divergence == "reverse":
            states = self.states(params, batch), taught.states(params["teacher"], batch)
            mask = mask.reshape(len(mask), -1)
            loss = self.compare("reverse", *states, params, mask, self.config.temperature)
            return loss.replace(sums=loss.sums | {"kl": loss.total})
        logprobs, entropy = self.logprobs(params, batch)
        theirs, _ = taught.logprobs(params["teacher"], batch)
        old = batch.get("old_logprobs", jax.lax.stop_gradient(logprobs))
        gap = jax.lax.stop_gradient(logprobs - theirs) * mask
        total = jnp.sum(importance_ratio(logprobs, old, mask) * gap)
        sums = {"kl": jnp.sum(gap), "entropy": jnp.sum(entropy)}
        return Loss(total=total, weight=jnp.sum(mask), sums=sums)

    def work(self, batch: Batch) -> Work:
        """Counts completions that no reward scored too: they are trained on."""
        return super().work({**batch, "counts": np.ones_like(batch["counts"])})


@dataclasses.dataclass(frozen=True)
class SoftTrainer(Taught, SFTTrainer):
    """Distillation on given rows: the mean over their targets of KL(teacher ‖ student).

    Source: GKD (2306.13649) with λ = 0 and forward KL; word-level distillation (Kim and Rush,
    1606.07947, section 3.1) at each target's context.
    """

    def loss(self, params: Params, batch: Batch, key: Array) -> Loss:
        """Sums over a micro-batch's targets; also `entropy`."""
        _, mask_BT = next_tokens(batch)
        states = hidden_states(self.model, params, batch)
        theirs = hidden_states(self.teacher, params["teacher"], batch)
        return self.compare("forward", states, theirs, params, mask_BT, 1.0)
