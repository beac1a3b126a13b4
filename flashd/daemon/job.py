"""A job: one request for an answer, and what has become of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import takewhile
from typing import Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

# those who know jobs know these by them, and no engine
from flashd.engine.decoding.tools.calls import Call as Call
from flashd.engine.decoding.tools.calls import Calling as Calling
from flashd.engine.decoding.tools.calls import CallPart, text_of
from flashd.engine.decoding.tools.calls import Tool as Tool
from flashd.errors import BadField

Role = Literal["system", "user", "assistant", "tool"]
MAX_TEXT = 256 << 10
"""Characters of one message."""

API = "api"
"""The source of what clients ask over HTTP."""

HELD_BYTES = 4 << 20
"""Bytes of the requests that wait, are answered, or whose answers somebody still reads."""

OF_TURN, OF_BIAS, OF_SCHEMA = 96, 100, 20
"""Bytes of RAM that a message or a call takes beside its text, that a token's bias takes, and a byte of a schema."""

BROKEN_OFF = "flashd was stopped during this call. Nobody knows whether it was done."
"""What comes of a call that was being made when the daemon ended."""

UNANSWERED = "Nobody said what came of this call."
"""What the model is told of a call in a session whose result did not come."""

HEAD = 200
"""Characters of a prompt or answer in a list."""

Choices = Annotated[list[str], msgspec.Meta(max_length=64)]
MaxTokens = Annotated[int, msgspec.Meta(ge=1)]
SessionName = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9_.-]{1,64}\Z", description="a session's name: up to 64 letters, digits, -, _ and points"
    ),
]
Seed = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Deadline = Annotated[float, msgspec.Meta(gt=0)]


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class Turn(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Role
    content: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    calls: tuple[Call, ...] = ()  # what the assistant called
    call: str = ""  # the id of the call whose result a tool's message is
    name: str = ""  # that tool's name


def question(text: str, system: str | None = None) -> tuple[Turn, ...]:
    """The turns of a single question."""
    return (*((Turn("system", system),) if system else ()), Turn("user", text))


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """How the answer's tokens are drawn; None: as the configuration says."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}  # tokens -> what is added to their logits


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked, by whom, and how urgent it is."""

    turns: tuple[Turn, ...]
    source: str  # who asks: "serial:console", "api", "trigger:door"
    plain: bool = False  # the turns' text as it stands, with no chat template
    priority: int = 5  # 0 to 9, the highest first
    deadline: float | None = None  # seconds after which it is no longer worth an answer
    barge_in: bool = False  # interrupts a running job of lower priority, which waits again
    coalesce: bool = False  # one of the same source that still waits stands for this one too
    per_minute: int | None = None  # jobs of this source
    max_tokens: int | None = None
    think: bool | None = None  # whether the model may think before it answers; None: as the configuration says
    forget: bool = False  # of a talk that does not fit in the context the oldest messages are left out
    forgotten: int = 0  # so many are left out of `turns` already
    stop: tuple[str, ...] = ()
    draw: Draw = Draw()
    choose: tuple[str, ...] = ()  # the answer is one of these
    json_schema: dict[str, Any] | None = None  # the answer is JSON of this schema
    session: str | None = None  # the talk that this goes on with; its earlier messages are in `turns`
    calling: Calling | None = None  # the answer may call these tools
    rounds: int = 0  # so many times the board makes an answer's calls, and it goes on; 0: they are for who asks
    logprobs: int | None = None  # each token comes with its probability, and with so many of the likeliest ones


class Result(msgspec.Struct, kw_only=True):
    """What came of a job."""

    text: str = ""
    thoughts: str = ""  # what the model thought before it answered
    calls: tuple[Call, ...] = ()  # what the answer calls
    steps: tuple[Turn, ...] = ()  # the calls that the board made for it, and what each gave
    before: int = 0  # characters of `text` that were said before those
    finish: str = ""  # stop, length, context, cancelled, an error's text
    refused: bool = False  # the error is the request's: it fails however often it is made
    param: str | None = None  # the field of an API's client that it is about
    forgotten: int = 0  # messages that were left out because the context is full
    probabilities: dict[str, float] = {}
    figures: dict[str, float] = {}

    @property
    def cut(self) -> bool:
        """Whether the answer would have gone on."""
        return self.finish in ("length", "context")


class Job(msgspec.Struct, kw_only=True):
    """A request that was accepted."""

    id: int
    request: Request
    created: float  # seconds since 1970
    state: State = State.QUEUED
    attempts: int = 0
    ended: float | None = None
    result: Result = msgspec.field(default_factory=Result)

    def __str__(self) -> str:
        return f"job {self.id} of {self.request.source}"

    @property
    def asked(self) -> Request:
        """The request as it is asked now: behind it are the calls that were made. Behind the last ones are words.

        Only its first round must have a call.
        """
        steps, calling = self.result.steps, self.request.calling
        if calling is not None and steps:
            calling = replace(calling, in_words=not self._rounds_left, required=False)
        return replace(self.request, turns=(*self.request.turns, *steps), calling=calling)

    @property
    def has_calls(self) -> bool:
        """Whether the board is to make calls before the answer goes on."""
        return bool(self.result.calls) and self._rounds_left > 0

    @property
    def _rounds_left(self) -> int:
        return self.request.rounds - sum(turn.role == "assistant" for turn in self.result.steps)

    def note_calls(self) -> None:
        """The answer's calls are a step of it from now on."""
        result = self.result
        made = sum(len(turn.calls) for turn in result.steps)
        calls = tuple(replace(call, id=f"call_{self.id}_{made + i}") for i, call in enumerate(result.calls))
        result.steps += (Turn("assistant", result.text[result.before :].strip(), calls),)
        result.calls, result.before = (), len(result.text)

    def start_anew(self) -> None:
        """It waits again. What was said since the last calls is forgotten; those calls are made only once."""
        self.state = State.QUEUED
        self.result.text, self.result.calls = self.result.text[: self.result.before], ()
        self.result.thoughts = ""

    def recover(self) -> None:
        """It waits again after the daemon has ended, perhaps during a call."""
        self.start_anew()
        answered = {turn.call for turn in self.result.steps}
        calls = [call for turn in self.result.steps for call in turn.calls if call.id not in answered]
        self.result.steps += tuple(Turn("tool", BROKEN_OFF, call=call.id, name=call.name) for call in calls)

    @property
    def lateness(self) -> str:
        """That it was not answered in time."""
        return f"no answer within {self.request.deadline:g} s"

    @property
    def fields(self) -> dict[str, object]:
        """Structured fields for the journal."""
        figures = self.result.figures
        return {
            "JOB_ID": self.id, "TRIGGER": self.request.source, "TOKENS": int(figures.get("tokens", 0)),
            "CARD_BYTES": int(figures.get("card_bytes", 0)),
        }  # fmt: skip


def weight(request: Request) -> int:
    """Bytes of RAM that a request takes at the most."""
    calls = [call for turn in request.turns for call in turn.calls]
    said = (text for call in calls for text in (call.id, call.name, call.arguments))
    texts = (*(turn.content for turn in request.turns), *request.choose, *request.stop, *said)
    schema = 0 if request.json_schema is None else len(msgspec.json.encode(request.json_schema))
    schema += len(text_of(request.calling))
    held = sum(map(sys.getsizeof, texts)) + OF_TURN * (len(request.turns) + len(calls))
    return held + OF_BIAS * len(request.draw.logit_bias) + OF_SCHEMA * schema


def missed(job: Job, position: int) -> Iterator[Event]:
    """What a watch that comes late has missed of a job, which so many others go before if it waits."""
    if job.state is State.QUEUED:
        yield Event(kind="queued", job=job.id, position=position)
    if job.result.thoughts:
        yield Event(kind="thought", job=job.id, text=job.result.thoughts)
    if job.result.text:
        yield Event(kind="text", job=job.id, text=job.result.text)
    for i, call in enumerate(job.result.calls):
        yield Event(kind="call", job=job.id, call=CallPart(index=i, name=call.name, arguments=call.arguments))
    if job.state.ended:
        yield Event(kind="ended", job=job.id, end=job)


def so_far(job: Job) -> tuple[Turn, ...]:
    """The messages of a talk up to a job's answer, without those that its context had no room for."""
    turns, left_out = job.request.turns, job.result.forgotten - job.request.forgotten
    first, result = 1 if turns[0].role == "system" else 0, job.result
    calls = result.calls if job.state is State.DONE else ()  # one that was broken off is no JSON
    said = Turn("assistant", result.text[result.before :], calls)
    steps = (*result.steps, *_unanswered(result.steps))
    ends = said.content or calls or job.state is State.DONE
    return (*turns[:first], *turns[first + left_out :], *steps, *([said] if ends else []))


def _unanswered(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """What is said in place of the results of calls that have none."""
    answered = {turn.call for turn in turns}
    calls = [call for turn in turns for call in turn.calls if call.id not in answered]
    return tuple(Turn("tool", UNANSWERED, call=call.id, name=call.name) for call in calls)


def gone_on(last: Job | None, request: Request, session: str) -> Request:
    """A request behind what its session said up to its last job. Its own system prompt takes the old one's place.

    What its client says first may be the results of the last answer's calls. Raises BadField for those of others.
    """
    own, before = request.turns, so_far(last) if last is not None else ()
    first = 1 if own[0].role == "system" else 0
    if first and before and before[0].role == "system":
        before = before[1:]
    results = tuple(takewhile(lambda turn: turn.role == "tool", own[first:]))
    more = own[first + len(results) :]
    if before:
        names = {call.id: call.name for call in before[-1].calls}
        results = tuple(replace(turn, name=names.get(turn.call, "")) for turn in results)
    if strange := [turn for turn in (*results, *more) if turn.role == "tool" and not turn.name]:
        raise BadField("messages", f"no call that session {session} waits for has the id {strange[0].call[:64]!r}")
    results += _unanswered((*before[-1:], *results))
    return replace(request, turns=(*own[:first], *before, *results, *more), session=session, forget=True)


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a job begins with: a line of a list."""

    id: int
    source: str
    state: State
    created: float
    attempts: int
    ended: float | None
    prompt: str  # of the last message, the first HEAD characters
    answer: str
    finish: str

    @classmethod
    def of(cls, job: Job) -> Head:
        request, result = job.request, job.result
        return cls(
            id=job.id, source=request.source, state=job.state, created=job.created, attempts=job.attempts,
            ended=job.ended, prompt=request.turns[-1].content[:HEAD], answer=result.text[:HEAD],
            finish=result.finish[:HEAD],
        )  # fmt: skip


class Scored(msgspec.Struct, frozen=True):
    """A token of an answer: its bytes, the natural logarithm of its probability, and the likeliest tokens there."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a job.

    queued (position), moved (position, when the queue goes on), started, progress (done, total, card_bytes),
    thought (text), text (text, scored), call (call), calls (they are whole, and the board makes them), did (text,
    what it did, in words), restarted (forget what was said), ended (the job as it ended).
    """

    kind: Literal[
        "queued", "moved", "started", "progress", "thought", "text", "call", "calls", "did", "restarted", "ended"
    ]
    job: int
    text: str = ""
    scored: tuple[Scored, ...] = ()  # the tokens of `text`, if the job asks for them
    call: CallPart | None = None  # more of a call
    position: int = 0
    done: int = 0
    total: int = 0
    card_bytes: int = 0
    end: Job | None = None
