"""Do the detours around XLA's products pay on this machine, with this jax?

    python benchmarks/detours.py

Each form of a product next to the others, by matrix; `ours` is the one that the model takes here.
A detour that loses here is a reason to change `utils/detours.py`: by instruction set or jax version,
never by a timing while a model runs.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils import detours, int8, ops  # noqa: E402

MATRICES = ((49152, 576), (3072, 576), (576, 1536), (16384, 2048))  # out, in
ROWS = 1024
Form = Callable[[jax.Array, jax.Array], jax.Array]


def seconds(form: Form, x, weight) -> float:
    """The best of eight rounds; a round takes 20 ms or more."""
    program = jax.jit(form)
    jax.block_until_ready(program(x, weight))
    started = time.perf_counter()
    jax.block_until_ready(program(x, weight))
    count = 1 + int(0.02 / (time.perf_counter() - started))
    rounds = []
    for _ in range(8):
        started = time.perf_counter()
        for _ in range(count):
            y = program(x, weight)
        jax.block_until_ready(y)
        rounds.append((time.perf_counter() - started) / count)
    return min(rounds)


def straight(x, weight):
    """As XLA does it by itself."""
    return ops._dot(x, weight, 1, 1)


def two_rows(x, weight):
    """The row twice."""
    return ops._dot(jnp.broadcast_to(x, (2, x.shape[1])), weight, 1, 1)[:1]


def transposed(x, weight):
    """Written as x @ weight.T."""
    return jnp.dot(x, weight.T, preferred_element_type=jnp.float32)


def in_float32(x, weight):
    """Both converted."""
    return ops._dot(x.astype(jnp.float32), weight.astype(jnp.float32), 1, 1)


def converted(x, weight):
    """The int8 matrix converted to float32, then multiplied."""
    return int8._converted(x, weight)


def rows_of(rows: int, kind: str) -> dict[str, Form]:
    """The forms of a product of some rows with a matrix of a kind, by name."""
    if kind == "int8":
        return {"ours": int8.project, "converted": converted}
    forms = {"ours": ops.project, "straight": straight}
    if kind == "bfloat16":
        forms |= {"two rows": two_rows} if rows == 1 else {"in float32": in_float32}
    return forms | ({"transposed": transposed} if rows == 1 else {})


def main() -> None:
    """Prints a table for one row, in GB/s of weights, and one for many, in GFLOP/s."""
    console = rich.console.Console()
    native = "has" if detours.multiplies_bfloat16() else "has no"
    console.print(f"jax {jax.__version__}; this CPU {native} products of bfloat16")
    draw = np.random.default_rng(0).standard_normal
    for rows, unit in ((1, "GB/s"), (ROWS, "GFLOP/s")):
        table = rich.table.Table(title=f"{rows} row{'s'[: rows > 1]}, {unit}")
        for name in ("matrix", "weights", "form", unit):
            table.add_column(name)
        for out, width in MATRICES:
            whole = jnp.asarray(draw((out, width), np.float32))
            for kind in ("float32", "bfloat16", "int8"):
                weight = int8.quantize(whole) if kind == "int8" else whole.astype(kind)
                dtype = "float32" if kind == "int8" else kind
                x = jnp.asarray(draw((rows, width), np.float32), dtype)
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
                for name, form in rows_of(rows, kind).items():
                    work = size if rows == 1 else 2 * rows * out * width
                    speed = work / seconds(form, x, weight) / 1e9
                    table.add_row(f"{out} x {width}", kind, name, f"{speed:.1f}")
        console.print(table)


if __name__ == "__main__":
    main()
