"""This project's models in EleutherAI's Language Model Evaluation Harness (lm-eval, extra `eval`).

What each request means is lm-eval's, as its `HFLM` reads it: where a context ends, what stands before
an empty one, what is cut on the left. A context is computed once for its continuations, which are
branches of it (`utils.attention`).
Dimension key: B contexts, P tokens of a context, A continuations of each, C tokens of a continuation,
M = A · C.
"""

import functools
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from models.llama.chat_format import ChatFormat, chat_format_for
from models.llama.decoding import GenerationConfig
from models.llama.generation import context_length, generate, random_key
from models.llama.hub import DEFAULT_MODEL
from models.llama.load import DecodingModelFlags, Model, load_model
from models.llama.model import head_matrix
from models.llama.tokenizer import plain_prompt
from sampling import TopP
from utils import sharding
from utils.clock import moment
from utils.cross_entropy import chunk_size, cross_entropy
from utils.distributed import is_first
from utils.errors import ArtifactError, ConfigError, DataError, SamplingError, listed, plural

# Continuations that share one computation of their context; of more, it is computed again. A task has
# rows of this many or of one: two programs.
BRANCHES = 4

# Tokens of a batch at most, whatever its rows: what a layer's activations take.
_BATCH_TOKENS = 1 << 14

_OPEN_END = "OPEN_END_OF_THE_LAST_MESSAGE "
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}


class _Row(NamedTuple):
    """A context with some of its continuations, each with the number of its request."""

    context: tuple[int, ...]
    continuations: list[tuple[int, list[int]]]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """A, P and C of its buffers."""
        longest = max(len(ids) for _, ids in self.continuations)
        branches = BRANCHES if len(self.continuations) > 1 else 1
        return branches, _doubled(64, len(self.context)), _doubled(16, longest)


def _bar(what: str, total: int, disable: bool) -> tqdm:
    return tqdm(desc=what, total=total, disable=disable or not is_first())


def _parts(items: list, size: int) -> list[list]:
    """The items in lists of this size, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _doubled(least: int, n: int) -> int:
    """The smallest of least, 2 · least, 4 · least, … that holds n: few sizes mean few programs."""
    return least << max(0, (-(-n // least) - 1).bit_length())


@register_model("altiplano")
class AltiplanoLM(TemplateLM):
    """A model of this project for lm-eval, which knows it as `altiplano` once this module is imported.

    Names of control tokens in a task's texts become those tokens, as in `HFLM`.

    Attributes:
        tokenizer, max_length: the model's, and its context in tokens.
        max_gen_toks: new tokens where a task names no limit.
    """

    max_gen_toks = 256

    def __init__(
        self,
        pretrained: str | Path | Model = DEFAULT_MODEL,
        *,
        batch_size: int | str = 16,
        max_length: int | None = None,
        chat_format: str | None = None,
        template_args: str | None = None,
        **flags: Any,
    ):
        """The arguments are those of lm-eval's `model_args` too.

        Args:
            pretrained: a checkpoint as `DecodingModelFlags.ckpt_dir` takes it, or a loaded model.
            batch_size: texts at once; fewer where they are long. "auto" is 16.
            max_length: context in tokens; None: the model's.
            chat_format, template_args: see `chat_format_for`.
            flags: other fields of DecodingModelFlags, for example dtype.
        """
        super().__init__()
        if not isinstance(pretrained, Model):
            pretrained = load_model(DecodingModelFlags(ckpt_dir=str(pretrained), **flags))
        self.model, self.tokenizer = pretrained, pretrained.tokenizer
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self.max_length = context_length(self.model.llama.config, max_length)
        self._format = chat_format, template_args

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_id
        return min(self.tokenizer.stop_ids) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template where lm-eval keeps requests."""
        return type(self).__name__

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """The chat format that `apply_chat_template` writes."""
        return chat_format_for(self.tokenizer, *self._format, moment())

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, with one BOS where the model's prompts have one and it is not refused."""
        if add_special_tokens is None:
            return plain_prompt(string, self.tokenizer, markup=True)
        bos = add_special_tokens and self.tokenizer.adds_bos
        return self.tokenizer.encode(string, bos=bos, allow_special=True)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without a generation prompt its last message is left open.

        A template that refuses a system message gets none, with a warning.
        """
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except (ArtifactError, DataError):
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            warnings.warn("the chat template refuses a system message: it is left out")
            return self._rendered(others, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.chat.render(messages)
        *before, last = messages
        opened = [*before, last | {"content": last["content"] + _OPEN_END}]
        text = self.chat.render(opened, add_generation_prompt=False)
        at = text.rindex(_OPEN_END.strip())
        # A template that strips contents would have stripped this one's end.
        return text[:at] if text.startswith(_OPEN_END, at) else text[:at].rstrip()

    def get_model_info(self) -> dict[str, Any]:
        """Facts of the model for lm-eval's results."""
        sizes = [x.size for x in jax.tree.leaves(self.model.params)]
        dtype = self.model.params["final_norm"].dtype
        return {"model_num_parameters": sum(sizes), "model_dtype": str(dtype)}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-prob of the continuation in nats, whether it is the greedy one) per request.

        Args:
            requests: (texts, ids of the context, ids of the continuation).
        """
        groups, found, cut = defaultdict(list), {}, 0
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"request {index}: a continuation of {len(continuation)} tokens, expected 1 to "
                    f"{self.max_length}, the context (--max_seq_len); it follows "
                    f"{self.tokenizer.decode(context[-16:])!r:.80}"
                )
            room = self.max_length + 1 - len(continuation)
            cut += len(context) > room
            kept = tuple(context or [self.prefix_token_id])[-room:]
            groups[kept].append((index, continuation))
        self._warn_of_cut(cut)
        rows = []
        for context, continuations in groups.items():
            continuations.sort(key=lambda pair: len(pair[1]))
            rows += [_Row(context, part) for part in _parts(continuations, BRANCHES)]
        with _bar("log-likelihoods", len(requests), disable_tqdm) as bar:
            for batch, sizes in self._batches(rows):
                found |= self._scored(batch, sizes)
                bar.update(len(found) - bar.n)
        return [found[index] for index in range(len(requests))]

    def _batches(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], tuple[int, ...]]]:
        """Rows of about the same sizes with those sizes, B first; the largest come first."""
        rows = sorted(rows, key=lambda row: row.sizes, reverse=True)
        while rows:
            A, P, C = rows[0].sizes
            B = max(1, min(self.batch_size // A, _BATCH_TOKENS // (P + A * C)))
            B += -B % sharding.axis_size(sharding.TRAINING.batch)
            batch = [row for row in rows[:B] if row.sizes[:2] == (A, P)]
            yield batch, (B, A, P, C)
            rows = rows[len(batch) :]

    def _scored(self, batch: list[_Row], sizes: tuple[int, ...]) -> dict[int, tuple[float, bool]]:
        """The answers of a batch by the numbers of their requests."""
        B, A, P, C = sizes
        contexts_BP, lengths_B = np.zeros((B, P), np.int32), np.ones(B, np.int32)
        targets_BAC, counts_BA = np.zeros((B, A, C), np.int32), np.zeros((B, A), np.int32)
        for b, (context, continuations) in enumerate(batch):
            contexts_BP[b, : len(context)], lengths_B[b] = context, len(context)
            for a, (_, ids) in enumerate(continuations):
                targets_BAC[b, a, : len(ids)], counts_BA[b, a] = ids, len(ids)
        arrays = contexts_BP, lengths_B, targets_BAC, counts_BA
        nll_BA, right_BA = map(np.asarray, _score(self.model.llama, self.model.params, arrays))
        if not np.isfinite(nll_BA).all():
            error = SamplingError(
                "log-likelihoods are not finite: the weights hold NaN or infinity, or the dtype "
                "overflows; try --dtype float32 or check the checkpoint"
            )
            error.exit_code = 5
            raise error
        return {
            index: (-float(nll_BA[b, a]), bool(right_BA[b, a] == counts_BA[b, a]))
            for b, row in enumerate(batch)
            for a, (index, _) in enumerate(row.continuations)
        }

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-prob of each text in nats; each token once, in windows of the context."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (logprob, _) in zip(owners, found):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each completion up to the first of its stops."""
        found, asked, cut = {}, [], 0
        for index, request in enumerate(requests):
            context, given = request.args
            settings = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            if settings.get("num_beams") == 1:
                del settings["num_beams"]
            if not 0 < settings["max_gen_toks"] < self.max_length:
                raise ConfigError(
                    f"max_gen_toks={settings['max_gen_toks']} leaves no room for a prompt in a "
                    f"context of {self.max_length} tokens (--max_seq_len)"
                )
            room = self.max_length - settings["max_gen_toks"]
            ids = self.tok_encode(context) or [self.prefix_token_id]
            cut += len(ids) > room
            asked.append((repr(sorted(settings.items())), len(ids), index, ids[-room:], settings))
        self._warn_of_cut(cut)
        asked.sort(key=lambda item: item[:3], reverse=True)
        with _bar("completions", len(requests), disable_tqdm) as bar:
            for _, alike in itertools.groupby(asked, key=lambda item: item[0]):
                for batch in _parts(list(alike), self.batch_size):
                    _, _, indices, prompts, (settings, *_) = zip(*batch)
                    found |= zip(indices, self._completed(prompts, settings, indices))
                    bar.update(len(batch))
        return [found[index] for index in range(len(requests))]

    def _warn_of_cut(self, cut: int) -> None:
        if cut:
            warnings.warn(
                f"{plural(cut, 'request')} with more tokens than the context of {self.max_length}: cut "
                "on the left (--max_seq_len)",
                stacklevel=3,
            )

    def _completed(
        self, prompts: Sequence[list[int]], settings: dict[str, Any], indices: Sequence[int]
    ) -> list[str]:
        """Completions of prompts with the same settings, each drawn by its request's number."""
        model = self.model.llama
        known = {"do_sample", "until", "max_gen_toks"} | _SAMPLING
        if unknown := [name for name in settings if name not in known]:
            raise ConfigError(
                f"generation_kwargs: {unknown[0]} is not known here, expected {listed(sorted(known))}"
            )
        sampler = {name: settings[name] for name in _SAMPLING & settings.keys()}
        sampler |= {} if settings["do_sample"] else {"temperature": 0.0}
        key, missing = random_key(0), self.batch_size - len(prompts)
        # Rows that fill up the batch spare a program of its size.
        numbers = jnp.asarray([*indices, *[indices[0]] * missing], jnp.uint32)
        done = generate(
            model,
            self.model.params,
            [*prompts, *[prompts[0]] * missing],
            TopP(**sampler),
            GenerationConfig(
                max_new_tokens=settings["max_gen_toks"],
                max_seq_len=self.max_length,
                stop_ids=self.tokenizer.stop_ids,
                stop_strings=tuple(filter(None, settings["until"])),
                vocab_limit=self.model.vocab_limit,
            ),
            key=jax.vmap(jax.random.fold_in, (None, 0))(key, numbers),
            tokenizer=self.tokenizer.answers,
        )
        return [done.text(i, self.tokenizer.answers) for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnames="llama")
def _score(llama, params, arrays) -> tuple[jax.Array, jax.Array]:
    """(negative log-likelihood in nats, number of targets that are the greedy token), both [B, A].

    Args:
        arrays: contexts [B, P] int32 and their lengths [B], continuations [B, A, C] int32 and their
            lengths [B, A]; all padded on the right.
    """
    contexts_BP, lengths_B, targets_BAC, counts_BA = arrays
    (B, P), (_, A, C) = contexts_BP.shape, targets_BAC.shape
    at_BP = jnp.broadcast_to(jnp.arange(P), (B, P))
    at_BAC = jnp.broadcast_to((lengths_B[:, None] + jnp.arange(C))[:, None], (B, A, C))
    # A continuation's first token is predicted by the context's last.
    before_AC = (P - 1 + jnp.arange(A * C)).reshape(A, C)
    before_BAC = jnp.where(jnp.arange(C) == 0, (lengths_B - 1)[:, None, None], before_AC)
    states_BMD, _ = llama.apply(
        {"params": params},
        jnp.concatenate([contexts_BP, targets_BAC.reshape(B, -1)], axis=1),
        positions_BT=jnp.concatenate([at_BP, at_BAC.reshape(B, -1)], axis=1),
        branches=(at_BP < lengths_B[:, None], jnp.ones((B, A, C), bool)),
        logits_at_BM=before_BAC.reshape(B, -1),
        hidden=True,
    )
    head_VD = head_matrix(params)
    weights_BAC = (jnp.arange(C) < counts_BA[..., None]).astype(jnp.float32)

    def sums(row):
        states_CD, targets_C, weights_C = row
        found = cross_entropy(states_CD, head_VD, targets_C, weights_C)
        return found.nll, found.correct

    rows = states_BMD.reshape(B * A, C, -1), targets_BAC.reshape(-1, C), weights_BAC.reshape(-1, C)
    # The head is read once for as many tokens as its loss takes in a chunk.
    together = max(1, chunk_size(B * A * C, len(head_VD)) // C)
    found = jax.lax.map(sums, rows, batch_size=together)
    return sharding.replicate(jax.tree.map(lambda x: x.reshape(B, A), found))
