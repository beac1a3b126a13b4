"""Memory that the process does not use goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.layout import PAGE


def give_back(array: npt.NDArray[np.generic]) -> None:
    """Gives the whole pages within a contiguous array to the system; what they held is lost, and reads as zeros.

    The memory is numpy's own, not shared or a file's. The pages are taken again when they are written. Raises
    OSError where the system refuses.
    """
    start = -(-array.ctypes.data // PAGE) * PAGE
    nbytes = (array.ctypes.data + array.nbytes) // PAGE * PAGE - start
    if nbytes > 0 and _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")


LARGE = 1 << 20
"""Bytes of an array from which on it has pages of its own, which go back when it does."""


def keep_large_apart() -> None:
    """Keeps large arrays out of the C library's heap, which moves that bound up on its own, and leaves gaps there."""
    mmap_threshold = -3
    if hasattr(_libc(), "mallopt"):  # another C library: more memory, not wrong
        _libc().mallopt(mmap_threshold, LARGE)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
