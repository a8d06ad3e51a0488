"""What the C library does with memory that is freed, on which the times of large fresh tensors depend."""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h.
_TRIM_THRESHOLD, _LARGEST_NUMBER_OF_MAPPINGS = -1, -4
_NEVER = -1

_is_kept = False


def keep_freed_memory() -> None:
    """Have freed memory stay with the process, as jemalloc and tcmalloc keep it.

    glibc gives large blocks back to the system, which then fills each of their pages with zeros anew: in a training
    step of a small convolutional net that may take a third of the time, and whether it happens depends on the order in
    which tensors were freed before. Every provider gains alike.

    Raises:
        RuntimeError: where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        raise RuntimeError("only glibc can be told to keep freed memory, and this system has another C library")
    library = ctypes.CDLL(None)
    taken = [library.mallopt(_TRIM_THRESHOLD, _NEVER), library.mallopt(_LARGEST_NUMBER_OF_MAPPINGS, 0)]
    if not all(taken):
        raise RuntimeError("glibc does not take the settings by which it would keep freed memory")
    global _is_kept
    _is_kept = True


def freed_memory() -> str:
    """``"kept"`` or ``"given back"``: what becomes of it in this process."""
    return "kept" if _is_kept else "given back"
