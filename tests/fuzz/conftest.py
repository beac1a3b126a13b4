"""How many tries, and a watch on what they leave behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from flashd.errors import FlashdError

TRIES = int(os.environ.get("FLASHD_FUZZ", "0"))
"""Tries of each kind, for a night: FLASHD_FUZZ=10000. By default as many as cost a second or two."""


def tries(number: int) -> settings:
    return settings(
        max_examples=TRIES or number, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


def one_line(error: FlashdError) -> None:
    assert str(error) and len(str(error).splitlines()) == 1, repr(str(error))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A test that leaves a descriptor open or a thread running fails."""
    gc.collect()
    fds, threads = descriptors(), set(threading.enumerate())
    yield
    gc.collect()
    left = [t.name for t in set(threading.enumerate()) - threads]
    assert not left, f"threads left behind: {left}"
    assert descriptors() <= fds, f"{descriptors() - fds} descriptors left behind"
