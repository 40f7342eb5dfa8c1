"""Trackers: what TensorBoard, wandb and trackio are given, on a resume too, and that none stops a run."""

import importlib.machinery
import json
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

import train
from tests.test_metrics import one_warning, steps
from trainers.runs.folder import RunConfig
from trainers.runs.metrics import MetricsLog
from utils.console.flags import read_flags
from utils.errors import ConfigError

RECORD = {"loss": 0.5, "seconds": {"data": 2.0}, "text": "x", "nan": float("nan")}


class FakeRun:
    """A run of wandb 0.31 or trackio 0.43, as far as both have the same methods.

    wandb's own continues after its last step; `step` is the last that it has.
    """

    def __init__(self, calls):
        self.calls, self.step = calls, 0

    def log(self, data, step=None):
        assert step is not None
        self.calls.append((step, data))
        self.step = step

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def hosted(monkeypatch):
    """Calls that fake packages get, by their names: parameters of `init`, then of each run's methods.

    The real packages take a second to import and a process of their own; their signatures are here.
    """
    calls, runs = {"wandb": [], "trackio": []}, {}

    def wandb(entity=None, project=None, dir=None, id=None, name=None, **rest):
        assert rest.keys() == {"config", "resume", "settings"}
        calls["wandb"].append(dict(dir=dir, id=id, name=name, **rest))
        return runs.setdefault(id, FakeRun(calls["wandb"]))

    def trackio(project, name=None, group=None, space_id=None, config=None, resume="never"):
        print("* Trackio project initialized")
        calls["trackio"].append(dict(project=project, name=name, config=config, resume=resume))
        return FakeRun(calls["trackio"])

    for init in (wandb, trackio):
        module = types.ModuleType(init.__name__)
        module.init = init
        module.__spec__ = importlib.machinery.ModuleSpec(init.__name__, None, origin="fake")
        monkeypatch.setitem(sys.modules, init.__name__, module)
    return calls


def run(folder, first, last):
    with MetricsLog(folder, track=("wandb", "trackio"), start_step=first) as log:
        for step in range(first, last):
            log.write({"step": step} | RECORD)


def test_a_resumed_run_continues_its_run_of_wandb_and_trackio(hosted, tmp_path, capsys):
    folder, settings = tmp_path / "mine", {"train": {"lr": 0.1}}
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(settings))
    run(folder, 1, 4)  # killed after a checkpoint of step 2
    run(folder, 3, 5)
    numbers = {"loss": 0.5, "seconds/data": 2.0}
    for name in ("wandb", "trackio"):
        began, again = (call for call in hosted[name] if isinstance(call, dict))
        assert began == again and again["resume"] == "allow" and again["config"] == settings
        # A step that is done again is sent again.
        sent = [(step, numbers) for step in (1, 2, 3)], [(step, numbers) for step in (3, 4)]
        assert hosted[name] == [began, *sent[0], "finish", again, *sent[1], "finish"]
    began, other = hosted["wandb"][0], hosted["trackio"][0]
    assert (began["name"], began["dir"]) == ("mine", str(folder)) and len(began["id"]) == 8
    assert other["project"] == "altiplano" and other["name"].startswith("mine-")
    assert capsys.readouterr().out == ""
    # Another run in the same folder is another run there.
    run(folder, 1, 2)
    assert (
        hosted["wandb"][-3]["id"] != began["id"] and hosted["trackio"][-3]["name"] != other["name"]
    )


def test_wandb_gets_no_step_before_its_last(hosted, tmp_path):
    run(tmp_path, 1, 6)
    run(tmp_path, 2, 7)
    assert [c[0] for c in hosted["wandb"] if isinstance(c, tuple)] == [1, 2, 3, 4, 5, 5, 6]


@pytest.mark.covers("D29")
def test_a_tracker_without_a_network_costs_one_warning(hosted, tmp_path, monkeypatch):
    def refuse(**_):
        raise ConnectionError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with one_warning("no network"):
        run(tmp_path, 1, 4)
    assert steps(tmp_path) == [1, 2, 3]
    assert [c[0] for c in hosted["trackio"] if isinstance(c, tuple)] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio",) * 2):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"track={name} needs .* 'altiplano\[{name}\]'"):
            RunConfig(out_dir="run", track=(name,))
    with pytest.raises(ConfigError, match="expected some of tensorboard, wandb, trackio"):
        RunConfig(out_dir="run", track=("mlflow",))
    # Made by wandb where a command runs: no package.
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="track=wandb needs"):
        RunConfig(out_dir="run", track=("wandb",))


def events(folder):
    """The events of TensorBoard's record files: length, its checksum, data, their checksum."""
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_gets_the_numbers_and_hides_those_of_an_interrupted_run(tmp_path):
    for start in (0, 2):
        with MetricsLog(tmp_path, track=("tensorboard",), start_step=start) as log:
            for step in range(start, 3):
                log.write({"step": step} | RECORD)
                assert list(events(tmp_path))[-1].step == step  # flushed
    found = list(events(tmp_path))
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    one = lambda step: [(step, "loss", 0.5), (step, "seconds/data", 2.0)]
    assert scalars == one(0) + one(1) + one(2) + one(2)
    assert [e.step for e in found if e.session_log.status == 1] == [2]


@pytest.mark.parametrize("flag, track", [(True, {"track": ("tensorboard",)}), (False, {})])
def test_a_run_from_before_trackers_is_repeated(tmp_path, flag, track):
    run = {"flags": {"lr": 0.5, "tensorboard": flag}}
    (tmp_path / "run.json").write_text(json.dumps({"run": run}))
    assert read_flags(train.sft, str(tmp_path / "run.json")) == {"lr": 0.5} | track
