"""Do the detours around XLA's products pay on this machine, with this jax?

    python benchmarks/detours.py

Each form of a product next to the others, by matrix; `ours` is the one that the model takes here.
A detour that loses here is a reason to change `utils/detours.py`: by instruction set or jax version,
never by a timing while a model runs.
"""

import functools
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
FEW, ROWS = 16, 1024
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


# The gradient by a matrix: of its product's gradient [rows, out] and of x [rows, in].
GRADIENTS = {
    "ours": lambda x, dy: ops.matmul(dy, x, 0, 0),
    "straight": lambda x, dy: ops._dot(dy, x, 0, 0),
}


def measure(console: rich.console.Console, title: str, unit: str, forms_of: Callable) -> None:
    """Prints a table: forms_of(out, width, kind) gives (x, weight or dy, work, forms by name)."""
    table = rich.table.Table(title=f"{title}, {unit}")
    for name in ("matrix", "weights", "form", unit):
        table.add_column(name)
    for out, width in MATRICES:
        for kind in ("float32", "bfloat16", "int8"):
            x, other, work, forms = forms_of(out, width, kind)
            for name, form in forms.items():
                speed = f"{work / seconds(form, x, other) / 1e9:.1f}"
                table.add_row(f"{out} x {width}", kind, name, speed)
    console.print(table)


def random(*shape: int, dtype: str = "float32") -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def products(rows: int, out: int, width: int, kind: str) -> tuple:
    """x [rows, width] and a matrix; the work is its bytes for few rows, else FLOPs."""
    whole = random(out, width)
    weight = int8.quantize(whole) if kind == "int8" else whole.astype(kind)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    work = size if rows <= FEW else 2 * rows * out * width
    x = random(rows, width, dtype="float32" if kind == "int8" else kind)
    return x, weight, work, rows_of(rows, kind)


def gradients(out: int, width: int, kind: str) -> tuple:
    """x and dy, if the matrix is trained."""
    if kind == "int8":
        return None, None, 0, {}
    x, dy = random(ROWS, width, dtype=kind), random(ROWS, out, dtype=kind)
    return x, dy, 2 * ROWS * out * width, GRADIENTS


def loops(console: rich.console.Console) -> None:
    """Prints how long a forward and a backward pass take over a stack of layers."""
    layers, rows, width = 16, 1024, 1024
    for kind in ("float32", "bfloat16"):
        x, stack = random(rows, width, dtype=kind), random(layers, width, width, dtype=kind) / 32

        def block(x, layer, _):
            return x + ops.linear(x, layer)

        def by_jax(x, stack):
            return jax.lax.scan(lambda x, layer: (block(x, layer, None), None), x, stack)[0]

        def by_us(x, stack):
            return detours.scan(block, x, stack, None)

        times = {
            name: seconds(jax.grad(lambda x, w: scan(x, w).astype("float32").sum(), 1), x, stack)
            for name, scan in (("ours", by_us), ("straight", by_jax))
        }
        listed = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in times.items())
        console.print(f"gradient of {layers} layers in {kind}: {listed}")


def main() -> None:
    """Prints tables for one row and some, in GB/s of weights, and for many, in GFLOP/s."""
    console = rich.console.Console()
    native = "has" if detours.multiplies_bfloat16() else "has no"
    console.print(f"jax {jax.__version__}; this CPU {native} products of bfloat16")
    for rows, title, unit in (
        (1, "1 row", "GB/s"),
        (FEW, f"{FEW} rows", "GB/s"),
        (ROWS, f"{ROWS} rows", "GFLOP/s"),
    ):
        measure(console, title, unit, functools.partial(products, rows))
    measure(console, f"gradient by the matrix, {ROWS} rows", "GFLOP/s", gradients)
    loops(console)


if __name__ == "__main__":
    main()
