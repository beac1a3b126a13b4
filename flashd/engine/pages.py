"""What the process holds of memory that it does not use: given back to the system, or kept for the next use."""

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


LARGE = 4 << 20


def keep_freed() -> None:
    """Lets the allocator use again what was freed, rather than return it to the system each time.

    Without this every run of a graph pays a page fault for each 4 KiB of its temporaries. What is larger than those,
    logits and attention's scores, comes once a pass, and would leave gaps of 20 MiB between what is in use.
    """
    trim_threshold, mmap_threshold = -1, -3
    if hasattr(_libc(), "mallopt"):  # another C library: slower, not wrong
        _libc().mallopt(mmap_threshold, LARGE)
        _libc().mallopt(trim_threshold, 64 << 20)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
