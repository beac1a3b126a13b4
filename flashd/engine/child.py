"""Runs what leaves memory behind in a child process that takes it away."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import TypeVar

from flashd.errors import FlashdError

Result = TypeVar("Result")


def in_child(action: Callable[[], Result]) -> Result:
    """What `action` returns, computed in a forked child. Call it before onnxruntime has started its threads.

    Raises the FlashdError that the action raised, or one that says that the child died.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        try:
            send.send((action(), None))
        except FlashdError as error:
            send.send((None, error))

    child = context.Process(target=run)
    child.start()
    send.close()
    try:
        result, error = receive.recv()
    except EOFError:
        child.join()
        raise FlashdError(f"a child process died (exit {child.exitcode}); is there enough memory?") from None
    finally:
        receive.close()
    child.join()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
