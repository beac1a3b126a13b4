"""The HTTP API: what OpenAI's clients expect, and what the kiosk and the command line need beside it.

https://platform.openai.com/docs/api-reference/chat. Bodies are a stranger's: bounded in size, decoded into
structs, refused in the API's own error shape.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Annotated, Any, Literal
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

from flashd.config.fields import Priority, Temperature, TopP
from flashd.daemon.job import Choices, Deadline, Draw, Event, Job, MaxTokens, Request, Role, Seed, State, Turn
from flashd.daemon.jobs import Jobs, Watch
from flashd.errors import BAD_REQUEST, NOT_JSON, Busy, FlashdError, UsageError

MAX_BODY = 1 << 20
"""Bytes of a request's body."""

OBJECT = "flashd"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _Message(msgspec.Struct):
    role: Role
    content: str | list[_Part]

    def turn(self) -> Turn:
        if isinstance(self.content, str):
            return Turn(self.role, self.content)
        other = next((p.type for p in self.content if p.type != "text"), None)
        if other:
            raise UsageError(f"content of type {other!r} is not understood; send text")
        return Turn(self.role, "".join(p.text for p in self.content))


class _Schema(msgspec.Struct):
    schema: dict[str, Any]
    name: str = ""


class _Format(msgspec.Struct):
    type: Literal["text", "json_schema"]
    json_schema: _Schema | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What completions and chat completions share. `choose`, `priority`, `deadline` and `forget` are our own."""

    model: str | None = None
    stream: bool = False
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    choose: Choices = []
    priority: Priority = 5
    deadline: Deadline | None = None
    forget: bool = False

    def request(self, turns: tuple[Turn, ...], plain: bool, schema: dict[str, Any] | None) -> Request:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Request(
            turns=turns, source="api", plain=plain, priority=self.priority, deadline=self.deadline,
            max_tokens=self.max_tokens, forget=self.forget, stop=stop, choose=tuple(self.choose), json_schema=schema,
            draw=Draw(temperature=self.temperature, top_p=self.top_p, seed=self.seed),
        )  # fmt: skip


class _Chat(_Body, kw_only=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=1000)]
    max_completion_tokens: MaxTokens | None = None
    response_format: _Format | None = None


class _Completion(_Body, kw_only=True):
    prompt: str


class _FromHere:
    """On loopback, refuses what a browser sends for a page of somebody else's, or by a name that leads here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        if scope["type"] == "http" and server is not None and server[1] is not None:  # a Unix socket has no port
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if urlsplit(f"//{host}").hostname not in LOOPBACK or origin not in (None, f"http://{host}"):
                await _error(403, "only for this machine's own pages and programs")(scope, receive, send)
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
    """

    def __init__(
        self, jobs: Jobs, model: str, status: Callable[[], msgspec.Struct], trigger: Callable[[str], Job],
        metrics: Callable[[], bytes],
    ) -> None:  # fmt: skip
        self._jobs, self._model, self._status, self._trigger, self._metrics = jobs, model, status, trigger, metrics

    def application(self, more: list[BaseRoute]) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/api/status", self._show_status),
            Route("/api/jobs", self._recent),
            Route("/api/jobs/{number:int}", self._one, methods=["GET"]),
            Route("/api/jobs/{number:int}", self._cancel, methods=["DELETE"]),
            Route("/api/triggers/{name:str}", self._start, methods=["POST"]),
            *more,
        ]
        return Starlette(
            routes=routes,
            exception_handlers={FlashdError: _refused, ClientDisconnect: _gone, 404: _no_such, 405: _no_such},
            middleware=[Middleware(_FromHere)],
        )  # fmt: skip

    async def _chat(self, http: HttpRequest) -> Response:
        body = await _decoded(http, _Chat)
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        schema = body.response_format.json_schema if body.response_format else None
        request = body.request(tuple(m.turn() for m in body.messages), False, schema.schema if schema else None)
        return await self._respond(http, request, body.stream, _chat_chunk, _chat_answer)

    async def _completion(self, http: HttpRequest) -> Response:
        body = await _decoded(http, _Completion)
        request = body.request((Turn("user", body.prompt),), True, None)
        return await self._respond(http, request, body.stream, _text_chunk, _text_answer)

    async def _respond(
        self, http: HttpRequest, request: Request, stream: bool,
        chunk: Callable[[str, str | None, bool], dict[str, Any]], whole: Callable[[str, str], dict[str, Any]],
    ) -> Response:  # fmt: skip
        events = _Events()
        job, watch = await asyncio.to_thread(self._jobs.ask, request, events.put)
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
        body = whole(end.result.text, _reason(end))
        return JSONResponse(
            {
                **head, **body, "usage": _usage(end),
                OBJECT: _more(end),
            },
            headers={"X-Job": str(job.id)},
        )  # fmt: skip

    async def _end(self, http: HttpRequest, job: Job, watch: Watch, events: _Events) -> Job | None:
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
        self, job: Job, watch: Watch, events: _Events, head: dict[str, Any],
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
                last = head | chunk("", _reason(end), False) | {"usage": _usage(end)}
                yield _event(last | {OBJECT: _more(end)})
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
        most = http.query_params.get("most", "20")
        jobs = await asyncio.to_thread(
            self._jobs.recent, min(int(most), 1000) if re.fullmatch("[0-9]{1,9}", most) else 20
        )
        return _struct_response(jobs)

    async def _one(self, http: HttpRequest) -> Response:
        job = await asyncio.to_thread(self._jobs.get, http.path_params["number"])
        return _struct_response(job) if job else _error(404, f"no job {http.path_params['number']}")

    async def _cancel(self, http: HttpRequest) -> Response:
        cancelled = await asyncio.to_thread(self._jobs.cancel, http.path_params["number"])
        return JSONResponse({"cancelled": cancelled})

    async def _start(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        try:
            job = await asyncio.to_thread(self._trigger, name)
        except KeyError:
            return _error(404, f"no trigger is called {name!r}")
        return JSONResponse({"job": job.id})


class _Events:
    """A watch's events, brought from the threads in which they happen into this loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.over = False  # the daemon stops: nothing more will come

    def put(self, event: Event | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self, timeout: float) -> Event | None:
        """The next event; None where none came in `timeout` seconds."""
        try:
            event = await asyncio.wait_for(self._queue.get(), timeout)
        except TimeoutError:
            return None
        self.over = event is None
        return event


async def _decoded(http: HttpRequest, kind: type[Any]) -> Any:
    data = bytearray()
    async for chunk in http.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise UsageError(f"a body of more than {MAX_BODY} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except NOT_JSON as error:
        raise UsageError(str(error)) from error


async def _refused(_: HttpRequest, error: Exception) -> Response:
    status = 429 if isinstance(error, Busy) else 400 if isinstance(error, UsageError) else 500
    return _error(status, str(error))


async def _gone(_: HttpRequest, __: Exception) -> Response:
    """For whoever went away before the whole request had come: nobody reads it."""
    return Response(status_code=400)


async def _no_such(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _error(status, f"{http.method} {http.url.path} is not served here")


def _error(status: int, message: str) -> Response:
    kind = BAD_REQUEST if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


def _struct_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _reason(job: Job) -> str:
    return "length" if job.result.cut else "stop"


def _more(job: Job) -> dict[str, Any]:
    """What OpenAI's answers have no place for."""
    result = job.result
    return {"finish": result.finish, "probabilities": result.probabilities, "figures": result.figures}


def _usage(job: Job) -> dict[str, Any]:
    f = job.result.figures
    reused, said = int(f.get("reused_tokens", 0)), int(f.get("tokens", 0))
    prompt = int(f.get("prompt_tokens", 0)) + reused
    return {
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": reused},
    }  # fmt: skip


def _chat_chunk(text: str, reason: str | None, first: bool) -> dict[str, Any]:
    delta: dict[str, str] = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def _chat_answer(text: str, reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def _text_chunk(text: str, reason: str | None, _: bool) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def _text_answer(text: str, reason: str) -> dict[str, Any]:
    return _text_chunk(text, reason, False)
