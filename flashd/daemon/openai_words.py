"""What a client asks for and is answered, in OpenAI's words and a few of our own.

https://platform.openai.com/docs/api-reference/chat. Bodies are a stranger's: bounded in all that makes them large.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from flashd.config.fields import Priority, Temperature, TopP
from flashd.daemon.job import API, Choices, Deadline, Draw, Job, MaxTokens, Request, Role, Seed, Turn
from flashd.errors import NOT_JSON, UsageError

MAX_SCHEMA = 64 << 10
"""Bytes of a schema. Values take many times the bytes that spell them."""

Stops = Annotated[list[str], msgspec.Meta(max_length=16)]


class Part(msgspec.Struct):
    type: str
    text: str = ""


class Message(msgspec.Struct):
    role: Role
    content: str | list[Part]

    def turn(self) -> Turn:
        if isinstance(self.content, str):
            return Turn(self.role, self.content)
        other = next((p.type for p in self.content if p.type != "text"), None)
        if other:
            raise UsageError(f"content of type {other!r} is not understood; send text")
        return Turn(self.role, "".join(p.text for p in self.content))


class Schema(msgspec.Struct):
    schema: msgspec.Raw
    name: str = ""

    def value(self) -> dict[str, Any]:
        if len(bytes(self.schema)) > MAX_SCHEMA:
            raise UsageError(f"a schema of more than {MAX_SCHEMA} bytes")
        try:
            return msgspec.json.decode(self.schema, type=dict[str, Any])
        except NOT_JSON as error:
            raise UsageError(f"the schema: {error}") from error


class Format(msgspec.Struct):
    type: Literal["text", "json_schema"]
    json_schema: Schema | None = None


class Body(msgspec.Struct, kw_only=True):
    """What completions and chat completions share. `choose`, `priority`, `deadline` and `forget` are our own."""

    model: str | None = None
    stream: bool = False
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: str | Stops | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    choose: Choices = []
    priority: Priority = 5
    deadline: Deadline | None = None
    forget: bool = False

    def request(self, turns: tuple[Turn, ...], plain: bool, schema: dict[str, Any] | None) -> Request:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Request(
            turns=turns, source=API, plain=plain, priority=self.priority, deadline=self.deadline,
            max_tokens=self.max_tokens, forget=self.forget, stop=stop, choose=tuple(self.choose), json_schema=schema,
            draw=Draw(temperature=self.temperature, top_p=self.top_p, seed=self.seed),
        )  # fmt: skip


class Chat(Body, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=1000)]
    max_completion_tokens: MaxTokens | None = None
    response_format: Format | None = None


class Completion(Body, kw_only=True):
    prompt: str


def of_chat(body: Chat) -> Request:
    body.max_tokens = body.max_completion_tokens or body.max_tokens
    schema = body.response_format.json_schema if body.response_format else None
    return body.request(tuple(m.turn() for m in body.messages), False, schema.value() if schema else None)


def of_completion(body: Completion) -> Request:
    return body.request((Turn("user", body.prompt),), True, None)


def reason(job: Job) -> str:
    return "length" if job.result.cut else "stop"


def more(job: Job) -> dict[str, Any]:
    """What OpenAI's answers have no place for."""
    result = job.result
    return {
        "finish": result.finish, "forgotten": result.forgotten, "probabilities": result.probabilities,
        "figures": result.figures,
    }  # fmt: skip


def usage(job: Job) -> dict[str, Any]:
    f = job.result.figures
    reused, said = int(f.get("reused_tokens", 0)), int(f.get("tokens", 0))
    prompt = int(f.get("prompt_tokens", 0)) + reused
    return {
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": reused},
    }  # fmt: skip


def chat_chunk(text: str, reason: str | None, first: bool) -> dict[str, Any]:
    delta: dict[str, str] = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def chat_answer(text: str, reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def text_chunk(text: str, reason: str | None, _: bool) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def text_answer(text: str, reason: str) -> dict[str, Any]:
    return text_chunk(text, reason, False)
