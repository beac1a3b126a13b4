"""Who has said the PIN of the page on the local network.

Five wrong PINs may be tried at once, and then one a minute, whoever tries: an address of a local network is soon
changed, so all are counted together. At that rate six digits are found after a year, on the average.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from hashlib import sha256

MOST_WRONG, WRONG_EVERY = 5, 60.0
"""Wrong PINs at once, and seconds after which one more may be tried."""

MOST_SIGNED_IN = 64
"""Browsers that are signed in at once. One more takes the place of the one that came first."""

SIGNED_IN_SECONDS = 30 * 86400
"""How long a browser stays signed in. A restart of the daemon ends it too."""


class SignedIn:
    """The PIN, the tries, and the tokens of those who knew it. For one thread.

    Args:
        code: the PIN.
        clock: seconds that do not jump.
    """

    def __init__(self, code: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._code, self._clock = _digest(code), clock
        self._tries, self._counted_at = float(MOST_WRONG), clock()
        self._until: dict[bytes, float] = {}  # a token's digest -> when it ends, the oldest first

    def wait(self) -> float:
        """Seconds until a PIN may be tried."""
        now = self._clock()
        self._tries = min(float(MOST_WRONG), self._tries + (now - self._counted_at) / WRONG_EVERY)
        self._counted_at = now
        return max(0.0, (1 - self._tries) * WRONG_EVERY)

    def enter(self, code: str) -> str | None:
        """A token for who knows the PIN; None if it is wrong or if `wait` is not over."""
        if self.wait() > 0:
            return None
        if not hmac.compare_digest(_digest(code), self._code):
            self._tries -= 1
            return None
        while len(self._until) >= MOST_SIGNED_IN:
            del self._until[next(iter(self._until))]
        token = secrets.token_urlsafe(32)
        self._until[_digest(token)] = self._clock() + SIGNED_IN_SECONDS
        return token

    def knows(self, token: str) -> bool:
        """Whether a token was given out, and is still good."""
        until = self._until.get(_digest(token))  # digests, so that how long this takes tells nothing of a token
        return until is not None and self._clock() < until


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()
