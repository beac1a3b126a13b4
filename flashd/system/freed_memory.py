"""Memory that the process does not use goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE = mmap.PAGESIZE
"""The system's: 16 KiB on a Raspberry Pi 5."""


def give_back(array: npt.NDArray[np.generic]) -> None:
    """Gives the whole pages within a contiguous array to the system; what they held is lost, and reads as zeros.

    Up to two pages' worth at its ends stays.

    The memory is numpy's own, not shared or a file's. The pages are taken again when they are written. Raises
    OSError where the system refuses.
    """
    start = -(-array.ctypes.data // PAGE) * PAGE
    nbytes = (array.ctypes.data + array.nbytes) // PAGE * PAGE - start
    if nbytes > 0 and _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")


LARGE = 1 << 20
"""Bytes of an array from which on it has pages of its own, which go back when it does."""


def use_small_pages() -> None:
    """Makes memory cost what is touched of it, and no more.

    Large arrays stay out of the C library's heap, where they leave gaps. No page is a huge one: numpy asks for those,
    and a token written to the KV cache would hold 2 MiB of it.
    """
    mmap_threshold, set_thp_disable = -3, 41
    for name, arguments in (("mallopt", (mmap_threshold, LARGE)), ("prctl", (set_thp_disable, 1, 0, 0, 0))):
        if hasattr(_libc(), name):  # another C library: more memory, not wrong
            getattr(_libc(), name)(*arguments)


def give_back_freed_memory() -> None:
    """Returns the C library's free pages to the kernel.

    Loading a vocabulary of 151,000 tokens leaves 98 MiB resident, of which 51 are free; SmolLM2's constant graphs,
    while they were made, some 80 MiB.
    """
    if hasattr(_libc(), "malloc_trim"):  # not in another C library
        _libc().malloc_trim(0)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
