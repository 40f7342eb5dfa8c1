"""check_resume: the differences between a run and its checkpoint, by the rules on the configs' fields."""

import copy
import dataclasses
import re
from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.runs.resume import check_resume
from trainers.sft_trainer import SFTConfig
from utils.errors import ConfigError

SAVED = {
    "model": {"dim": 64, "rope_scaling": {"factor": 8.0}, "dtype": "float32"},
    "tokenizer": "ab12",
    "data": {"path": "a.jsonl", "digest": "cd34"},
    # What train.py saves: every field of a config has to be thought about.
    "train": dataclasses.asdict(
        SFTConfig(micro_batch_size=2, weight_decay=0.1, learning_rate=1e-5, warmup_steps=0)
    )
    | dict(batch_size=8, seq_len=256, packing=False, seed=0, dtype="float32", remat="dots"),
    "lora": {"rank": 16, "targets": ["wq", "wv"]},
}
OTHER = {int: 3, float: 0.5, str: "other", bool: True, list: ["x"]}
ALWAYS = "max_steps save_every eval_every max_skipped micro_batch_size remat"
ALWAYS = [f"train.{x}" for x in ALWAYS.split()]
CONFIG = "batch_size seq_len packing seed learning_rate schedule warmup_steps weight_decay"
CONFIG = [f"train.{x}" for x in f"{CONFIG} beta1 beta2 eps clip_norm".split()]
DATA = ["data.path", "data.digest"]
NEVER = """model.dim model.rope_scaling.factor model.dtype tokenizer train.optimizer
train.param_dtype train.state_dtype train.dtype lora.rank lora.targets""".split()


# What messages call them.
FLAGS = {"train.learning_rate": "--lr", "lora.targets": "lora.targets"}
FLAGS |= {"lora.rank": "--lora_rank"} | {
    f"train.{name}": f"train.{name}" for name in ("beta1", "beta2", "eps", "max_skipped")
}


def shown(field):
    """A field as messages name it: by its flag, if it has one."""
    section, _, name = field.partition(".")
    return FLAGS.get(field, f"--{name}" if section == "train" else field) + " "


def changed(*fields):
    """SAVED with other values."""
    out = copy.deepcopy(SAVED)
    for field in fields:
        *parents, last = field.split(".")
        parent = reduce(lambda t, name: t[name], parents, out)
        parent[last] = OTHER[type(parent[last])]
    return out


def all_fields(tree=SAVED, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from all_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_lists_above_are_all_there_is():
    assert sorted(ALWAYS + CONFIG + DATA + NEVER) == sorted(all_fields())


@pytest.mark.covers("D22")
@pytest.mark.parametrize("field", list(all_fields()))
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("config", [False, True])
def test_each_field(field, data, config):
    now = changed(field)
    flags = dict(allow_data_change=data, allow_config_change=config)
    if field in ALWAYS or field in DATA and data or field in CONFIG and config:
        (text,) = check_resume(SAVED, now, **flags)
        assert text.startswith(shown(field)) and " → " in text
        return
    with pytest.raises(ConfigError) as error:
        check_resume(SAVED, now, **flags)
    text = str(error.value)
    assert shown(field) in text and "→" in text
    assert ("--allow_data_change" in text) == (field in DATA)
    assert ("--allow_config_change" in text) == (field in CONFIG)
    assert ("never allowed" in text) == (field in NEVER)
    assert error.value.exit_code == 2 and "\n" not in text


@pytest.mark.covers("D22")
def test_both_values_are_shown_and_all_fields_at_once():
    with pytest.raises(ConfigError) as error:
        check_resume(SAVED, changed("train.learning_rate", "model.dim", "tokenizer", "data.digest"))
    text = str(error.value)
    assert text == (
        "these settings differ from the checkpoint's: "
        'data.digest "cd34" → "other" (change back, or pass --allow_data_change); '
        'model.dim 64 → 3, tokenizer "ab12" → "other" '
        "(never allowed: start anew in another --out_dir); "
        "--lr 1e-05 → 0.5 (change back, or pass --allow_config_change)"
    )


def test_allowed_ones_are_returned_but_do_not_excuse_others():
    now = changed("train.learning_rate", "train.max_steps", "data.digest")
    assert check_resume(SAVED, now, allow_data_change=True, allow_config_change=True) == [
        'data.digest "cd34" → "other"',
        "--lr 1e-05 → 0.5",
        "--max_steps 100 → 3",
    ]
    with pytest.raises(ConfigError) as error:
        check_resume(SAVED, now, allow_data_change=True)
    assert "--lr" in str(error.value) and "max_steps" not in str(error.value)


def test_a_run_from_before_there_were_families_is_a_llamas():
    now = copy.deepcopy(SAVED)
    now["model"]["family"] = "llama"
    assert check_resume(SAVED, now) == []
    now["model"]["family"] = "qwen2"
    with pytest.raises(ConfigError, match='model.family "llama" → "qwen2" .never'):
        check_resume(SAVED, now)


@pytest.mark.covers("D22")
@pytest.mark.parametrize("field", ["train.new_field", "new", "model.new", "dataset"])
def test_what_the_table_does_not_know_is_refused(field):
    now = copy.deepcopy(SAVED)
    *parents, last = field.split(".")
    reduce(lambda t, name: t[name], parents, now)[last] = 1
    flags = dict(allow_data_change=True, allow_config_change=True)
    with pytest.raises(ConfigError, match=f"{field} absent → 1 .never"):
        check_resume(SAVED, now, **flags)
    with pytest.raises(ConfigError, match=f"{field} 1 → absent .never"):
        check_resume(now, SAVED, **flags)


def test_lora_added_or_dropped():
    for none in ({}, None):
        plain = SAVED | {"lora": none}
        for pair in ((SAVED, plain), (plain, SAVED)):
            with pytest.raises(ConfigError, match="--lora_rank"):
                check_resume(*pair)


def test_what_json_made_of_it_is_the_same():
    now = copy.deepcopy(SAVED)
    now["lora"]["targets"] = ("wq", "wv")
    assert check_resume(SAVED, now) == [] == check_resume(SAVED, SAVED)
    with pytest.raises(ConfigError):
        check_resume({"train": {"packing": 1}}, {"train": {"packing": True}})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(list(all_fields())), min_size=1), st.booleans(), st.booleans())
def test_any_set_of_changes(fields, data, config):
    refused = {f for f in fields if f in NEVER}
    refused |= {f for f in fields if f in DATA and not data}
    refused |= {f for f in fields if f in CONFIG and not config}
    flags = dict(allow_data_change=data, allow_config_change=config)
    if refused:
        with pytest.raises(ConfigError) as error:
            check_resume(SAVED, changed(*fields), **flags)
        text = re.split("[:;,] ", str(error.value))
        assert {f for f in all_fields() if any(t.startswith(shown(f)) for t in text)} == refused
    else:
        assert len(check_resume(SAVED, changed(*fields), **flags)) == len(fields)
