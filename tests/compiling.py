"""How the tests have XLA compile: programs as tiny as theirs are compiled far longer than they run."""

import importlib.metadata
import os

# Measured on a training step of two layers: 9.6 s of CPU time become 5.0 without LLVM's
# optimisations and 1.6 if XLA's new emitters are not used either. XLA ends a process that passes a
# flag which it does not know (any more).
_FLAG = "--xla_cpu_use_fusion_emitters=false"
_IS_KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")


def environment(optimized: bool) -> dict[str, str]:
    """Variables with which XLA optimises or not; the caller's other flags stay."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag != _FLAG]
    if _IS_KNOWN and not optimized:
        flags.append(_FLAG)
    disable = "false" if optimized else "true"
    return {"XLA_FLAGS": " ".join(flags), "JAX_DISABLE_MOST_OPTIMIZATIONS": disable}
