"""Work in a thread while the caller waits for something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Calls a function in a thread while a `with` block runs. The block is left only when both have ended.

    If the block raises no error, the function's error is raised at its end.
    """

    result: T
    """What the function returned, once the block has ended."""
    waited = 0.0
    """The seconds that the end of the block waited for it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function

    def __enter__(self) -> Background[T]:
        self._pool = ThreadPoolExecutor(1, "background")
        try:
            self._future: Future[T] = self._pool.submit(self._function)
        except BaseException:  # Ctrl-C: the work may have begun
            self._pool.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupt: KeyboardInterrupt | None = None
        ended = time.perf_counter()
        while not self._future.done():
            try:
                wait([self._future])
            except KeyboardInterrupt as again:
                # nobody else may touch what the function works on before it has ended
                interrupt = again
        self._pool.shutdown()
        self.waited = time.perf_counter() - ended
        if interrupt:
            raise interrupt
        if error is None:
            self.result = self._future.result()
