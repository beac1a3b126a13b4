"""A talk that has outgrown the context: its oldest messages are left out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

from flashd.engine.decoding.text import Message
from flashd.errors import PromptTooLong

FORGET = 8
"""A talk is shortened by this many messages at once. The next questions then begin alike: their KV cache is kept."""


def shortened(
    messages: Sequence[Message], encode: Callable[[Sequence[Message], int], list[int]], room: int, limit: int
) -> tuple[int, list[int]]:
    """How many of the oldest messages are left out, and the tokens of the others.

    Messages go if they leave no room for an answer. The system prompt and the last message stay. If the last ones are
    of tools, all from the last question on stay. A tool's message goes with the call that it belongs to.

    Args:
        messages: the talk.
        encode: makes the tokens of messages; may raise PromptTooLong if they are more than the number it is given.
        room: the most tokens that a prompt may have.
        limit: the most tokens that the answer may have.

    Raises PromptTooLong if the last message alone is too long.
    """
    first, wanted = (1 if messages[0].role == "system" else 0), room + 1
    last = len(messages) - 1
    while messages[last].role == "tool" or messages[last].calls:
        last -= 1
    wanted -= min(limit, wanted // 2)

    def left_out(times: int) -> int:
        left = min(times * FORGET, last - first)
        while messages[first + left].role == "tool":
            left += 1
        return left

    @cache
    def tokens(times: int) -> list[int] | None:
        """Those of FORGET messages less, so many times. None if they do not fit."""
        try:
            found = encode([*messages[:first], *messages[first + left_out(times) :]], wanted)
        except PromptTooLong:
            return None
        return found if len(found) <= wanted else None

    if (whole := tokens(0)) is not None:
        return 0, whole
    most = -(-(last - first) // FORGET)
    times = bisect_left(range(most), True, lo=1, key=lambda times: tokens(times) is not None)
    if (found := tokens(times)) is not None:
        return left_out(times), found
    # the last message alone may leave less room than was asked for
    found = encode([*messages[:first], *messages[last:]], room)
    if len(found) > room:
        raise PromptTooLong(len(found), room)
    return left_out(times), found
