"""Work that is done while something else is waited for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """Calls a function in a thread while a `with` block runs. The block ends when both have ended, however it ends.

    The function's own error is raised at the end of a block that raises none.
    """

    result: T
    """What the function returned, once the block has ended."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function

    def __enter__(self) -> Beside[T]:
        self._pool = ThreadPoolExecutor(1, "beside")
        try:
            self._future: Future[T] = self._pool.submit(self._function)
        except BaseException:  # Ctrl-C, when the work may have begun
            self._pool.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupt: KeyboardInterrupt | None = None
        while not self._future.done():
            try:
                wait([self._future])
            except KeyboardInterrupt as again:
                # what it works on may not be touched before it has ended
                interrupt = again
        self._pool.shutdown()
        if interrupt:
            raise interrupt
        if error is None:
            self.result = self._future.result()
