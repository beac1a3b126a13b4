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
"""What onnxruntime raises. Its errors have no base class of their own, and may quote bytes that are not text."""


def start_pool(threads: int) -> None:
    """Makes one pool of `threads` threads and one arena for all graphs of this process. Only the first call counts.

    A pool for each graph would have more threads than there are processors.
    """
    if not _pool_made:
        ort.set_global_thread_pool_sizes(threads, 1)
        ort.set_default_logger_severity(3)
        ort.create_and_register_allocator(
            ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT),
            ort.OrtArenaCfg(_ARENA),
        )
        _pool_made.append(threads)


_ARENA = {
    "arena_extend_strategy": 1,  # by what is asked for, not by powers of two
    "initial_chunk_size_bytes": 1 << 20,
    "max_dead_bytes_per_chunk": 1 << 20,
}
"""The arena for the temporaries of all graphs. On the C library's heap they left gaps of up to 40 MiB, which differed
from start to start."""

_pool_made: list[int] = []


def open_session(graph: bytes, initialisers: Mapping[str, npt.NDArray[Any]] | None = None) -> ort.InferenceSession:
    """A session of a serialised graph. Call `start_pool` first. Raises DataError if it cannot be loaded.

    `initialisers` are the graph's external constants, by name.
    """
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_mem_pattern = False
    if initialisers:
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for v in initialisers.values()]
        options.add_external_initializers(list(initialisers), values)
        # repacking them would leave room for a second copy in the arena
        options.enable_cpu_mem_arena = False
    else:
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except BROKEN as error:
        raise DataError(
            f"a graph of the bundle cannot be loaded ({str(error).splitlines()[0]}); pack it again"
        ) from error
