"""Which differences between a run and the checkpoint that it goes on from are allowed."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from utils.errors import raise_all

# The first pattern that matches a field decides; a field that none matches is refused, so that a
# new one has to be thought about.
_ALWAYS = "always"
_CONFIG = "allow_config_change"
_DATA = "allow_data_change"
_NEVER = "never"
RULES = (
    # How long, how often, how it is shown. A micro-batch is a slice of the same update.
    ("train.max_steps", _ALWAYS),
    ("train.micro_batch_size", _ALWAYS),
    ("train.remat", _ALWAYS),
    ("train.branches", _ALWAYS),
    ("train.save_every", _ALWAYS),
    ("train.eval_every", _ALWAYS),
    ("train.max_skipped", _ALWAYS),
    # The moments stay meaningful, the curve does not stay the same.
    ("train.learning_rate", _CONFIG),
    ("train.schedule", _CONFIG),
    ("train.warmup_steps", _CONFIG),
    ("train.weight_decay", _CONFIG),
    ("train.beta*", _CONFIG),
    ("train.eps", _CONFIG),
    ("train.clip_norm", _CONFIG),
    ("train.batch_size", _CONFIG),
    ("train.seq_len", _CONFIG),
    ("train.packing", _CONFIG),
    ("train.seed", _CONFIG),
    # GRPO's. (train.beta* stands above.)
    ("train.loss", _CONFIG),
    ("train.kl", _CONFIG),
    ("train.epsilon_*", _CONFIG),
    ("train.dual_clip", _CONFIG),
    ("train.ratio_level", _CONFIG),
    ("train.tis_cap", _CONFIG),
    ("train.mask_truncated", _CONFIG),
    ("train.temperature", _CONFIG),
    ("train.top_*", _CONFIG),
    ("train.max_completion_len", _CONFIG),
    ("train.prompts_per_step", _CONFIG),
    ("train.group_size", _CONFIG),
    ("train.scale", _CONFIG),
    ("train.iterations", _CONFIG),
    ("train.mini_batches", _CONFIG),
    ("train.refills", _CONFIG),
    ("data.*", _DATA),
    # The saved arrays mean nothing to another model, optimizer, precision or vocabulary.
    ("model.*", _NEVER),
    ("tokenizer*", _NEVER),
    ("lora*", _NEVER),
    ("train.optimizer*", _NEVER),
    ("train.*dtype", _NEVER),
)


def check_resume(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    allow_data_change: bool = False,
    allow_config_change: bool = False,
) -> list[str]:
    """Compares what a checkpoint was made with and what the run is started with.

    Args:
        saved, now: nested dicts with the entries "model", "tokenizer", "data", "train", "lora".
        allow_data_change: other data may be gone on with.
        allow_config_change: so may another learning rate, batch size and the like.

    Returns:
        The differences that are allowed, "field: saved → now" each, to be shown.

    Raises:
        ConfigError: some are not; all of those are named, with the flag that would allow them.
    """
    allowed_by = {_ALWAYS: True, _CONFIG: allow_config_change, _DATA: allow_data_change}
    allowed, problems = [], []
    old, new = _fields(saved), _fields(now)
    for field in sorted(old.keys() | new.keys()):
        before, after = old.get(field, "absent"), new.get(field, "absent")
        if before == after:
            continue
        text = f"{field}: {before} → {after}"
        rule = next((rule for pattern, rule in RULES if fnmatchcase(field, pattern)), _NEVER)
        if allowed_by.get(rule):
            allowed.append(text)
        elif rule == _NEVER:
            problems.append(f"{text} (never allowed: start anew in another folder)")
        else:
            problems.append(f"{text} (pass --{rule} to go on)")
    raise_all("the run is not the one that the checkpoint is of", problems)
    return allowed


def _fields(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """JSON by dotted path: a tuple is the list that it was saved as, 1 is not true."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= _fields(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = json.dumps(value)
    return out
