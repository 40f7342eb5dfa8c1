"""Huge pages for what training allocates."""

import os
import platform
import sys
from pathlib import Path

_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this program anew with a malloc that asks Linux for pages of 2 MB; before any import.

    XLA for CPU allocates a step's temporaries anew each time, and each page of 4 kB of them costs a
    fault: an SFT step of the default model took 1.15 times as long without. glibc reads this setting
    when a process starts, and never again.

    Does nothing where all pages are huge or none may be, without glibc, or if GLIBC_TUNABLES is set.
    """
    asks = _MODE.exists() and "[madvise]" in _MODE.read_text()
    script = sys.argv[0] in sys.orig_argv  # not where another program runs it, a test or a profiler
    if asks and script and platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
