"""What a client asks for, in OpenAI's words and a few of our own.

https://platform.openai.com/docs/api-reference/chat. Bodies are a stranger's: bounded in all that makes them large. A
field that is not honoured has a type that allows only values that ask for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

from flashd.config.fields import Priority, Temperature, TopP
from flashd.config.tools import ROUNDS
from flashd.daemon.job import (
    API,
    MAX_TEXT,
    Choices,
    Deadline,
    Draw,
    MaxTokens,
    Request,
    Seed,
    SessionName,
    Turn,
)  # fmt: skip
from flashd.daemon.openai.known import Known
from flashd.daemon.openai.tools import CallId, Choice, ToolCall, Tools, calling
from flashd.engine.decoding.tools.calls import MOST_TOOLS, Calling
from flashd.errors import NOT_JSON, BadField

MAX_SCHEMA = 64 << 10
"""Bytes of a schema. Values take many times the bytes that spell them."""

MOST_ANSWERS = 8
"""Answers to one request."""

ANY_OBJECT = {"type": "object"}

LONGEST_STOP = 256
"""Characters. The end of an answer is compared with all of them at each character."""

MAX_LABELS = 16 << 10
"""Bytes of the labels of a request."""

Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], msgspec.Meta(max_length=16)]
Prompts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_ANSWERS)]
Nothing = Annotated[list[None], msgspec.Meta(max_length=0)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
Biases = Annotated[dict[Annotated[int, msgspec.Meta(ge=0)], Bias], msgspec.Meta(max_length=1024)]


class Part(Known, kw_only=True):
    type: str
    text: str | None = None
    image_url: msgspec.Raw = msgspec.Raw()
    input_audio: msgspec.Raw = msgspec.Raw()
    file: msgspec.Raw = msgspec.Raw()


class Message(Known, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: Annotated[list[ToolCall], msgspec.Meta(max_length=MOST_TOOLS)] | None = None
    tool_call_id: CallId | None = None
    # what OpenAI's answers have, and clients send back
    refusal: Literal[""] | None = None
    reasoning_content: str | None = None  # thoughts are not told again
    annotations: Nothing | None = None
    function_call: None = None
    audio: None = None
    name: str | None = None

    def turn(self, number: int, names: dict[str, str], in_session: bool) -> Turn:
        """The turn. `names`: the tools that were called before, by the ids of the calls. Raises BadField.

        `in_session`: what was called before may be in a session, which is looked at later.
        """
        at = f"messages[{number}]"
        role = "system" if self.role == "developer" else self.role
        if self.tool_calls and role != "assistant":
            raise BadField(f"{at}.tool_calls", "only the assistant calls tools")
        if self.name is not None and role != "tool":
            raise BadField(f"{at}.name", "expected null: flashd tells no speakers of one role apart")
        calls = tuple(call.call(f"{at}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls or ()))
        names |= {call.id: call.name for call in calls}
        return Turn(
            role, self._text(f"{at}.content"), calls, *self._answered(f"{at}.tool_call_id", names, in_session)
        )

    def _answered(self, at: str, names: dict[str, str], in_session: bool) -> tuple[str, str]:
        """The id of the call that a tool's message answers, and the tool's name."""
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise BadField(at, "expected the id of a call with role tool, and null with another role")
        if self.tool_call_id is not None and self.tool_call_id not in names and not in_session:
            raise BadField(at, "no call before it has this id")
        return self.tool_call_id or "", names.get(self.tool_call_id or "", "")

    def _text(self, at: str) -> str:
        if self.content is None and self.role != "assistant":
            raise BadField(at, "is missing", "missing_required_parameter")
        if not isinstance(self.content, list):
            return self.content or ""
        for i, part in enumerate(self.content):
            if part.type != "text":
                raise BadField(f"{at}[{i}]", f"content of type {part.type[:100]!r} is not understood; send text")
            if part.text is None or any(bytes(raw) for raw in (part.image_url, part.input_audio, part.file)):
                raise BadField(f"{at}[{i}]", "expected a text and nothing else")
        return "".join(part.text or "" for part in self.content)


class Schema(Known, kw_only=True):
    schema: msgspec.Raw = msgspec.Raw()
    name: str | None = None
    description: str | None = None
    strict: bool | None = None

    def value(self) -> dict[str, Any]:
        at, data = "response_format.json_schema.schema", bytes(self.schema)
        if data.strip() in (b"", b"null"):
            raise BadField(at, "is missing", "missing_required_parameter")
        if len(data) > MAX_SCHEMA:
            raise BadField(at, f"a schema of more than {MAX_SCHEMA} bytes")
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except NOT_JSON as error:
            raise BadField(at, str(error)) from error


class Format(Known, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def schema(self) -> dict[str, Any] | None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise BadField(
                "response_format.json_schema", "expected a schema with type json_schema, and none with another type",
                "missing_required_parameter",
            )  # fmt: skip
        return self.json_schema.value() if self.json_schema else ANY_OBJECT if self.type == "json_object" else None


class StreamOptions(Known, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TemplateValues(Known, kw_only=True):
    """Whether the model may think before it answers, by the names that chat templates have for it."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class Body(Known, kw_only=True):
    """What completions and chat completions share. From `top_k` to `forget` are our own."""

    model: str | None = None  # there is one; the answer says its name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MOST_ANSWERS)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    choose: Choices | None = None
    priority: Priority | None = None
    deadline: Deadline | None = None
    forget: bool | None = None
    user: str | None = None  # a label, which changes no answer

    def check(self) -> None:
        """Raises BadField for fields that do not go together."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise BadField("stream_options", "it needs stream: true")
        if options is not None and options.include_obfuscation:
            raise BadField("stream_options.include_obfuscation", "flashd adds no padding; send false")
        with_choose = {
            "logit_bias": self.logit_bias, "frequency_penalty": self.frequency_penalty, "top_p": self.top_p,
            "presence_penalty": self.presence_penalty, "top_k": self.top_k, "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty, "stop": self.stop,
        }  # fmt: skip
        for name, value in with_choose.items() if self.choose else ():
            if value is not None:
                raise BadField(name, "it says how tokens are drawn; with choose no tokens are drawn")

    def requests(
        self, talks: Sequence[tuple[Turn, ...]], plain: bool, schema: dict[str, Any] | None, logprobs: int | None,
        limit: int | None, calling: Calling | None = None,
    ) -> tuple[Request, ...]:  # fmt: skip
        """One request for each answer: `n` for each talk."""
        self.check()
        _check_talks(talks, "prompt" if plain else "messages")
        if self.choose and (schema is not None or logprobs is not None):
            raise BadField("choose", "it does not go together with response_format or logprobs")
        n = self.n or 1
        if len(talks) * n > MOST_ANSWERS:
            raise BadField("n", f"{len(talks)} prompts with {n} answers each; allowed are {MOST_ANSWERS} answers")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        draw = Draw(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p, seed=self.seed,
            repeat_penalty=self.repeat_penalty, frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0, logit_bias=self.logit_bias or {},
        )  # fmt: skip
        seeds = [None if self.seed is None else self.seed + i for i in range(n)]
        return tuple(
            Request(
                turns=turns, source=API, plain=plain, priority=5 if self.priority is None else self.priority,
                deadline=self.deadline, max_tokens=limit, forget=bool(self.forget), stop=stop,
                choose=tuple(self.choose or ()), json_schema=schema, logprobs=logprobs, draw=replace(draw, seed=seed),
                calling=calling,
            )
            for turns in talks
            for seed in seeds
        )  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What a body asks for: the requests, and in which form the answers go back."""

    requests: tuple[Request, ...]
    of_each: int  # answers to each prompt
    stream: bool
    usage: bool  # whether a stream ends with what it cost
    echo: bool = False
    session: str | None = None
    new_session: bool = False


class Chat(Body, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=1000)]
    max_completion_tokens: MaxTokens | None = None
    response_format: Format | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateValues | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    # our own: a talk that the service keeps, and whether it begins anew
    session: SessionName | None = None
    new_session: bool | None = None
    # our own: the tools of this board, which it calls itself
    board_tools: bool | None = None
    # labels, which change no answer
    metadata: msgspec.Raw = msgspec.Raw()
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # what is not honoured
    functions: Nothing | None = None
    function_call: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
    web_search_options: None = None

    def asked(self) -> Asked:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_tokens not in (None, limit):
            raise BadField("max_tokens", "it differs from max_completion_tokens; send one of them")
        if self.store:
            raise BadField("store", "nothing is stored for later use; send false", "unsupported_parameter")
        if self.new_session and self.session is None:
            raise BadField("new_session", "it needs session")
        if self.session is not None and (self.n or 1) > 1:
            raise BadField("n", "a session goes on with one answer; leave out n or session")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadField("top_logprobs", "it needs logprobs: true")
        _check_labels(bytes(self.metadata))
        names: dict[str, str] = {}
        turns = tuple(message.turn(i, names, self.session is not None) for i, message in enumerate(self.messages))
        schema = self.response_format.schema() if self.response_format else None
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        tools = self._calling()
        think = self._think(schema is not None or tools is not None or bool(self.board_tools))
        rounds = ROUNDS if self.board_tools else 0
        requests = tuple(
            replace(request, think=think, rounds=rounds)
            for request in self.requests([turns], False, schema, logprobs, limit, tools)
        )
        return dataclasses.replace(
            asked(self, requests, False), session=self.session, new_session=bool(self.new_session)
        )

    def _think(self, constrained: bool) -> bool | None:
        """Whether the model may think before it answers; None: as the configuration says. Raises BadField."""
        given = self.chat_template_kwargs or TemplateValues()
        said = {given.enable_thinking, given.thinking, None if self.reasoning_effort is None else False} - {None}
        if len(said) > 1:
            raise BadField("chat_template_kwargs", "one field says that the model may think, and one that it may not")
        think = said.pop() if said else None
        if think and (constrained or self.choose):
            raise BadField(
                "chat_template_kwargs", "an answer by choices, a schema or tools comes without thoughts; send false"
            )
        return think

    def _calling(self) -> Calling | None:
        """The tools that may be called. Raises BadField."""
        found = calling(self.tools or [], self.tool_choice, self.parallel_tool_calls is not False)
        if self.board_tools and self.tools:
            raise BadField("board_tools", "it does not go together with tools of your own")
        if self.board_tools and (self.n or 1) > 1:
            raise BadField("n", "the board does things for one answer; leave out n or board_tools")
        formatted = self.response_format is not None and self.response_format.type != "text"
        others = {
            "choose": self.choose, "stop": self.stop, "response_format": formatted, "logprobs": self.logprobs,
        }  # fmt: skip
        for name, value in others.items() if found or self.board_tools else ():
            if value:
                what = "board_tools" if self.board_tools else "tools, unless tool_choice is none"
                raise BadField(name, f"it does not go together with {what}")
        return found


class Completion(Body, kw_only=True):
    prompt: str | Prompts
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    # what is not honoured
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    def asked(self) -> Asked:
        if self.echo and self.logprobs is not None:
            raise BadField("echo", "the prompt's own logprobs are not known; send echo or logprobs, not both")
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        talks = [(Turn("user", prompt),) for prompt in prompts]
        return asked(self, self.requests(talks, True, None, self.logprobs, self.max_tokens), bool(self.echo))


def _check_talks(talks: Sequence[tuple[Turn, ...]], field: str) -> None:
    """Raises BadField if one of them asks nothing, or if a message is too long."""
    for turns in talks:
        in_session = any(turn.call and not turn.name for turn in turns)  # what it is about was asked before
        if not in_session and not any(turn.role == "user" and turn.content.strip() for turn in turns):
            raise BadField(field, "the prompt is empty; say what to answer")
        if (longest := max(len(turn.content) for turn in turns)) > MAX_TEXT:
            raise BadField(field, f"a text of {longest} characters; allowed is {MAX_TEXT}")


def _check_labels(data: bytes) -> None:
    """Raises BadField unless they are texts by name, or none."""
    if len(data) > MAX_LABELS:
        raise BadField("metadata", f"labels of more than {MAX_LABELS} bytes")
    try:
        msgspec.json.decode(data or b"null", type=dict[str, str] | None)
    except NOT_JSON as error:
        raise BadField("metadata", f"{error}; allowed is an object of texts") from error


def asked(body: Body, requests: tuple[Request, ...], echo: bool) -> Asked:
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Asked(requests, body.n or 1, bool(body.stream), usage, echo)
