"""The HTTP API: what OpenAI's clients expect, and what the kiosk and the command line need beside it.

Requests are a stranger's: bounded in what they hold and in time, refused in the API's own error shape. Answers are
sent in pieces, each when the client has read the one before.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from flashd.daemon.events import Events
from flashd.daemon.http.admission import MAX_BODY, MOST_SCORED, SMALL_BODY, Admission
from flashd.daemon.http.heads import Heads, WithoutBody
from flashd.daemon.http.pieces import in_pieces
from flashd.daemon.http.ways_in import Network, WaysIn
from flashd.daemon.job import Event, Job, Request
from flashd.daemon.jobs import Jobs
from flashd.daemon.openai.answers import Answers, Growing, leave
from flashd.daemon.openai.bodies import Asked, Chat, Completion
from flashd.daemon.openai.forms import ChatForm, Form, TextForm
from flashd.daemon.openai.known import read
from flashd.daemon.openai.refusals import explained, refusal, refusal_of
from flashd.errors import NOT_JSON, Busy, FlashdError, NoRoom, PromptTooLong, UsageError

BODY_SECONDS, BODY_PACE = 10.0, 32 << 10
"""How long a client may take to send a body: so many seconds, and one more for so many bytes that came. A busy board
reads slowly what was sent at once."""

ROOM_SECONDS = 0.2
"""After which a request that the queue has no room for looks again."""

MOST_HEADS = 100
"""Jobs of one page of a list."""

LATEST = 10**18 - 1
"""No job has a higher number."""

SESSIONS_HIDDEN = "sessions are for the socket alone, since whoever names one can ask for what was said in it"

B = TypeVar("B", bound=Chat | Completion)


class Api:
    """Routes over a queue of jobs.

    Args:
        jobs: the queue.
        model: the model's name, as /v1/models gives it.
        status: what /api/status gives.
        trigger: starts the trigger of a name; raises KeyError.
        metrics: the Prometheus text of /metrics.
        fitting: one of so many requests of a client without what would not fit; raises UsageError if the rest does
            not fit either.
    """

    def __init__(
        self, jobs: Jobs, model: str, status: Callable[[], msgspec.Struct], trigger: Callable[[str], Job],
        metrics: Callable[[], bytes], fitting: Callable[[Request, int], Request],
    ) -> None:  # fmt: skip
        self._jobs, self._model, self._status, self._trigger, self._metrics = jobs, model, status, trigger, metrics
        self._fitting = fitting
        self._large, self._accepting = asyncio.Lock(), asyncio.Lock()  # one at a time, the first one first
        self._scored: WeakSet[Events[Event]] = WeakSet()  # those of requests that ask for logprobs

    def application(
        self, more: list[BaseRoute], loopback_jobs: bool = False, network: Network | None = None
    ) -> Starlette:
        asked = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]
        others = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/api/status", self._show_status),
            Route("/api/jobs", self._recent),
            Route("/api/jobs/{number}", self._one, methods=["GET"]),
            Route("/api/jobs/{number}", self._cancel, methods=["DELETE"]),
            Route("/api/triggers/{name:str}", self._start, methods=["POST"]),
            *more,
        ]
        for each in others:
            if isinstance(each, Route):
                each.app = WithoutBody(each.app)
        return Starlette(
            routes=[*asked, *others],
            exception_handlers={FlashdError: _refused, ClientDisconnect: _gone, 404: _no_such, 405: _no_such},
            middleware=[
                Middleware(Heads),
                Middleware(WaysIn, jobs=loopback_jobs, network=network),
                Middleware(Admission, asking=self._jobs.most_of_clients),
            ],
        )  # fmt: skip

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._respond(http, Chat, ChatForm())

    async def _completion(self, http: HttpRequest) -> Response:
        return await self._respond(http, Completion, TextForm())

    async def _respond(self, http: HttpRequest, kind: type[Chat | Completion], form: Form) -> Response:
        events = Events[Event]()
        async with self._large if _length(http) > SMALL_BODY else nullcontext():
            asked = (await _decoded(http, kind)).asked()
            if asked.session is not None and (http.scope.get("server") or (None, None))[1] is not None:
                return refusal(403, SESSIONS_HIDDEN, "session")
            try:
                growing = await self._accepted(http, asked, events)
            except PromptTooLong as error:
                return refusal(400, str(error), form.prompt, "context_length_exceeded")
        answers = Answers(self._jobs, self._model, form, asked, growing, events)
        return answers.pieces() if asked.stream else await answers.whole(http)

    async def _accepted(self, http: HttpRequest, asked: Asked, events: Events[Event]) -> list[Growing]:
        """The jobs of a request, when the queue has room for all of them; the first request comes first.

        Raises Busy, UsageError; ClientDisconnect if the client went away before there was room.
        """
        async with self._accepting:
            requests = await asyncio.to_thread(self._fitted, asked)
            while True:
                try:
                    return await asyncio.to_thread(self._accept, requests, events)
                except NoRoom:
                    if await http.is_disconnected():
                        raise ClientDisconnect from None
                    await asyncio.sleep(ROOM_SECONDS)

    def _fitted(self, asked: Asked) -> list[Request]:
        """Its requests, those of a session behind what was said in it, without what would not fit."""
        requests = asked.requests
        if asked.session is not None:
            requests = tuple(self._jobs.continued(each, asked.session, asked.new_session) for each in requests)
        return [self._fitting(request, len(requests)) for request in requests]

    def _accept(self, requests: list[Request], events: Events[Event]) -> list[Growing]:
        """The jobs of a request: all of them or none. Raises Busy, UsageError."""
        self._jobs.check_room(requests)
        if requests[0].logprobs is not None:
            if len(self._scored) >= MOST_SCORED:
                raise Busy(f"{MOST_SCORED} requests with logprobs are answered already; try again later")
            self._scored.add(events)
        growing: list[Growing] = []
        try:
            for request in requests:
                growing.append(Growing(*self._jobs.ask(request, events.put)))
        except BaseException:
            leave(self._jobs, growing)
            raise
        return growing

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name == self._model:
            return JSONResponse(self._described())
        return refusal(404, f"no model is called {name!r}", "model", "model_not_found")

    def _described(self) -> dict[str, str | int]:
        return {"id": self._model, "object": "model", "created": 0, "owned_by": "flashd"}

    async def _health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, _: HttpRequest) -> Response:
        return PlainTextResponse(self._metrics(), media_type="text/plain; version=0.0.4")

    async def _show_status(self, _: HttpRequest) -> Response:
        return _struct_response(await asyncio.to_thread(self._status))

    async def _recent(self, http: HttpRequest) -> Response:
        most, before = (
            _number(http.query_params.get("most", "20")),
            _number(http.query_params.get("before", str(LATEST))),
        )
        heads = await asyncio.to_thread(self._jobs.heads, min(most, MOST_HEADS), before)
        return in_pieces(msgspec.json.encode(heads))

    async def _one(self, http: HttpRequest) -> Response:
        number = _number(http.path_params["number"])
        job = await asyncio.to_thread(self._jobs.get, number)
        return in_pieces(msgspec.json.encode(job)) if job else refusal(404, f"no job {number}")

    async def _cancel(self, http: HttpRequest) -> Response:
        cancelled = await asyncio.to_thread(self._jobs.cancel, _number(http.path_params["number"]))
        return JSONResponse({"cancelled": cancelled})

    async def _start(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        try:
            job = await asyncio.to_thread(self._trigger, name)
        except KeyError:
            return refusal(404, f"no trigger is called {name!r}")
        return JSONResponse({"job": job.id})


def _length(http: HttpRequest) -> int:
    """Bytes of the body; the most that one may have if its client does not say. Raises UsageError."""
    length = http.headers.get("content-length", str(MAX_BODY))
    if not re.fullmatch("[0-9]{1,18}", length) or int(length) > MAX_BODY:
        raise UsageError(f"a body of more than {MAX_BODY} bytes")
    return int(length)


async def _decoded(http: HttpRequest, kind: type[B]) -> B:
    data, until = bytearray(), asyncio.get_running_loop().time() + BODY_SECONDS
    try:
        async with asyncio.timeout_at(until) as patience:
            async for chunk in http.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise UsageError(f"a body of more than {MAX_BODY} bytes")
                patience.reschedule(until + len(data) / BODY_PACE)
    except TimeoutError as error:
        seconds = BODY_SECONDS + len(data) / BODY_PACE
        raise UsageError(f"the body did not come within {seconds:.1f} s") from error
    try:
        return read(data, kind)
    except NOT_JSON as error:
        raise explained(error) from error


def _number(text: str) -> int:
    """Raises UsageError if it is none."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UsageError(f"{text[:40]!r} is not a number")
    return int(text)


async def _refused(_: HttpRequest, error: Exception) -> Response:
    return refusal_of(error)


async def _gone(_: HttpRequest, __: Exception) -> Response:
    """For whoever went away before the whole request had come: nobody reads it."""
    return Response(status_code=400)


async def _no_such(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return refusal(status, f"{http.method} {http.scope['path']} is not served here")


def _struct_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
