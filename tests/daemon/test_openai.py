"""The API as clients use it: every field of OpenAI's is honoured, or refused by its name."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import openai
import pytest

from flashd.bundle.reader import Bundle
from flashd.config.settings import Answering
from flashd.daemon.http.admission import MOST_SCORED
from flashd.daemon.http.api import Api
from flashd.daemon.http.server import Server
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.daemon.spool import Spool
from flashd.daemon.worker import Worker
from flashd.engine.engine import Budget, Engine, Prompts, plan_for
from flashd.errors import BadField
from flashd.system.memory import MIB
from tests.daemon.fake_worker import Clerk, request
from tests.daemon.running import Running
from tests.waiting import wait

ASK: Any = [{"role": "user", "content": "What is the capital of France?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL: Any = {"type": "function", "function": {"name": "HassTurnOn", "parameters": {
    "type": "object", "properties": {"area": {"enum": ["hall", "bath"]}, "level": {"type": "integer", "minimum": 0,
    "maximum": 9}}, "required": ["area"]}}}  # fmt: skip
CLOCK: Any = {"type": "function", "function": {"name": "clock", "description": "The time.", "strict": True}}
CALLED: Any = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
TOLD: Any = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
FREE: Any = {"temperature": 1.5, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture(scope="module")
def daemon(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("daemon"), tiny_bundle)
    text = running.config.read_text()
    running.config.write_text(text.replace("flashd.sock}", f"flashd.sock, loopback: {port}}}"))
    running.start()
    yield running
    running.close()


def chat(http: httpx.Client, **more: Any) -> Any:
    reply = http.post(CHAT, json={"messages": ASK, **FREE, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    reply = http.post(path, json=body)
    assert reply.status_code == 400, (body, reply.text)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


def said(body: Any) -> list[str]:
    return [choice["message"]["content"] for choice in body["choices"]]


def chunks(reply: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


OPTIONAL = (
    "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed",
    "frequency_penalty", "presence_penalty", "logit_bias", "stop", "response_format", "logprobs", "top_logprobs",
    "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "modalities", "service_tier",
    "store", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options", "user", "metadata",
    "top_k", "min_p", "repeat_penalty", "choose", "priority", "deadline", "forget", "safety_identifier",
    "prompt_cache_key", "board_tools",
)  # fmt: skip


def test_every_optional_field_may_be_null(http: httpx.Client) -> None:
    assert chat(http, **dict.fromkeys(OPTIONAL))["choices"][0]["finish_reason"] in ("stop", "length")
    body = {"prompt": "a", "suffix": None, "echo": None, "best_of": None, "logprobs": None, "max_tokens": None}
    assert http.post(TEXT, json=body).status_code == 200


def test_messages_as_clients_send_them_back(http: httpx.Client) -> None:
    answer: dict[str, Any] = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": None,
        "function_call": None, "audio": None,
    }  # fmt: skip
    one = chat(http, messages=[{"role": "developer", "content": "Be brief."}, *ASK, answer, *ASK])
    two = chat(http, messages=[{"role": "system", "content": "Be brief."}, *ASK, answer | {"content": ""}, *ASK])
    assert said(one) == said(two)
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    assert said(chat(http, messages=[{"role": "user", "content": parts}])) == said(chat(http))


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"max_tokens": -1}, "max_tokens", "allowed is a whole number of 1 or more"),
        ({"top_p": 0}, "top_p", "allowed is above 0 up to 1"),
        ({"temperature": 11}, "temperature", "allowed is 0 to 10"),
        ({"n": 9}, "n", "allowed is 1 to 8"),
        ({"seed": -1}, "seed", "allowed is a whole number from 0"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "allowed is -2 to 2"),
        ({"presence_penalty": "x"}, "presence_penalty", "allowed is -2 to 2"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "each with -100 to 100"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "numbers of tokens"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "there is no token 9999"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "allowed is 0 to 20"),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 400}, "max_tokens", "allowed is 1 to 195"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": ["a"] * 17}, "stop", "up to 16"),
        ({"stop": ["a" * 257]}, "stop", "longer than 256 characters"),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 25, "n": 8}, "max_tokens", "allowed is 1 to 24"),
        ({"metadata": {"a": "b" * (16 << 10)}}, "metadata", "more than 16384 bytes"),
        ({"metadata": {"a": 1}}, "metadata", "an object of texts"),
        ({"choose": ["yes", "no " * 900]}, "choose", "longer than the"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "a-z"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "type function"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "two tools are called HassTurnOn"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters", "type object",
        ),
        (
            {"tools": [CLOCK, {"type": "function", "function": {"name": "f", "parameters": {
                "type": "object", "properties": {"a": {"type": 3}}}}}]},
            "tools", "the parameters of f cannot be followed",
        ),
        ({"tools": [CLOCK] * 65}, "tools", "up to 64"),
        ({"tool_choice": "auto"}, "tool_choice", "there are no tools"),
        ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice", "none, auto, required"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice", "no tool is called 'f'",
        ),
        ({"tools": [CLOCK], "stop": "."}, "stop", "together with tools"),
        ({"tools": [CLOCK], "logprobs": True}, "logprobs", "together with tools"),
        ({"tools": [CLOCK], "choose": ["a", "b"]}, "choose", "together with tools"),
        ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format", "together with tools"),
        ({"board_tools": True, "tools": [CLOCK]}, "board_tools", "tools of your own"),
        ({"board_tools": True, "stop": "."}, "stop", "together with board_tools"),
        ({"board_tools": True, "n": 2}, "n", "for one answer"),
        ({"functions": [{"name": "f"}]}, "functions", "send tools instead"),
        ({"messages": [*ASK, TOLD]}, "messages[1].tool_call_id", "no call before it"),
        ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "expected the id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALLED]}]}, "messages[0].tool_calls", "only"),
        (
            {"messages": [*ASK, {"role": "assistant", "tool_calls": [CALLED | {"function": {
                "name": "f", "arguments": "[1]"}}]}]},
            "messages[1].tool_calls[0].function.arguments", "object",
        ),
        ({"modalities": ["text", "audio"]}, "modalities", "allowed is text"),
        ({"audio": {"voice": "a"}}, "audio", "null"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "high"),
        ({"service_tier": "priority"}, "service_tier", "auto or default"),
        ({"store": True}, "store", "false"),
        ({"best_of": 2}, "best_of", "does not know this field"),
        ({"think": True}, "think", "does not know this field"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "expected a schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema", "is missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}},
            "response_format", "cannot be followed",
        ),
        ({"choose": ["a", "b"], "top_p": 0.5}, "top_p", "with choose"),
        ({"choose": ["a", "b"], "logprobs": True}, "choose", "logprobs"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "allowed is system, developer"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name", "null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]", "send text",
        ),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, "messages", "shorten it"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "is empty"),
        ({"messages": [{"role": "user", "content": "a" * 262_145}]}, "messages", "allowed is 262144"),
        ({"choose": ["yes"]}, "choose", "allowed are 2 to 64"),
        ({"choose": ["yes", "yes"]}, "choose", "allowed are 2 to 64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_refused_by_name_before_a_stream_begins(
    more: dict[str, Any], param: str, words: str, stream: bool, http: httpx.Client
) -> None:
    if not (stream and "stream_options" in more):
        error = refused(http, CHAT, {"messages": ASK, "stream": stream, **more})
        assert error["param"] == param and words in error["message"]
        assert error["code"] and ("shorten" not in words or error["code"] == "context_length_exceeded")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ["a"] * 3, "n": 3}, "n"),
        ({"prompt": "a " * 900}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"max_tokens": 3}, "prompt"),
    ],
)
def test_completions_refuse_by_name_too(more: dict[str, Any], param: str, http: httpx.Client) -> None:
    assert refused(http, TEXT, more)["param"] == param


def test_several_prompts_with_several_answers_each(http: httpx.Client) -> None:
    prompts = ["1, 2,", "a b c"]
    body = {"prompt": prompts, "n": 2, "echo": True, **FREE}
    reply = http.post(TEXT, json=body).json()
    texts = [choice["text"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [text[:5] for text in texts] == ["1, 2,", "1, 2,", "a b c", "a b c"] and len(set(texts)) == 4
    for i, prompt in enumerate(prompts):
        for k in range(2):
            one = http.post(TEXT, json=FREE | {"prompt": prompt, "seed": 7 + k}).json()
            assert texts[2 * i + k] == f"{prompt}{one['choices'][0]['text']}"
    used = [
        http.post(TEXT, json=FREE | {"prompt": prompt}).json()["usage"]["prompt_tokens"] for prompt in body["prompt"]
    ]
    assert reply["usage"]["prompt_tokens"] == sum(used) and reply["usage"]["completion_tokens"] <= 4 * 12
    stream = chunks(http.post(TEXT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    streamed = ["", "", "", ""]
    for chunk in stream:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts
    assert (
        stream[-1]["choices"] == []
        and stream[-1]["usage"]["completion_tokens"] == reply["usage"]["completion_tokens"]
    )
    assert all(chunk["usage"] is None for chunk in stream[:-1])


def test_of_several_answers_all_are_accepted_or_none(http: httpx.Client) -> None:
    before = http.get("/api/jobs").json()
    assert refused(http, TEXT, {"prompt": ["a", "a " * 900], "max_tokens": 1})["param"] == "prompt"
    assert http.get("/api/jobs").json() == before


def test_logprobs_are_those_of_the_tokens_said(http: httpx.Client) -> None:
    body = chat(http, logprobs=True, top_logprobs=3)
    content = body["choices"][0]["logprobs"]["content"]
    data = b"".join(bytes(token["bytes"]) for token in content)
    assert data.decode("utf-8", "replace") == said(body)[0]
    for token in content:
        top = [other["logprob"] for other in token["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True) and token["logprob"] <= top[0] <= 0
    greedy = chat(http, logprobs=True, top_logprobs=1, temperature=0)["choices"][0]["logprobs"]["content"]
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in greedy)
    every = [t for c in chunks(http.post(CHAT, json={"messages": ASK, **FREE, "logprobs": True, "top_logprobs": 3,
             "stream": True})) for t in ((c["choices"][0]["logprobs"] or {}).get("content") or [])]  # fmt: skip
    assert [token["token"] for token in every] == [token["token"] for token in content]
    text = http.post(TEXT, json={"prompt": "a b", **FREE, "logprobs": 2}).json()["choices"][0]
    assert text["logprobs"]["text_offset"][0] == 0 and len(text["logprobs"]["tokens"]) == len(
        text["logprobs"]["top_logprobs"]
    )
    assert said(chat(http)) == said(body)  # that they are asked for changes no answer


def test_tokens_of_a_stop_string_have_no_logprobs(http: httpx.Client) -> None:
    whole = chat(http, logprobs=True)
    tokens = [token["bytes"] for token in whole["choices"][0]["logprobs"]["content"]]
    plain = [all(byte < 128 for byte in token) for token in tokens]
    at = next(i for i in range(2, len(tokens)) if plain[i - 1] and plain[i] and tokens[i] not in tokens[:i])
    cut = chat(http, logprobs=True, stop=["never", bytes(tokens[at]).decode(), "x" * 30, "y" * 30])
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert [token["bytes"] for token in cut["choices"][0]["logprobs"]["content"]] == tokens[:at]


def test_few_requests_with_logprobs_are_answered_at_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        spool = stack.enter_context(closing(Spool(tmp_path / "spool.db", keep=50)))
        jobs = Jobs(spool, most_waiting=8)
        api = Api(
            jobs, "a model", msgspec.Struct, lambda name: pytest.fail(name), lambda: b"", lambda asked, _: asked,
        )  # fmt: skip
        server = Server(tmp_path / "api.sock", None)
        stack.callback(server.close)
        server.start(api.application([]))
        stack.callback(server.stop)
        stack.callback(jobs.close)
        http = stack.enter_context(httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "api.sock"))))
        body = {"messages": ASK, "logprobs": True, "stream": True}
        with ExitStack() as opened:
            replies = [
                opened.enter_context(http.stream("POST", f"http://flashd{CHAT}", json=body))
                for _ in range(MOST_SCORED)
            ]
            assert all(reply.status_code == 200 for reply in replies)
            refusal = http.post(f"http://flashd{CHAT}", json=body)
            assert refusal.status_code == 429 and refusal.json()["error"]["code"] == "rate_limit_exceeded"
        stack.enter_context(closing(Clerk(jobs)))
        wait(lambda: http.post(f"http://flashd{CHAT}", json=body).status_code == 200)


def test_a_bias_decides_what_is_said(http: httpx.Client) -> None:
    body = chat(http, logit_bias={"65": 100}, logprobs=True)
    assert len({token["token"] for token in body["choices"][0]["logprobs"]["content"]}) == 1
    assert said(chat(http, logit_bias={"65": 0})) == said(chat(http))


def test_penalties_make_repetition_rarer(http: httpx.Client) -> None:
    def different(**more: float) -> int:
        body = chat(http, max_tokens=60, temperature=0, logprobs=True, logit_bias={"65": 8}, **more)
        return len({token["token"] for token in body["choices"][0]["logprobs"]["content"]})

    plain = different()
    assert different(frequency_penalty=2) > plain and different(presence_penalty=2) >= plain
    assert different(frequency_penalty=-2) <= plain


def test_the_same_seed_says_the_same(http: httpx.Client) -> None:
    wish = {
        "frequency_penalty": 0.7,
        "presence_penalty": 0.3,
        "logit_bias": {"70": 2},
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 40,
    }
    assert said(chat(http, **wish)) == said(chat(http, **wish)) != said(chat(http, **wish, **{"min_p": 0.9}))


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "description": "A word.", "schema": {
            "type": "object", "properties": {"word": {"enum": ["yes", "no"]}}, "required": ["word"],
            "additionalProperties": False}}},
    ],
)  # fmt: skip
def test_json_needs_no_switch(wanted: Any, http: httpx.Client) -> None:
    pytest.importorskip("llguidance")
    body = {"messages": ASK, "response_format": wanted, "max_tokens": 60, "temperature": 0}
    reply = http.post(CHAT, json=body)
    if reply.status_code == 400:  # a model of random weights may talk on; a whole answer is JSON
        assert wanted["type"] == "json_object" and "raise max_tokens" in reply.json()["error"]["message"]
    else:
        assert isinstance(json.loads(said(reply.json())[0]), dict)


def test_a_plan_without_room_for_a_grammar_says_what_is_missing(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    asked = request(json_schema={"type": "object"})
    with ExitStack() as stack:
        jobs = Jobs(stack.enter_context(closing(Spool(tmp_path / "spool.db", keep=10))), most_waiting=4)
        bundle = stack.enter_context(Bundle(tiny_bundle))
        prompts, whole = Prompts(bundle), plan_for(bundle, Budget(1 << 40, 64, 1)).whole
        assert whole is not None
        with Engine(bundle, Budget(whole + MIB, 64, 1)) as engine:
            worker = Worker(jobs, engine, prompts, None, Answering(), Notifier())
            words = r"needs 16 MiB of RAM, and the plan leaves [0-2]; set schemas: true"
            with pytest.raises(BadField, match=words) as error:
                worker.fitting(asked)
            assert error.value.param == "response_format"
        with Engine(bundle, Budget(whole + 64 * MIB, 64, 1)) as engine:
            assert Worker(jobs, engine, prompts, None, Answering(), Notifier()).fitting(asked) == asked


def test_openai_s_client(client: openai.OpenAI) -> None:
    more: Any = {"extra_body": {"top_k": 5, "priority": 6}}
    whole = client.chat.completions.create(
        model="tiny llama", messages=ASK, n=3, logprobs=True, top_logprobs=2, user="me", **FREE, **more
    )
    assert len(whole.choices) == 3 and whole.choices[2].logprobs and whole.usage
    assert whole.choices[0].logprobs and whole.choices[0].logprobs.content
    assert math.isfinite(whole.choices[0].logprobs.content[0].logprob)
    stream = client.chat.completions.create(
        model="x", messages=ASK, stream=True, stream_options={"include_usage": True}, **FREE
    )
    every = list(stream)
    assert every[-1].usage and not every[-1].choices and all(chunk.usage is None for chunk in every[:-1])
    assert [chunk.choices[0].delta.role for chunk in every[:-1]].count("assistant") == 1
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="x", messages=ASK, tool_choice="required", tools=[])
    assert (error.value.param, error.value.code) == ("tool_choice", "invalid_value")


CALLS: Any = {"model": "x", "temperature": 1.5, "max_tokens": 200, "tools": [TOOL, CLOCK]}
NAMED: Any = {"type": "function", "function": {"name": "HassTurnOn"}}


def test_tools_are_called_as_openai_s_client_expects(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    one: Any = CALLS | {"tool_choice": NAMED, "parallel_tool_calls": False, "seed": 3}
    choice = client.chat.completions.create(messages=ASK, **one).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "HassTurnOn"
    assert json.loads(call.function.arguments)["area"] in ("hall", "bath")
    chunks = list(client.chat.completions.create(messages=ASK, stream=True, **one))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert [(d.id, d.type, d.function and d.function.name) for d in deltas if d.id] == [
        (deltas[0].id, "function", "HassTurnOn")
    ]
    assert len(deltas) > 3 and {d.index for d in deltas} == {0} and deltas[0].id != call.id
    assert "".join(d.function.arguments or "" for d in deltas if d.function) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "ok"}
    talk: Any = [*ASK, choice.message, result]
    answer = client.chat.completions.create(messages=talk, **CALLS | {"tool_choice": "none", "max_tokens": 5})
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    assert answer.usage and answer.usage.prompt_tokens > 60


def test_calls_may_be_several_or_none_and_are_whole_or_refused(http: httpx.Client) -> None:
    pytest.importorskip("llguidance")
    name = {"type": "function", "function": {"name": "a"}}
    again = {"60": 50}  # what the next call begins with
    one = CALLS | {"tools": [name], "tool_choice": "required", "seed": 2, "max_tokens": 320, "logit_bias": again}
    message = chat(http, **one)["choices"][0]["message"]
    assert len({call["id"] for call in message["tool_calls"]}) == 8
    alone = chat(http, **one, parallel_tool_calls=False)["choices"][0]["message"]
    assert len(alone["tool_calls"]) == 1
    text = chat(http, **CALLS | {"max_tokens": 8, "seed": 1})["choices"][0]
    assert text["message"]["content"] and text["finish_reason"] == "length" and "tool_calls" not in text["message"]
    assert "raise max_tokens" in refused(http, CHAT, {"messages": ASK, **one, "max_tokens": 20})["message"]
    latest = [http.get(f"/api/jobs/{head['id']}").json() for head in http.get("/api/jobs?most=4").json()]
    assert [len(job["result"]["calls"]) for job in latest] == [0, 0, 1, 8]


@pytest.mark.slow
def test_langchain(port: int, daemon: Running) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", model="x", temperature=0.5, max_tokens=8, seed=1,
        max_retries=0,
    )  # fmt: skip
    answer = model.invoke([("system", "Be brief."), ("human", "Hello?")])
    assert answer.usage_metadata["output_tokens"] <= 8 and answer.response_metadata["finish_reason"]
    pieces = list(model.stream("Hello?", stream_usage=True))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.usage_metadata["output_tokens"] <= 8  # counted once
    assert model.bind(logprobs=True).invoke("Hello?").response_metadata["logprobs"]["content"]
    pytest.importorskip("llguidance")
    wish = {"title": "wish", "type": "object", "properties": {"word": {"enum": ["yes", "no"]}}, "required": ["word"],
            "additionalProperties": False}  # fmt: skip
    sure = model.with_structured_output(wish, method="json_schema").bind(max_tokens=40)
    assert sure.invoke("Yes or no?")["word"] in ("yes", "no")
    bound = model.bind_tools([TOOL, CLOCK], tool_choice="HassTurnOn").bind(max_tokens=200)
    whole, streamed = bound.invoke("x"), None
    for piece in bound.stream("x"):
        streamed = piece if streamed is None else streamed + piece
    assert streamed is not None and whole.tool_calls[0]["args"] == streamed.tool_calls[0]["args"]
    assert whole.tool_calls[0]["args"]["area"] in ("hall", "bath")
    messages = [("human", "x"), whole, *({"role": "tool", "tool_call_id": call["id"], "content": "ok"}
                                         for call in whole.tool_calls)]  # fmt: skip
    assert model.bind_tools([CLOCK]).invoke(messages).response_metadata["finish_reason"]


def test_llm(port: int, daemon: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = pytest.importorskip("llm")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: board, model_name: x, api_base: 'http://127.0.0.1:{port}/v1', api_key_name: none}}\n"
    )
    model = llm.get_model("board")
    model.key = "none"
    talk = model.conversation()
    for stream in (True, False):
        response = talk.prompt("Hello?", stream=stream, max_tokens=8, temperature=0.5, seed=3, stop="@@@")
        assert response.text() and response.usage().output <= 8


OPEN_WEBUI = {
    "stream": True, "model": "tiny llama", "stream_options": {"include_usage": True}, "temperature": 0.7,
    "max_tokens": 8,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Who?"},
    ],
}  # fmt: skip
"""A turn of a chat."""

OPEN_WEBUI_TITLE = {
    "model": "tiny llama", "messages": [{"role": "user", "content": "### Task:\nA title."}], "stream": False,
    "max_completion_tokens": 8,
}  # fmt: skip
"""What it asks behind a chat's first answer."""

HOME_ASSISTANT: dict[str, Any] = {
    "model": "tiny llama", "user": "01JD3YB3Z6J8G2", "max_tokens": 8, "top_p": 1.0, "temperature": 0.5,
    "messages": [
        {"role": "system", "content": "You are a voice assistant."},
        {"role": "user", "content": "Is the door open?"},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "user", "content": "Again?"},
    ],
}  # fmt: skip
"""A turn of a conversation agent that speaks OpenAI's chat completions and controls no devices."""

HOME_ASSISTANT_CONTROL = HOME_ASSISTANT | {
    "messages": [*HOME_ASSISTANT["messages"][:2],
                 {"role": "assistant", "content": None, "tool_calls": [CALLED]}, TOLD],
    "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True, "stream": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip
"""A turn of one that does, behind its first call."""

HOME_ASSISTANT_TASK = HOME_ASSISTANT | {
    "max_tokens": 60,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "task", "strict": True,
            "schema": {"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"],
                       "additionalProperties": False},
        },
    },
}  # fmt: skip
"""A task for data with a structure."""


@pytest.mark.parametrize(
    "body", [OPEN_WEBUI, OPEN_WEBUI_TITLE, HOME_ASSISTANT, HOME_ASSISTANT_CONTROL, HOME_ASSISTANT_TASK]
)
def test_shapes_of_well_known_programs(body: dict[str, Any], http: httpx.Client) -> None:
    if "response_format" in body or "tools" in body:
        pytest.importorskip("llguidance")
    reply = http.post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    if body.get("stream"):
        assert chunks(reply)[-1]["usage"]["total_tokens"] > 0
    else:
        assert reply.json()["choices"][0]["message"]["role"] == "assistant"
