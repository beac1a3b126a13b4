"""A model that thinks before it answers, behind the service: its thoughts have a field of their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from flashd.pack.pack import pack
from tests import tiny
from tests.cli.command import FLASHD
from tests.daemon.running import Running
from tests.daemon.test_openai import chunks
from tests.engine.test_thoughts import ALWAYS

pytestmark = pytest.mark.slow
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "the thesis"}], "max_tokens": 6, "seed": 1}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("thinks")
    bundle = folder / "m.flash"
    pack(tiny.write(folder / "m.gguf", template=ALWAYS), bundle, "int4")
    with Running(folder, bundle) as running:
        running.start()
        yield running


def message(http: httpx.Client, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = http.post("/v1/chat/completions", json=ASKED | more).json()["choices"][0]["message"]
    return found


def test_thoughts_are_off_until_they_are_asked_for(http: httpx.Client) -> None:
    for more in ({}, {"chat_template_kwargs": {"thinking": False}}, {"reasoning_effort": "none"}):
        answer = message(http, **more)
        assert answer["content"] and "reasoning_content" not in answer
    thinks = message(http, **THINK)
    assert thinks["reasoning_content"] and thinks["content"] == ""
    with http.stream("POST", "/v1/chat/completions", json=ASKED | THINK | {"stream": True}) as reply:
        reply.read()
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks(reply)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thinks["reasoning_content"]
    assert not any(delta.get("content") for delta in deltas)
    back = [*ASKED["messages"], {"role": "assistant", **thinks}, {"role": "user", "content": "he"}]
    assert message(http, messages=back)["content"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"other": True}}, "chat_template_kwargs.other"),
        (THINK | {"reasoning_effort": "none"}, "chat_template_kwargs"),
        (THINK | {"choose": ["a", "b"]}, "chat_template_kwargs"),
        (THINK | {"response_format": {"type": "json_object"}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_honoured_is_refused(more: dict[str, Any], param: str, http: httpx.Client) -> None:
    reply = http.post("/v1/chat/completions", json=ASKED | more)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_the_command_shows_thoughts_beside_the_answer(daemon: Running) -> None:
    env = os.environ | {"FLASHD_SOCKET": str(daemon.socket)}

    def ask(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*FLASHD, "ask", "the thesis", "--max-tokens", "6", "--seed", "1", *more]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env)

    plain, thinks = ask(), ask("--think")
    assert plain.stdout.strip() and not plain.stderr
    assert not thinks.stdout.strip() and thinks.stderr.strip()
    said = json.loads(ask("--think", "--json").stdout)
    assert said["text"] == "" and said["thoughts"]
    own = ["--model", str(daemon.folder / "m.flash"), "--no-snapshots", "--temperature", "0"]
    assert json.loads(ask("--think", "--json", *own).stdout)["thoughts"]
    assert "thoughts" not in json.loads(ask("--json", *own).stdout)


def test_the_configuration_turns_them_on_and_jobs_keep_them(daemon: Running, tmp_path: Path) -> None:
    with Running(tmp_path, daemon.folder / "m.flash") as running:
        running.config.write_text(running.config.read_text().replace("answer: {", "answer: {think: true, "))
        running.start()
        with running.http() as http:
            thinks = message(http)
            assert thinks["reasoning_content"] and not thinks["content"]
            result = running.job(http, http.get("/api/jobs").json()[0]["id"])["result"]
            assert (result["thoughts"], result["text"]) == (thinks["reasoning_content"], "")
            assert message(http, chat_template_kwargs={"enable_thinking": False})["content"]
