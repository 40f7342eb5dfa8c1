"""A child process for each line on stdin, which saves a checkpoint once somebody traces it.

Line: "process" or "writer", and the folder. Answers: the id of the process, or of the one thread
that saves, when it waits for its tracer; then the child's exit code (minus the signal that ended
it). Children are forked, as importing JAX takes longer than a save.
"""

import os
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp

from trainers.runs.checkpoint import Checkpointer
from utils.errors import CheckpointError


def state(step: int):
    """What is saved at a step."""
    return {"w": jnp.full((3,), step, jnp.float32)}


def wait_for_tracer(tasks: list[Path]) -> None:
    """Returns once strace is attached to these threads."""
    while any(map(_is_untraced, tasks)):
        time.sleep(0.002)


def _is_untraced(task: Path) -> bool:
    try:
        return "TracerPid:\t0\n" in (task / "status").read_text()
    except OSError:  # a thread that has ended meanwhile
        return False


def save(what: str, folder: str) -> int:
    """Goes on from what is in the folder by one step. Returns the exit code."""
    try:
        with Checkpointer(folder, keep=1, keep_best=False) as writer:
            step = writer.restore(state(0)).step + 1 if writer.steps else 1
            arrays = state(step)
            # The thread that writes exists before the tracing starts.
            thread = writer._thread.submit(threading.get_native_id).result()
            tasks = Path("/proc/self/task")
            if what == "writer":
                print(thread, flush=True)
                wait_for_tracer([tasks / str(thread)])
            else:
                print(os.getpid(), flush=True)
                wait_for_tracer(list(tasks.iterdir()))
            writer.save(step, arrays, {"step": step})
    except CheckpointError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(save(*line.strip().split(" ", 1)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
