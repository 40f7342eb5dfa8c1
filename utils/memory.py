"""Bytes of arrays, and of a model's weights and cache before they are loaded."""

import ctypes
import math
import os
from typing import Any

import jax
import numpy as np

from utils.errors import ArtifactError


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def params_bytes(n_params: int, dtype: Any) -> int:
    """Bytes of a model's parameters at a dtype, from `ModelConfig.n_params`."""
    return n_params * np.dtype(dtype).itemsize


def cache_bytes(shape_BKSH: tuple[int, ...], n_layers: int, dtype: Any) -> int:
    """Bytes of a KV cache: keys and values of every layer."""
    return 2 * n_layers * math.prod(shape_BKSH) * np.dtype(dtype).itemsize


def human(n_bytes: int) -> str:
    """1234567 -> "1.2 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 999.5 or unit == "TB":
            break
        n_bytes = n_bytes / 1000
    return f"{n_bytes:.{0 if n_bytes >= 99.5 or unit == 'B' else 1}f} {unit}"


def available_bytes() -> int | None:
    """Bytes of this machine's memory that are free for use, where the system says so."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":") for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def free_bytes() -> int | None:
    """Bytes that arrays may still take: of this machine on a CPU, else of the fullest local device."""
    if jax.default_backend() == "cpu":
        return available_bytes()
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    free = (s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s)
    return min(free, default=None)


def check_fits(parts: dict[str, int]) -> None:
    """Raises ArtifactError, with the predicted bytes, if this machine's memory cannot hold parts.

    Args:
        parts: bytes to be allocated, by what they are for.
    """
    available = available_bytes()
    total = sum(parts.values())
    if available is not None and total > available and jax.default_backend() == "cpu":
        listed = ", ".join(f"{human(size)} for {name}" for name, size in parts.items())
        raise ArtifactError(
            f"out of memory: {listed} are needed and {human(available)} are available; use fewer or "
            "shorter rows, a smaller model or --dtype bfloat16"
        )


def return_freed_memory() -> None:
    """Gives what was freed back to the system, where malloc keeps it for itself (glibc)."""
    trim = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int | None:
    """The most memory held so far: by this process on a CPU, else by the fullest local device.

    None if the system does not say. Not `ru_maxrss`: Linux passes it on to child processes.
    """
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        return max(
            (s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None
        )
    return _of_this_process("VmHWM")


def memory_bytes() -> int | None:
    """The memory that this process holds; None if the system does not say."""
    return _of_this_process("VmRSS")


def _of_this_process(name: str) -> int | None:
    try:
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
