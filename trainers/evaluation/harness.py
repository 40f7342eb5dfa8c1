"""lm-eval's tasks for this project's models: finds them, runs them, writes their results (extra `eval`)."""

import contextlib
import difflib
import json
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from trainers.evaluation.lm import AltiplanoLM
from utils.errors import AltiplanoError, ConfigError, DataError, listed, reason


class Tasks(TaskManager):
    """lm-eval's tasks and those of one's own, with errors for people."""

    def __init__(self, include_path: str | None = None, unsafe_code: bool = False):
        """`include_path` is a folder of YAML files; `unsafe_code` allows tasks that run a model's code."""
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"--include_path {include_path}: expected a folder of YAML files")
        super().__init__(include_path=include_path)
        self.unsafe_code = unsafe_code

    def load(self, task_list: list[str]) -> dict[str, Any]:
        """Tasks and groups of these names, patterns (`mmlu_*`) or YAML files.

        Raises:
            ConfigError: an unknown name, or a task that needs more than this model or may not run.
            DataError: a task's files or its data cannot be read.
        """
        names: list[str] = []
        for name in task_list:
            found = [name] if name.endswith(".yaml") else self.match_tasks([name])
            if not found:
                close = difflib.get_close_matches(name, self.all_tasks)
                close = (
                    f"did you mean {' or '.join(close)}?" if close else "--tasks list names them"
                )
                raise ConfigError(f"lm-eval has no task {name!r:.80}; {close}")
            names += found
        try:
            loaded = super().load(names)
        except Exception as e:  # a task is YAML and Python of many authors
            raise DataError(
                f"lm-eval cannot load {listed(names)}: {type(e).__name__}: {reason(e)}; the data of "
                "most tasks are fetched from the Hugging Face hub"
            ) from e
        for name, task in loaded["tasks"].items():
            if getattr(task, "MULTIMODAL", False):
                raise ConfigError(f"{name} shows images; expected a task of text alone")
            if getattr(task, "UNSAFE_CODE", False) and not self.unsafe_code:
                raise ConfigError(
                    f"{name} runs code that the model writes: pass --confirm_run_unsafe_code where "
                    "that can do no harm"
                )
        return loaded


def evaluate_tasks(
    lm: AltiplanoLM, names: list[str], tasks: Tasks, **options: Any
) -> dict[str, Any]:
    """lm-eval's results for tasks of these names; the options are those of its `simple_evaluate`.

    Raises DataError for what a task makes of its rows, or of more examples than it has.
    """
    unsafe = {"confirm_run_unsafe_code": tasks.unsafe_code}
    try:
        with _metrics_of_the_hub():
            return simple_evaluate(model=lm, tasks=names, task_manager=tasks, **unsafe, **options)
    except AltiplanoError:
        raise
    except (ValueError, LookupError, AssertionError) as e:
        raise DataError(
            f"lm-eval fails on {listed(names)}: {type(e).__name__}: {reason(e)}; --debug shows where"
        ) from e


def as_table(results: dict[str, Any]) -> str:
    """Results as lm-eval prints them: the tasks, then their groups."""
    columns = ["results"] + ["groups"] * bool(results.get("groups"))
    return "\n".join(make_table(results, column) for column in columns)


def as_json(results: dict[str, Any]) -> str:
    """Results as lm-eval writes them."""
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)


class _ElsewhereFinder:
    """Finds the module `evaluate` in other folders than this project's root."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        root = Path(__file__).parents[2]
        if name == "evaluate":
            return PathFinder.find_spec(name, [p for p in sys.path if Path(p).resolve() != root])


@contextlib.contextmanager
def _metrics_of_the_hub() -> Iterator[None]:
    """`import evaluate` is the hub's package, as lm-eval's tasks mean it, and not the root's script."""
    ours, finder = sys.modules.pop("evaluate", None), _ElsewhereFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.pop("evaluate", None)
        if ours is not None:
            sys.modules["evaluate"] = ours
