"""Opens onnxruntime graphs, for the engine and for the packer, which runs sample text through some of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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


class Threads(NamedTuple):
    """How the graphs of this process are computed."""

    number: int
    shared: bool  # one pool for all graphs, whose idle threads spin; else each graph has threads, which sleep


def start_pool(threads: int, shared: bool = True) -> None:
    """Says how many threads compute, and makes one arena for all graphs of this process. Only the first call counts.

    Args:
        threads: that compute together.
        shared: they are a pool of all graphs, and spin while they wait, which is fastest if nothing else has to be
            done. Without it they sleep: threads that spin would take a processor from those that read the card and
            transpose what they read.
    """
    if _made:
        return
    if shared:
        ort.set_global_thread_pool_sizes(threads, 1)
    ort.set_default_logger_severity(3)
    ort.create_and_register_allocator(
        ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT),
        ort.OrtArenaCfg(_ARENA),
    )
    _made.append(Threads(threads, shared))


_ARENA = {
    "arena_extend_strategy": 1,  # by what is asked for, not by powers of two
    "initial_chunk_size_bytes": 1 << 20,
    "max_dead_bytes_per_chunk": 1 << 20,
}
"""The arena for the temporaries of all graphs. On the C library's heap they left gaps of up to 40 MiB, which differed
from start to start."""

_made: list[Threads] = []


def open_session(
    graph: bytes, initialisers: Mapping[str, npt.NDArray[Any]] | None = None,
    in_place: Collection[str] = (), unread: Collection[str] = (), together: bool = False,
) -> ort.InferenceSession:  # fmt: skip
    """A session of a serialised graph. Call `start_pool` first. Raises DataError if it cannot be loaded.

    On Arm it leaves out KleidiAI. Its products round a whole row of inputs to 8 bits in one range, and not blocks of
    32, which lost 30 times as much (tests/lab/RESULTS.md). It also crashed if a row's last block was not whole.

    Args:
        graph: a ModelProto.
        initialisers: the graph's external constants, by name.
        in_place: the names of those that onnxruntime need not copy. They are contiguous, and stay as they are.
        unread: of these, the names of those that it does not read any more once the session is open.
        together: all threads compute it, though it has no constants.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    _give_threads(options, _made[0].number if together or initialisers else 1)
    options.enable_mem_pattern = False
    values: dict[str, ort.OrtValue] = {}
    if initialisers:
        values = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in initialisers.items()}
        for name in in_place:
            options.add_initializer(name, values[name])
        copied = [name for name in values if name not in in_place]
        options.add_external_initializers(copied, [values[name] for name in copied])
        # repacking them would leave room for a second copy in the arena
        options.enable_cpu_mem_arena = False
    else:
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except BROKEN as error:
        raise DataError(
            f"a graph of the bundle cannot be loaded ({str(error).splitlines()[0]}); pack it again"
        ) from error
    # onnxruntime reads them while it runs, and does not hold them
    session.kept = [values[name] for name in in_place if name not in unread]
    return session


def in_arena(session: ort.InferenceSession) -> bool:
    """Whether the temporaries of a session are in the arena, so that a run can have it give memory back."""
    return bool(session.get_session_options().enable_cpu_mem_arena)


def _give_threads(options: ort.SessionOptions, count: int) -> None:
    if _made[0].shared:
        options.use_per_session_threads = False
        return
    options.intra_op_num_threads = count
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
