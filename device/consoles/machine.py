"""The console a microcontroller meets: one JSON object a line in, JSON objects, one a line, out.

In: {"prompt": "...", "id": 7}, with system, choose, json_schema, max_tokens, priority, deadline if wanted; with a
session, {"session": "garden"}, it goes on with what was said in that before, unless new_session is true;
{"trigger": "NAME", "id": 8}; {"cancel": 7}; {"status": true}. Out: ready when the line is listened to (what came
before is lost), then accepted, text, did (what a trigger's tool did, in words), end, error, status, each with the id
that was given.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any

import msgspec

from device.consoles.port import Port
from device.controls import Controls
from flashd.config.fields import Priority, Temperature
from flashd.config.settings import Serial
from flashd.daemon.job import (
    MAX_TEXT,
    Choices,
    Deadline,
    Draw,
    Event,
    Job,
    MaxTokens,
    Request,
    Seed,
    SessionName,
    question,
)
from flashd.daemon.openai.known import read
from flashd.daemon.watch import Watch
from flashd.errors import NOT_JSON, BadField, FlashdError
from flashd.system.printable import printable_json

MAX_LINE = 64 << 10
"""Bytes of a line."""

MOST_OPEN = 16
"""Jobs that one line may have under way."""

POLL_SECONDS = 0.05

Id = int | str


class _In(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: Id | None = None
    prompt: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] | None = None
    system: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] | None = None
    choose: Choices = []
    json_schema: dict[str, Any] | None = None
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    seed: Seed | None = None
    priority: Priority = 5
    deadline: Deadline | None = None
    session: SessionName | None = None
    new_session: bool = False
    trigger: str | None = None
    cancel: Id | None = None
    status: bool = False


class Machine:
    """A session in machine mode. Raises port.GONE when the port goes away."""

    def __init__(self, controls: Controls, settings: Serial) -> None:
        self._controls, self._settings = controls, settings
        self._open: list[tuple[Id | None, Job, Watch]] = []

    def run(self, port: Port, stopping: threading.Event) -> None:
        """Serves lines until the daemon stops."""
        self._port = port
        pending, dropping = b"", False
        self._send("ready", None)
        try:
            while not stopping.is_set():
                pending += port.read(POLL_SECONDS)
                *lines, pending = pending.replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    if dropping or len(line) > MAX_LINE:
                        port.note(f"a line of more than {MAX_LINE} bytes")
                        self._refuse(None, f"a line of more than {MAX_LINE} bytes")
                        dropping = False
                    elif line.strip(b"\0 \t"):
                        self._serve(line.strip(b"\0 \t"))
                if len(pending) > MAX_LINE:
                    pending, dropping = b"", True
                self._tell()
        finally:
            for _, _, watch in self._open:
                watch.close()
            self._open.clear()

    def _serve(self, line: bytes) -> None:
        try:
            wish = read(line, _In)
        except (BadField, *NOT_JSON) as error:
            self._port.note("a line that is not understood; its sender was told why")
            self._refuse(None, str(error))
            return
        try:
            self._do(wish)
        except FlashdError as error:
            self._refuse(wish.id, str(error))

    def _do(self, wish: _In) -> None:
        if wish.status:
            self._send("status", wish.id, **msgspec.structs.asdict(self._controls.status()))
        elif wish.cancel is not None:
            jobs = [job for number, job, _ in self._open if number == wish.cancel]
            if not jobs:
                self._refuse(wish.cancel, "nothing under way has this id")
            for job in jobs:
                self._controls.jobs.cancel(job.id)
        elif wish.session is None and wish.new_session:
            self._refuse(wish.id, "new_session needs session")
        elif (wish.prompt is None) == (wish.trigger is None):
            self._refuse(wish.id, "a line needs one of prompt, trigger, cancel, status")
        elif len(self._open) >= MOST_OPEN:
            self._refuse(wish.id, f"{MOST_OPEN} jobs of this line are under way; wait for one to end")
        elif wish.trigger is not None:
            self._start(wish.id, wish.trigger)
        else:
            request = self._request(wish)
            if wish.session is not None:
                own = f"{self._settings.name}/{wish.session}"  # nobody reads others' sessions by their names here
                request = self._controls.jobs.continued(request, own, wish.new_session)
            job, watch = self._controls.jobs.ask(request)
            self._accept(wish.id, job, watch)

    def _request(self, wish: _In) -> Request:
        constrained = wish.choose or wish.json_schema is not None
        calling = None if constrained else self._controls.calling(self._settings.tools, wish.prompt or "")
        return Request(
            turns=question(wish.prompt or "", wish.system), source=f"serial:{self._settings.name}",
            calling=calling, rounds=self._settings.rounds if calling else 0,
            priority=wish.priority, deadline=wish.deadline, max_tokens=wish.max_tokens,
            choose=tuple(wish.choose), json_schema=wish.json_schema,
            draw=Draw(temperature=wish.temperature, seed=wish.seed),
        )  # fmt: skip

    def _start(self, number: Id | None, name: str) -> None:
        try:
            job = self._controls.start(name)
        except KeyError:
            self._refuse(number, f"no trigger is called {name!r}")
            return
        self._accept(number, job, self._controls.jobs.watch(job.id))

    def _accept(self, number: Id | None, job: Job, watch: Watch) -> None:
        number = job.id if number is None else number
        self._open.append((number, job, watch))
        self._send("accepted", number, job=job.id)

    def _tell(self) -> None:
        """Passes on what has happened. While the line is behind, words wait."""
        for entry in list(self._open):
            number, _, watch = entry
            while not self._port.behind and (event := watch.next(0)) is not None:
                self._pass_on(number, event)
                if event.end is not None:
                    watch.close()
                    self._open.remove(entry)
                    break

    def _pass_on(self, number: Id | None, event: Event) -> None:
        if event.kind == "text":
            self._send("text", number, text=event.text)
        elif event.kind == "did":
            self._send("did", number, text=event.text)
        elif event.kind == "restarted":
            self._send("restarted", number)
        elif event.end is not None:
            end = event.end
            more = {"probabilities": end.result.probabilities} if end.result.probabilities else {}
            self._send("end", number, state=str(end.state), finish=end.result.finish, text=end.result.text, **more)

    def _refuse(self, number: Id | None, why: str) -> None:
        self._send("error", number, message=why)

    def _send(self, event: str, number: Id | None, **more: Any) -> None:
        fields = {"event": event} | ({"id": number} if number is not None else {}) | more
        text = msgspec.json.encode(fields).decode()
        if self._settings.charset == "ascii":
            text = "".join(c if c < "\x7f" else _escaped(c) for c in text)
        else:
            text = printable_json(text)  # a person may watch the line
        self._port.write(text + "\n")


def _escaped(c: str) -> str:
    units = c.encode("utf-16-be")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))
