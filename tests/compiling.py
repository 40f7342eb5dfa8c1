"""How the tests have programs traced and compiled: tiny ones are compiled far longer than they run."""

import contextlib
import gc
import glob
import importlib.metadata
import os
from collections.abc import Iterator

# Measured on a training step of two layers: 9.6 s of CPU time become 5.0 without LLVM's
# optimisations and 1.6 if XLA's new emitters are not used either. A fifth of what programs of
# sampling take is saved if LLVM gets them whole instead of in parts. XLA ends a process that passes
# a flag which it does not know (any more).
_KNOWN_TO = {
    "--xla_cpu_use_fusion_emitters=false": ("0.10.",),
    "--xla_cpu_parallel_codegen_split_count=1": ("0.10.", "0.12.0"),
}
# Where libtpu is installed and no TPU is, it complains on stderr, unless JAX is told not to ask it.
_ACCELERATORS = [p for name in ("accel*", "vfio/*", "nvidia*") for p in glob.glob(f"/dev/{name}")]
_JAXLIB = importlib.metadata.version("jaxlib")


def environment(optimized: bool) -> dict[str, str]:
    """Variables with which XLA optimises or not, on the CPU where that is all; other flags stay."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in _KNOWN_TO]
    if not optimized:
        flags += [flag for flag, known in _KNOWN_TO.items() if _JAXLIB.startswith(known)]
    disable = "false" if optimized else "true"
    platforms = {} if _ACCELERATORS else {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    return platforms | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": disable,
    }


@contextlib.contextmanager
def without_emitters() -> Iterator[None]:
    """What the environment's flags do for a process, for some of its programs; JAX has no public way."""
    from jax._src import compiler  # here: it reads the environment

    known, of = _options(), compiler.get_compile_options

    def options(*args, env_options_overrides=None, **more):
        return of(*args, env_options_overrides=known | (env_options_overrides or {}), **more)

    compiler.get_compile_options = options
    try:
        yield
    finally:
        compiler.get_compile_options = of


def in_haste() -> dict[str, bool | int]:
    """Options to compile a program that is looked at and never run: in a third or sixth of the time.

    XLA's fused products and its buffers are those of users' programs, the code in them is not.
    """
    return {"xla_backend_optimization_level": 0} | _options()


def _options() -> dict[str, bool | int]:
    """The known flags as a compilation's options."""
    known = {}
    for flag, versions in _KNOWN_TO.items():
        name, _, value = flag.removeprefix("--").partition("=")
        if _JAXLIB.startswith(versions):
            known[name] = {"false": False}.get(value, 1)
    return known


def collect_seldom() -> None:
    """Spares tracing the search for garbage, a tenth of its time; what is imported stays for good."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
