"""Config fields: ranges, all problems at once; flags and `--help` pages that are built from them."""

import dataclasses
import re

import pytest

import chat
import evaluate
import generate
import plan
import train
from utils import fields
from utils.console import cli
from utils.errors import ConfigError
from utils.fields import Config, field, integer, integers, number, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(Config):
    prompt: str | None = field(None, "the text to complete; default: stdin")
    json: bool = field(False, "one JSON object per completion")
    n: int = field(1, "completions per prompt", integer(1))
    tie: bool | None = field(None, "use the embedding as output head")
    k: tuple[int, ...] = field((), "comma-separated k's of pass@k", parse=integers)
    seed: int = field(0, "the same seed gives the same text", integer(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Config):
    optimizer: str = field("adamw", "update rule", one_of("adamw", "lion"))
    learning_rate: float = field(1e-5, "peak learning rate", number(above=0), flag="lr")
    warmup: float = field(0.0, "share of the steps", number(0, below=1), flag="warmup_share")
    clip_norm: float | None = field(1.0, "largest gradient norm", number(above=0))
    seed: int = field(0, "seed of the data's order", integer(0))
    beta1: float = field(0.9, "first moment's decay", flag="")
    plain: int = 3

    def problems(self):
        bad = self.optimizer == "lion" and self.warmup == 0
        return super().problems() + [f"warmup={self.warmup}, expected above 0 for lion"] * bad


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Config):
    data: str = field(help="a .jsonl file of {…}")
    export: bool = field(True, "write the model")


def command(prompts: Prompts):
    """Completes prompts."""
    raise AssertionError("parsing must not call the command")


def fit(
    data: Data, the_optimizer: Optimizer = Optimizer(clip_norm=None), prompts: Prompts = Prompts()
):
    """Trains. In steps.

    Example: python x.py --data f
    """


def test_a_config_lists_all_of_its_problems():
    with pytest.raises(ConfigError) as error:
        Optimizer(optimizer="sgd", learning_rate=0, warmup=True, clip_norm="1", seed=-1, beta1="x")
    assert str(error.value) == (
        "Optimizer: optimizer='sgd', expected one of adamw, lion; "
        "learning_rate=0, expected a number above 0; "
        "warmup=True, expected a number of at least 0 and below 1; "
        "clip_norm='1', expected a number above 0, or None; "
        "seed=-1, expected an integer of at least 0; beta1='x', expected a number"
    )
    with pytest.raises(ConfigError, match="warmup=0.0, expected above 0 for lion"):
        Optimizer(optimizer="lion")


@pytest.mark.parametrize(
    "range, words, inside, outside",
    [
        (integer(), "an integer", (-1, 0), (1.0, True, "1", None)),
        (integer(2), "an integer of at least 2", (2,), (1,)),
        (integer(most=2), "an integer of at most 2", (2, -5), (3,)),
        (integer(0, 9), "an integer from 0 to 9", (0, 9), (-1, 10)),
        (number(), "a number", (1, -0.5), (float("nan"), float("inf"), False, "1")),
        (number(0, 1), "a number from 0 to 1", (0, 1), (-0.1, 1.1)),
        (number(above=0, below=1), "a number above 0 and below 1", (0.5,), (0, 1)),
        (one_of("a", "b"), "one of a, b", ("a", "b"), ("c", 1, None)),
    ],
)
def test_ranges(range, words, inside, outside):
    assert range.expected == words
    assert all(map(range.fits, inside)) and not any(map(range.fits, outside))


# Flags ------------------------------------------------------------------------------------------


def parse(*words):
    return cli.parse_flags(command, words)


def test_flags_are_read_as_they_were_typed():
    assert parse() == {}
    assert parse("--prompt", "12", "--n", "3") == {"prompt": "12", "n": 3}
    assert parse("--prompt=[1]", "--json") == {"prompt": "[1]", "json": True}
    assert parse("--prompt", "") == {"prompt": ""}
    assert parse("--prompt", "True") == {"prompt": "True"}
    assert parse("--prompt=--json") == {"prompt": "--json"}
    assert parse("--tie", "--k", "1,8") == {"tie": True, "k": "1,8"}
    assert parse("--n", "1", "--n", "2", "--seed", "-1", "--debug") == dict(
        n=2, seed=-1, debug=True
    )


@pytest.mark.covers("N14")
@pytest.mark.parametrize("off", ["--nojson", "--no-json", "--no_json", "--json=False"])
def test_a_switch_is_turned_off(off):
    assert parse("--json", off, "--n", "2") == {"json": False, "n": 2}


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--foo", "1"], "unknown flag --foo; --help lists them"),
        (["--foo"], "unknown flag --foo"),
        (["--promt", "x"], r"unknown flag --promt; did you mean --prompt\?"),
        (["--nonsense"], "unknown flag --nonsense"),
        (["--no-sense"], "unknown flag --no"),
        (["-p", "x"], "unknown flag -p; "),
        (["Hello there"], "unknown argument 'Hello there'; did you mean --prompt 'Hello there'"),
        (["--n", "1", "surplus"], "unknown argument 'surplus'"),
        (["--prompt", "--json"], "--prompt needs a value"),
        (["--json", "--prompt"], "--prompt needs a value"),
        (["--n"], "--n needs a value"),
        (["--nojson", "true"], "--nojson"),
        (["--prompt", "a", "-", "b"], "see --help"),
    ],
)
def test_words_that_no_flag_takes_are_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(*words)


def test_configs_are_built_from_flags():
    built = fields.build(fit, {"data": "f", "lr": 1e-3, "export": False, "seed": 7, "k": "8,1"})
    assert list(built) == ["data", "the_optimizer", "prompts"]
    assert built["data"] == Data(data="f", export=False)
    assert built["the_optimizer"] == Optimizer(learning_rate=1e-3, clip_norm=None, seed=7)
    assert built["prompts"] == Prompts(seed=7, k=(1, 8))
    assert fields.build(fit, {"data": "f", "clip_norm": None})["the_optimizer"].clip_norm is None


def test_all_problems_of_all_groups_are_one_error():
    given = {"optimizer": "sgd", "lr": "five", "json": "false", "seed": -1, "k": "x", "n": True}
    with pytest.raises(ConfigError) as error:
        fields.build(fit, given)
    assert str(error.value) == (
        "--data is required; --optimizer must be one of adamw, lion, got 'sgd'; "
        "--lr must be a number above 0, got 'five'; "
        "--seed must be an integer of at least 0, got -1; "
        "--json must be true or false, got 'false'; --nojson turns it off; "
        "--n must be an integer of at least 1, got True; "
        "--k: 'x', expected integers with commas between, as 1,8"
    )
    with pytest.raises(
        ConfigError, match="^--data is required; --warmup_share=0.0, expected above 0"
    ):
        fields.build(fit, {"optimizer": "lion"})


def test_the_help_page_has_each_flag_once_with_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = fields.help_page(fit, "x.py")
    assert page.startswith(
        "usage: python x.py --data TEXT [flags]\nTrains. In steps.\nExample: python x.py --data f\n\n"
        "data:\n  --data TEXT               a .jsonl file of {…}\n"
        "  --[no]export              write the model\n\nthe optimizer:\n"
        "  --optimizer adamw         update rule (one of adamw, lion)\n"
        "  --lr 1e-05                peak learning rate\n"
    )
    assert (
        "  --clip_norm N             largest" in page and "  --json                    one" in page
    )
    assert page.count("--seed 0 ") == 1 and "beta1" not in page and "plain" not in page
    assert page.endswith(
        "\n\nevery command:\n  --debug                   show the traceback of an error\n"
        "  --version                 print the version and exit\n"
        "  --config TEXT             a JSON file of flags, or a run's run.json; flags of the command "
        "line win\n"
    )


COMMANDS = {"generate.py": generate.main, "chat.py": chat.main, "plan.py": plan.main}
COMMANDS |= {f"train.py {name}": command for name, command in train.COMMANDS.items()}
COMMANDS |= {f"evaluate.py {name}": command for name, command in evaluate.COMMANDS.items()}


@pytest.mark.covers("N3")
@pytest.mark.parametrize("program", COMMANDS)
def test_help_has_every_flag_and_its_whole_help(program):
    page = fields.help_page(COMMANDS[program], program)
    words = " ".join(page.split())
    assert re.search(rf"^Example: python {program} ", page, re.MULTILINE)
    for flag in fields.flags_of(COMMANDS[program]):
        assert fields.setting(flag.field).help in words
        assert re.search(rf"^  --(\[no\])?{flag.name}\b", page, re.MULTILINE)
