"""A talk becomes tokens: with the configured system prompt, and without what is too old to fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache

from msgspec.structs import replace

from flashd.config.settings import Answering
from flashd.daemon.job import Request
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Prompts
from flashd.errors import PromptTooLong

FORGET = 8
"""Messages that a long talk is shortened by: so many, that what is left begins alike for some questions and its
KV cache is kept."""


class Talks:
    """Makes prompts of requests. For any thread.

    Args:
        prompts: messages become tokens.
        room: tokens that a prompt may have.
        answering: how answers are drawn at the moment.
    """

    def __init__(self, prompts: Prompts, room: int, answering: Callable[[], Answering]) -> None:
        self._prompts, self.room, self._answering = prompts, room, answering

    def limit(self, request: Request) -> int:
        """Tokens that an answer may have."""
        return request.max_tokens or self._answering().max_tokens

    def fitting(self, request: Request) -> Request:
        """The request without the messages that are to be forgotten. Raises PromptTooLong, DataError."""
        left_out, tokens = self._fit(request, lambda: None)  # only the worker's own thread feeds the watchdog
        if len(tokens) > self.room:
            raise PromptTooLong(len(tokens), self.room)
        if not left_out:
            return request
        first = 1 if request.turns[0].role == "system" else 0
        return replace(request, turns=request.turns[:first] + request.turns[first + left_out :])

    def tokens(self, request: Request, alive: Callable[[], None]) -> list[int]:
        """The prompt's tokens. `alive` is called now and then. Raises PromptTooLong, DataError."""
        return self._fit(request, alive)[1]

    def _fit(self, request: Request, alive: Callable[[], None]) -> tuple[int, list[int]]:
        """How many of the oldest messages are left out, and the tokens of the others."""
        if request.plain:
            return 0, self._prompts.plain("".join(turn.content for turn in request.turns), self.room)
        system = self._answering().system
        messages = [Message(turn.role, turn.content) for turn in request.turns]
        if system and all(message.role != "system" for message in messages):
            messages.insert(0, Message("system", system))
        return self._shortened(messages, request, alive) if request.forget else (0, self._tokens(messages))

    def _shortened(
        self, messages: list[Message], request: Request, alive: Callable[[], None]
    ) -> tuple[int, list[int]]:
        """A talk without its oldest messages if they leave no room for an answer: how many, and the tokens left."""
        first, room = (1 if messages[0].role == "system" else 0), self.room + 1
        room -= min(self.limit(request), room // 2)

        def left_out(times: int) -> int:
            return min(times * FORGET, len(messages) - 1 - first)  # the last one always stays

        @cache
        def tokens(times: int) -> list[int] | None:
            """Those of FORGET messages less, so many times. None if they do not fit."""
            alive()
            try:
                found = self._prompts.tokens(messages[:first] + messages[first + left_out(times) :], room)
            except PromptTooLong:
                return None
            return found if len(found) <= room else None

        if (whole := tokens(0)) is not None:
            return 0, whole
        most = -(-(len(messages) - 1 - first) // FORGET)
        times = bisect_left(range(most), True, lo=1, key=lambda times: tokens(times) is not None)
        # the last message alone may leave less room than was asked for
        return left_out(times), tokens(times) or self._tokens([*messages[:first], messages[-1]])

    def _tokens(self, messages: list[Message]) -> list[int]:
        return self._prompts.tokens(messages, self.room)
