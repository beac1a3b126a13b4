"""A talk becomes tokens: with the configured system prompt, and without what is too old to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from flashd.config.settings import Answering
from flashd.daemon.job import Request
from flashd.engine.decoding import decisions
from flashd.engine.decoding.forgetting import shortened
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Prompts
from flashd.errors import BadField, PromptTooLong, UsageError


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

    def _thinks(self, request: Request) -> bool:
        """Whether the model may think first. An answer by choices, a schema or tools is one from its first token."""
        if request.choose or request.json_schema is not None or request.calling is not None:
            return False
        return self._answering().think if request.think is None else request.think

    def fitting(self, request: Request) -> Request:
        """The request without the messages that are to be forgotten. Raises PromptTooLong, DataError."""
        left_out, tokens = self.tokens(request, lambda: None)  # only the worker's own thread feeds the watchdog
        if len(tokens) > self.room:
            raise PromptTooLong(len(tokens), self.room)
        if request.choose:
            self._check_choices(request.choose, self.room - len(tokens))
        if not left_out:
            return request
        first = 1 if request.turns[0].role == "system" else 0
        return replace(request, turns=request.turns[:first] + request.turns[first + left_out :], forgotten=left_out)

    def _check_choices(self, choices: Sequence[str], room: int) -> None:
        """Raises BadField if these texts cannot be chosen from, or if one of them does not fit behind the prompt."""
        try:
            tokens = self._prompts.choices(choices, room)
            decisions.check(tokens)
            longest = max(map(len, tokens.values()))
        except PromptTooLong:
            longest = room + 1
        except UsageError as error:
            raise BadField("choose", str(error)) from error
        if longest > room:
            raise BadField("choose", f"a choice is longer than the {room} tokens that the context has room for")

    def tokens(self, request: Request, alive: Callable[[], None]) -> tuple[int, list[int]]:
        """How many of the oldest messages are left out, and the tokens of the others.

        `alive` is called now and then. Raises PromptTooLong, DataError.
        """
        if request.plain:
            return 0, self._prompts.plain("".join(turn.content for turn in request.turns), self.room)
        system, think = self._answering().system, self._thinks(request)
        messages = [Message(t.role, t.content, t.calls, t.call, t.name) for t in request.turns]
        if system and all(message.role != "system" for message in messages):
            messages.insert(0, Message("system", system))
        if not request.forget:
            return 0, self._prompts.tokens(messages, self.room, request.calling, think)

        def encode(some: Sequence[Message], room: int) -> list[int]:
            alive()
            return self._prompts.tokens(some, room, request.calling, think)

        return shortened(messages, encode, self.room, self.limit(request))
