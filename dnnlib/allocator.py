"""The memory allocator of the C library."""

from __future__ import annotations

import ctypes
import sys

# glibc's names for mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def tune_allocator() -> None:
    """Let glibc keep big buffers for the next step; elsewhere, do nothing.

    By default glibc maps every buffer above 32 MiB anew and gives it back when it is freed, as it gives back the end of
    its heap, so that each step of a training on the CPU, and each image that is decoded, pays for the page faults of
    all its buffers again. Memory in use grows to its peak and stays there.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has no such function
        return
    largest = 2**31 - 1  # mallopt takes an int
    if mallopt(M_MMAP_THRESHOLD, largest) != 1:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the limit that glibc documents
    mallopt(M_TRIM_THRESHOLD, largest)
