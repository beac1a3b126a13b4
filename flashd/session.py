"""Opens onnxruntime graphs, for the engine and for the packer, which runs sample text through some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from flashd.errors import DataError

BROKEN: tuple[type[Exception], ...] = (
    UnicodeDecodeError, RuntimeError,
    *(e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)),
)  # fmt: skip
"""What onnxruntime raises; its errors have no base of their own, and may quote what is no text."""


def start_pool(threads: int) -> None:
    """One pool of `threads` for all graphs of this process: a session each of its own would oversubscribe.

    The pool stays as the first call makes it.
    """
    if not _pool_made:
        ort.set_global_thread_pool_sizes(threads, 1)
        ort.set_default_logger_severity(3)
        _pool_made.append(threads)


_pool_made: list[int] = []


def open_session(graph: bytes, initialisers: Mapping[str, npt.NDArray[Any]] | None = None) -> ort.InferenceSession:
    """A session of a serialised graph. Call `start_pool` first. Raises DataError where the graph is none."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    # An arena keeps the largest of everything it ever held; the budget is kept by plain allocations.
    options.enable_cpu_mem_arena = False
    if initialisers:
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for v in initialisers.values()]
        options.add_external_initializers(list(initialisers), values)
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except BROKEN as error:
        raise DataError(
            f"a graph of the bundle cannot be loaded ({str(error).splitlines()[0]}); pack it again"
        ) from error
