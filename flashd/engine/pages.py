"""Memory that goes back to the system while the array over it stays."""

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


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
