"""How the tests have XLA compile: programs as tiny as theirs are compiled far longer than they run."""

import glob
import importlib.metadata
import os

# Measured on a training step of two layers: 9.6 s of CPU time become 5.0 without LLVM's
# optimisations and 1.6 if XLA's new emitters are not used either. XLA ends a process that passes a
# flag which it does not know (any more).
_FLAG = "--xla_cpu_use_fusion_emitters=false"
# Where libtpu is installed and no TPU is, it complains on stderr, unless JAX is told not to ask it.
_ACCELERATORS = [p for name in ("accel*", "vfio/*", "nvidia*") for p in glob.glob(f"/dev/{name}")]
_IS_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")


def environment(optimized: bool) -> dict[str, str]:
    """Variables with which XLA optimises or not, on the CPU where that is all; other flags stay."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag != _FLAG]
    if _IS_KNOWN and not optimized:
        flags.append(_FLAG)
    disable = "false" if optimized else "true"
    platforms = {} if _ACCELERATORS else {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    return platforms | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": disable,
    }
