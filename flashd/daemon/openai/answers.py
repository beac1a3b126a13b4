"""The answers to one request as they come, sent whole or in pieces."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from flashd.daemon.events import Events
from flashd.daemon.http.pieces import in_pieces, lines_in_pieces
from flashd.daemon.job import Event, Job, Scored, State
from flashd.daemon.jobs import Jobs
from flashd.daemon.openai.bodies import Asked
from flashd.daemon.openai.forms import Form, Piece, more, part_of_call, reason, usage, whole_call
from flashd.daemon.openai.refusals import body_of, refusal
from flashd.daemon.watch import Watch
from flashd.engine.decoding.tools.calls import Call, grown

OBJECT = "flashd"

QUIET_SECONDS = 10.0
"""After which a client that waits is told once more what it waits for."""


@dataclass
class Growing:
    """One answer as it comes."""

    job: Job
    watch: Watch
    text: str = ""
    thoughts: str = ""
    sent_thoughts: int = 0  # characters of them
    scored: list[Scored] = field(default_factory=list)
    sent: int = 0  # characters of it
    calls: tuple[Call, ...] = ()
    sent_calls: dict[int, int] = field(default_factory=dict)  # characters of the arguments of each call
    sent_scored: int = 0
    end: Job | None = None

    def take(self, event: Event) -> None:
        if event.kind == "restarted":
            self.text, self.thoughts, self.scored, self.calls = "", "", [], ()
        if event.kind == "thought":
            self.thoughts += event.text
        elif event.kind == "text":
            self.text += event.text
        self.scored += event.scored
        if event.call is not None:
            self.calls = grown(self.calls, event.call, self.job.id)
        self.end = event.end or self.end

    def unsent_calls(self) -> list[dict[str, Any]]:
        """What of the calls was not sent yet."""
        parts = []
        for i, call in enumerate(self.calls):
            sent = self.sent_calls.get(i, -1)
            if len(call.arguments) > sent:
                parts.append(part_of_call(i, call, sent))
                self.sent_calls[i] = len(call.arguments)
        return parts


class Answers:
    """The answers to one request. `whole` or `pieces` sends them."""

    def __init__(
        self, jobs: Jobs, model: str, form: Form, asked: Asked, growing: Sequence[Growing], events: Events[Event]
    ) -> None:
        self._jobs, self._form, self._asked, self._growing, self._events = jobs, form, asked, growing, events
        first = growing[0].job
        self._head = {"id": f"flashd-{first.id}", "created": int(first.created), "model": model}
        self._headers = {"X-Job": str(first.id)}
        self._waits = "waiting"  # for what, in words

    async def whole(self, http: HttpRequest) -> Response:
        """Sends all answers when the last has come. They are cancelled if the client goes away before."""
        try:
            await self._all_ended(http)
        finally:
            self._leave()
        for each in self._growing:
            if each.end is None:
                return refusal(503, _stopping(each.job))
            if each.end.state is not State.DONE:
                return refusal(_status(each.end), each.end.result.finish, each.end.result.param)
        ends = self._ends
        choices = [
            self._form.choice(self._piece(i, each, end))
            for i, (each, end) in enumerate(zip(self._growing, ends, strict=True))
        ]
        body = {"object": self._form.whole, "choices": choices, "usage": usage(ends, self._asked.of_each)}
        return in_pieces(_json(self._head | body | {OBJECT: more(ends)}).encode(), self._headers)

    def _piece(self, index: int, each: Growing, end: Job) -> Piece:
        """All of an answer."""
        return Piece(
            index, self._echo(each) + end.result.text, end.result.thoughts,
            [whole_call(call) for call in end.result.calls], self._scored(each, each.scored), reason=reason(end),
        )  # fmt: skip

    def pieces(self) -> Response:
        """Sends each answer piece by piece."""
        lines = lines_in_pieces(self._stream())
        return StreamingResponse(lines, media_type="text/event-stream", headers=self._headers)

    async def _all_ended(self, http: HttpRequest) -> None:
        """Waits until all answers have ended or one has failed, or the daemon stops."""
        looked = time.monotonic()
        while not self._over and not self._events.over:
            event = await self._events.next(1.0)
            if event is not None:
                self._taken(event)
            if time.monotonic() - looked >= 1.0:
                looked = time.monotonic()
                if await http.is_disconnected():
                    for each in self._growing:
                        await asyncio.to_thread(self._jobs.cancel, each.job.id)

    async def _stream(self) -> AsyncGenerator[str]:
        try:
            for i, each in enumerate(self._growing):
                yield self._line([self._form.chunk(Piece(i, self._echo(each), first=True))])
            while not self._over and not self._events.over:
                event = await self._events.next(QUIET_SECONDS)
                for line in self._lines(event) if event else [self._comment()]:
                    yield line
            for line in self._last_lines():
                yield line
        finally:
            self._leave()

    def _lines(self, event: Event) -> Iterator[str]:
        """What a client is told of an event. To a client that waits for text it is a comment, which it ignores."""
        i, each = self._taken(event)
        # after a restart the same text comes anew: only what was not sent yet is sent
        if len(each.thoughts) > each.sent_thoughts:
            yield self._line([self._form.chunk(Piece(i, thoughts=each.thoughts[each.sent_thoughts :]))])
            each.sent_thoughts = len(each.thoughts)
        elif len(each.text) > each.sent:
            scored = self._scored(each, each.scored[each.sent_scored :])
            chunk = self._form.chunk(Piece(i, each.text[each.sent :], scored=scored, at=each.sent))
            each.sent, each.sent_scored = len(each.text), max(each.sent_scored, len(each.scored))
            yield self._line([chunk])
        elif calls := each.unsent_calls():
            yield self._line([self._form.chunk(Piece(i, calls=calls))])
        elif event.kind == "did":
            yield self._line([], {"did": event.text})
        elif event.kind in ("queued", "moved"):
            self._waits = f"waiting, {event.position} before this" if event.position else "next"
            yield self._comment()
        elif event.kind == "progress":
            self._waits = f"thinking, layer {event.done} of {event.total}, {event.card_bytes >> 20} MiB read"
            yield self._comment()
        if each.end is not None and each.end.state is State.DONE:
            last = self._form.chunk(Piece(i, reason=reason(each.end)))
            yield self._line([last], more([each.end]))

    def _comment(self) -> str:
        return f": {self._waits}\n\n"

    def _last_lines(self) -> Iterator[str]:
        failed = next((x.end for x in self._growing if x.end and x.end.state is not State.DONE), None)
        if failed is not None:
            yield _event(body_of(_status(failed), failed.result.finish, failed.result.param))
        elif not self._over:
            yield _event(body_of(503, _stopping(self._growing[0].job)))
        elif self._asked.usage:
            yield self._line([], None, usage(self._ends, self._asked.of_each))
        yield "data: [DONE]\n\n"

    def _line(self, choices: list[dict[str, Any]], said: Any = None, cost: dict[str, Any] | None = None) -> str:
        head = self._head | {"object": self._form.piece, "choices": choices}
        if self._asked.usage:
            head["usage"] = cost
        return _event(head | ({OBJECT: said} if said is not None else {}))

    @property
    def _over(self) -> bool:
        """Whether all have ended, or one that failed, which makes the others useless."""
        ends = [each.end for each in self._growing]
        return all(ends) or any(end is not None and end.state is not State.DONE for end in ends)

    @property
    def _ends(self) -> list[Job]:
        return [each.end for each in self._growing if each.end is not None]

    def _taken(self, event: Event) -> tuple[int, Growing]:
        i = next(i for i, each in enumerate(self._growing) if each.job.id == event.job)
        self._growing[i].take(event)
        return i, self._growing[i]

    def _echo(self, each: Growing) -> str:
        return each.job.request.turns[0].content if self._asked.echo else ""

    def _scored(self, each: Growing, scored: Sequence[Scored]) -> Sequence[Scored] | None:
        return None if each.job.request.logprobs is None else scored

    def _leave(self) -> None:
        """Watches no longer. What has not ended is for nobody."""
        leave(self._jobs, self._growing)


def leave(jobs: Jobs, growing: Sequence[Growing]) -> None:
    for each in growing:
        each.watch.close()
        if each.end is None:
            # a generator that is thrown away may not wait, and this takes no time; if flashd stops, the job is kept
            jobs.cancel(each.job.id)


def _status(end: Job) -> int:
    return 400 if end.result.refused else 503 if end.state is State.EXPIRED else 500


def _stopping(job: Job) -> str:
    return f"flashd is stopping; job {job.id} is kept and answered when it runs again"


def _event(value: dict[str, Any]) -> str:
    return f"data: {_json(value)}\n\n"


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
