"""benchmarks/accelerator.py on this machine's CPU, with tiny shapes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import accelerator, accelerator_oracles, accelerator_rows
from tests import compiling

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_all_rows_on_a_cpu(tmp_path):
    path, command = tmp_path / "found.json", [sys.executable, "benchmarks/accelerator.py", "--tiny"]
    command += ["--minutes", "20", "--json_file", str(path)]
    env = os.environ | compiling.environment(optimized=False)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    assert [row["what"] for row in found["rows"]] == [
        r["what"] for r in accelerator_rows.rows(True)
    ]
    for row in found["rows"]:
        ours = row["altiplano"]
        assert "error" not in ours and "error" not in (row.get("torch") or {}), row
        if row["part"] == "oracles":
            assert ours["passed"] and set(ours["found"]) == set(ours["bounds"])
        else:
            assert ours["tokens_per_s"] > 0 and ours["share"] > 0
    assert sum("tokens_per_s" in (row.get("torch") or {}) for row in found["rows"]) >= 4
    assert "cpu" in done.stdout and "FAIL" not in done.stdout


def test_what_is_not_finite_passes_no_bound():
    row = accelerator_oracles._judged({"logits": float("nan"), "gradients": 0.0}, "float32")
    assert not row["passed"] and row["found"]["logits"] is None
    assert not accelerator_oracles._judged({"logits": 3e-5}, "float32")["passed"]
    assert accelerator_oracles._judged({"logits": 1e-5}, "float32")["passed"]


def test_a_row_that_ends_its_process_does_not_stop_the_next(tmp_path):
    script = "import os\nfrom benchmarks.workers import serve\nclass Program:\n"
    script += "    def __init__(self, tiny): pass\n    def run(self, n): return n or os._exit(3)\n"
    (tmp_path / "program.py").write_text(script + "serve(Program)\n")
    end = time.monotonic() + 60
    with accelerator.Program(str(tmp_path / "program.py"), True, end) as program:
        assert program.ask("run", 1) == 1
        assert program.ask("run", 0) == {"error": "the process ended: see its messages above"}
        assert program.ask("run", 2) == 2
    with accelerator.Program("unused", True, time.monotonic()) as program:
        assert "not started" in program.ask("run", 1)["error"]


def test_an_error_is_a_row():
    found = accelerator_rows.attempt(lambda x: {"n": 1 // x}, 0)
    assert found == {"error": "ZeroDivisionError: integer division or modulo by zero"}
    assert accelerator_rows.attempt(lambda x: {"n": 1 // x}, 1) == {"n": 1}
