"""The HTTP API: what OpenAI's clients expect, and what the kiosk and the command line need beside it.

Requests are a stranger's: bounded in what they hold and in time, refused in the API's own error shape. Answers are
sent in pieces, each when the client has read the one before.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flashd.daemon.admission import MAX_BODY, SMALL_BODY, Admission
from flashd.daemon.connections import READ_BYTES
from flashd.daemon.events import Events
from flashd.daemon.job import Event, Job, Request, State
from flashd.daemon.jobs import Jobs, Sink, Watch
from flashd.daemon.openai_words import (
    Body,
    Chat,
    Completion,
    chat_answer,
    chat_chunk,
    more,
    of_chat,
    of_completion,
    reason,
    text_answer,
    text_chunk,
    usage,
)  # fmt: skip
from flashd.errors import BAD_REQUEST, NOT_JSON, Busy, FlashdError, UsageError

BODY_SECONDS = 10.0
"""How long a client may take to send a body."""

MOST_HEADS = 100
"""Jobs of one page of a list."""

LATEST = 10**18 - 1
"""No job has a higher number."""

B = TypeVar("B", bound=Body)

OBJECT = "flashd"
OTHERS = "only for this machine's own pages and programs"
JOBS_HIDDEN = "jobs are shown on the socket alone; set api: {loopback_jobs: true} to show them here"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _FromHere:
    """On loopback, refuses what a browser sends for a page of somebody else's, or by a name that leads here.

    There every user of the machine can ask, so other people's prompts are shown only if `jobs` allows it.
    """

    def __init__(self, app: ASGIApp, jobs: bool) -> None:
        self._app, self._jobs = app, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        if scope["type"] == "http" and server is not None and server[1] is not None:  # a Unix socket has no port
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            refusal = None
            try:
                if urlsplit(f"//{host}").hostname not in LOOPBACK or origin not in (None, f"http://{host}"):
                    refusal = _error(403, OTHERS)
                elif scope["path"].startswith("/api/jobs") and not self._jobs:
                    refusal = _error(403, JOBS_HIDDEN)
            except ValueError:
                refusal = _error(400, "the Host header is malformed")
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Api:
    """Routes over a queue of jobs.

    Args:
        jobs: the queue.
        model: the model's name, as /v1/models gives it.
        status: what /api/status gives.
        trigger: starts the trigger of a name; raises KeyError.
        metrics: the Prometheus text of /metrics.
        fitting: a request without what would not fit; raises UsageError if the rest does not fit either.
    """

    def __init__(
        self, jobs: Jobs, model: str, status: Callable[[], msgspec.Struct], trigger: Callable[[str], Job],
        metrics: Callable[[], bytes], fitting: Callable[[Request], Request],
    ) -> None:  # fmt: skip
        self._jobs, self._model, self._status, self._trigger, self._metrics = jobs, model, status, trigger, metrics
        self._fitting = fitting
        self._large, self._accepting = asyncio.Lock(), asyncio.Lock()  # one at a time, the first one first

    def application(self, more: list[BaseRoute], loopback_jobs: bool = False) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
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
        return Starlette(
            routes=routes,
            exception_handlers={FlashdError: _refused, ClientDisconnect: _gone, 404: _no_such, 405: _no_such},
            middleware=[
                Middleware(_FromHere, jobs=loopback_jobs),
                Middleware(Admission, asking=self._jobs.most_of_clients),
            ],
        )  # fmt: skip

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._respond(http, Chat, of_chat, chat_chunk, chat_answer)

    async def _completion(self, http: HttpRequest) -> Response:
        return await self._respond(http, Completion, of_completion, text_chunk, text_answer)

    async def _respond(
        self, http: HttpRequest, kind: type[B], asked: Callable[[B], Request],
        chunk: Callable[[str, str | None, bool], dict[str, Any]], whole: Callable[[str, str], dict[str, Any]],
    ) -> Response:  # fmt: skip
        events = Events[Event]()
        async with self._large if _length(http) > SMALL_BODY else nullcontext():
            asking = await _decoded(http, kind)
            stream = asking.stream
            async with self._accepting:
                job, watch = await asyncio.to_thread(self._accept, asked(asking), events.put)
            del asking
        head = {"id": f"flashd-{job.id}", "created": int(job.created), "model": self._model}
        if stream:
            lines = self._stream(job, watch, events, head, chunk)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"X-Job": str(job.id)})
        end = await self._end(http, job, watch, events)
        if end is None:
            return _error(503, f"flashd is stopping; job {job.id} is kept and answered when it runs again")
        if end.state is not State.DONE:
            status = 400 if end.result.refused else 503 if end.state is State.EXPIRED else 500
            return _error(status, end.result.finish)
        body = whole(end.result.text, reason(end))
        return JSONResponse(
            {
                **head, **body, "usage": usage(end),
                OBJECT: more(end),
            },
            headers={"X-Job": str(job.id)},
        )  # fmt: skip

    def _accept(self, request: Request, sink: Sink) -> tuple[Job, Watch]:
        return self._jobs.ask(self._fitting(request), sink)

    async def _end(self, http: HttpRequest, job: Job, watch: Watch, events: Events[Event]) -> Job | None:
        """The job when it has ended, None if the daemon stops before; it is cancelled if the client goes away."""
        looked = time.monotonic()
        try:
            while not events.over:
                event = await events.next(1.0)
                if event is not None and event.end is not None:
                    return event.end
                if time.monotonic() - looked >= 1.0:
                    looked = time.monotonic()
                    if await http.is_disconnected():
                        await asyncio.to_thread(self._jobs.cancel, job.id)
            return None
        finally:
            watch.close()

    async def _stream(
        self, job: Job, watch: Watch, events: Events[Event], head: dict[str, Any],
        chunk: Callable[[str, str | None, bool], dict[str, Any]],
    ) -> AsyncIterator[str]:  # fmt: skip
        end: Job | None = None
        said = 0
        try:
            yield _event(head | chunk("", None, True))
            text = ""
            while end is None and not events.over:
                event = await events.next(10.0)
                if event is None:
                    yield ": waiting\n\n"
                elif event.kind == "restarted":
                    text = ""
                elif event.kind == "text":
                    text += event.text
                    # after a restart the same text comes anew: only what was not sent yet is sent
                    if len(text) > said:
                        yield _event(head | chunk(text[said:], None, False))
                        said = len(text)
                elif event.kind in ("queued", "moved"):
                    yield f": waiting, {event.position} before this\n\n" if event.position else ": next\n\n"
                elif event.kind == "progress":
                    yield f": thinking, layer {event.done} of {event.total}, {event.card_bytes >> 20} MiB read\n\n"
                end = event.end if event else None
            if end is None:
                yield _event({"error": {"message": f"flashd is stopping; job {job.id} is kept", "type": "stopping"}})
            elif end.state is State.DONE:
                last = head | chunk("", reason(end), False) | {"usage": usage(end)}
                yield _event(last | {OBJECT: more(end)})
            else:
                kind = BAD_REQUEST if end.result.refused else str(end.state)
                yield _event({"error": {"message": end.result.finish, "type": kind}})
            yield "data: [DONE]\n\n"
        finally:
            watch.close()
            if end is None:
                # a generator that is thrown away may not wait, and this takes no time
                self._jobs.cancel(job.id)

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        return JSONResponse(self._described()) if name == self._model else _error(404, f"no model is called {name!r}")

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
        return _in_pieces(msgspec.json.encode(heads))

    async def _one(self, http: HttpRequest) -> Response:
        number = _number(http.path_params["number"])
        job = await asyncio.to_thread(self._jobs.get, number)
        return _in_pieces(msgspec.json.encode(job)) if job else _error(404, f"no job {number}")

    async def _cancel(self, http: HttpRequest) -> Response:
        cancelled = await asyncio.to_thread(self._jobs.cancel, _number(http.path_params["number"]))
        return JSONResponse({"cancelled": cancelled})

    async def _start(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        try:
            job = await asyncio.to_thread(self._trigger, name)
        except KeyError:
            return _error(404, f"no trigger is called {name!r}")
        return JSONResponse({"job": job.id})


def _length(http: HttpRequest) -> int:
    """Bytes of the body; the most that one may have if its client does not say. Raises UsageError."""
    length = http.headers.get("content-length", str(MAX_BODY))
    if not re.fullmatch("[0-9]{1,18}", length) or int(length) > MAX_BODY:
        raise UsageError(f"a body of more than {MAX_BODY} bytes")
    return int(length)


async def _decoded(http: HttpRequest, kind: type[B]) -> B:
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise UsageError(f"a body of more than {MAX_BODY} bytes")
    except TimeoutError as error:
        raise UsageError(f"the body did not come within {BODY_SECONDS:g} s") from error
    try:
        return msgspec.json.decode(data, type=kind)
    except NOT_JSON as error:
        raise UsageError(str(error)) from error


def _number(text: str) -> int:
    """Raises UsageError if it is none."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UsageError(f"{text[:40]!r} is not a number")
    return int(text)


def _in_pieces(data: bytes) -> Response:
    pieces = (data[at : at + READ_BYTES] for at in range(0, len(data), READ_BYTES))
    return StreamingResponse(_each(pieces), media_type="application/json", headers={"Content-Length": str(len(data))})


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def _refused(_: HttpRequest, error: Exception) -> Response:
    status = 429 if isinstance(error, Busy) else 400 if isinstance(error, UsageError) else 500
    return _error(status, str(error))


async def _gone(_: HttpRequest, __: Exception) -> Response:
    """For whoever went away before the whole request had come: nobody reads it."""
    return Response(status_code=400)


async def _no_such(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _error(status, f"{http.method} {http.scope['path']} is not served here")


def _error(status: int, message: str) -> Response:
    kind = BAD_REQUEST if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


def _struct_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
