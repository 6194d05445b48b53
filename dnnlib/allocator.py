"""Tuning of glibc's memory allocator."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt (malloc.h of glibc).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def tune_allocator() -> None:
    """Make glibc keep freed buffers for reuse; do nothing on other platforms.

    By default glibc maps every buffer above 32 MiB separately, unmaps the buffer on free, and trims the heap. Every
    training step on the CPU and every decoded image then incurs the same page faults again. With this setting, memory
    usage grows to its peak and stays there.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # e.g. musl
        return
    largest = 2**31 - 1  # mallopt takes an int
    if mallopt(M_MMAP_THRESHOLD, largest) != 1:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the limit that glibc documents
    mallopt(M_TRIM_THRESHOLD, largest)
