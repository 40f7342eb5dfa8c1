"""Resuming: what may differ between a checkpoint and the run that resumes from it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from models.llama.lora import LoRAConfig
from trainers.runs.folder import RunConfig
from trainers.runs.recipes import RECIPES, Recipe
from trainers.trainer import Trainer
from utils.errors import ConfigError
from utils.fields import ALWAYS, CONFIG, DATA, NEVER, Setting, setting
from utils.files import flatten

# Settings by their path in a checkpoint's meta.
_SETTINGS = {
    f"train.{f.name}": setting(f)
    for config in (*sum((recipe.configs for recipe in RECIPES.values()), ()), RunConfig)
    for f in dataclasses.fields(config)
} | {f"lora.{f.name}": setting(f) for f in dataclasses.fields(LoRAConfig)}
_SETTINGS |= {f"train.{name}": Setting(flag=name) for name in ("dtype", "quantize")}
_SETTINGS["model.max_seq_len"] = Setting(flag="max_seq_len", resume=ALWAYS)

# How each kind of difference is refused.
_ADVICE = {
    CONFIG: "change back, or pass --allow_config_change",
    DATA: "change back, or pass --allow_data_change",
    NEVER: "never allowed: start anew in another --out_dir",
}


def check_resume(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    allow_data_change: bool = False,
    allow_config_change: bool = False,
) -> list[str]:
    """Compares the settings of a checkpoint with those of the run that resumes from it.

    The rules stand on the configs' fields; a setting without one must not differ.

    Args:
        saved, now: as `describe` makes them; the "progress" of a checkpoint may differ.
        allow_data_change: whether the data may differ.
        allow_config_change: whether the learning rate, batch size and the like may.

    Returns:
        The differences that are allowed, "--flag saved → now" each.

    Raises:
        ConfigError: some are not allowed; all of those are named, with the flag that would allow them.
    """
    allowed, refused = [], {}
    old, new = _flat_json(saved), _flat_json(now)
    for path in sorted(old.keys() | new.keys()):
        # Runs from before there were other families do not say theirs.
        first = '"llama"' if path == "model.family" else "absent"
        before, after = old.get(path, first), new.get(path, "absent")
        if before == after:
            continue
        known = _SETTINGS.get(path, Setting(resume=DATA if path.startswith("data.") else NEVER))
        text = f"{f'--{known.flag}' if known.flag else path} {before} → {after}"
        if known.resume == ALWAYS or {CONFIG: allow_config_change, DATA: allow_data_change}.get(
            known.resume
        ):
            allowed.append(text)
        else:
            refused.setdefault(known.resume, []).append(text)
    if refused:
        listed = (f"{', '.join(texts)} ({_ADVICE[rule]})" for rule, texts in refused.items())
        raise ConfigError("these settings differ from the checkpoint's: " + "; ".join(listed))
    return allowed


def keep_first_defaults(recipe: Recipe, trainer: Trainer, saved: Mapping[str, Any]) -> Recipe:
    """The recipe of a run that resumes, where defaults that follow from other settings stay as saved.

    A warm-up of 3 % of `max_steps` would else change with `max_steps`, although nobody asked for it.

    Args:
        recipe: of the flags.
        trainer: made from it: what is None there and not here is such a default.
        saved: the settings of the checkpoint's "train".
    """
    config = recipe.config
    first = {
        f.name: saved[f.name]
        for f in dataclasses.fields(config)
        if getattr(config, f.name) is None and getattr(trainer.config, f.name) is not None
        if f.name in saved and setting(f).resume != ALWAYS
    }
    return dataclasses.replace(recipe, config=dataclasses.replace(config, **first))


def _flat_json(meta: Mapping[str, Any]) -> dict[str, str]:
    """A meta's values as JSON by their paths: a tuple is the list that it was saved as, 1 is not true."""
    known = {name: value for name, value in meta.items() if name != "progress"}
    return {path: json.dumps(value) for path, value in flatten(known, ".").items()}
