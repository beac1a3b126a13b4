"""Waits for what another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)
