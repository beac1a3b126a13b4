"""The daemon is killed and stopped: the next one pays for no token of what was asked often, nor of a chat so far."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.daemon.running import Running
from tests.waiting import wait

pytestmark = pytest.mark.slow

SYSTEM = {"role": "system", "content": "You are a thoughtful gardener, and brief."}


def ask(http: httpx.Client, *texts: str) -> tuple[str, int]:
    """What is said, and how many of the prompt's tokens were kept."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    reply = http.post("/v1/chat/completions", json={"messages": [SYSTEM, *turns], "max_tokens": 4})
    assert reply.status_code == 200, reply.text
    kept = int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    return str(reply.json()["choices"][0]["message"]["content"]), kept


def figures(running: Running, http: httpx.Client, number: int) -> dict[str, Any]:
    job = running.ended(http, number)
    assert job["state"] == "done", job
    found: dict[str, Any] = job["result"]["figures"]
    return found


def test_a_restart_pays_for_new_tokens_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    running = Running(tmp_path, tiny_bundle)
    kept = tmp_path / "cache" / "flashd" / "snapshots"
    with running:
        running.start()
        with running.http() as http:
            first, _ = ask(http, "How are the plants?")
            wait(lambda: (kept / "asked.json").exists(), 60)
            assert not list(kept.glob("*.kv"))
            ask(http, "How is the weather?")  # the system prompt came twice
            wait(lambda: len(list(kept.glob("*.kv"))) == 1, 60)
            ask(http, "How are the plants?")  # and so did a whole question
            wait(lambda: len(list(kept.glob("*.kv"))) == 2, 60)
        running.stop(signal.SIGKILL)
        running.start()
        with running.http() as http:
            again, reused = ask(http, "How are the plants?")
            whole = figures(running, http, 4)
            assert again == first and reused == whole["reused_tokens"]
            assert whole["reused_tokens"] > 30 and whole["prompt_tokens"] == 0
            assert f"flashd_reused_tokens_total {whole['reused_tokens']:.1f}" in http.get("/metrics").text
            second, _ = ask(
                http, "How are the plants?", first, "Tell me more about the thesis, and of all the others."
            )
        assert running.stop() == 0
        running.start()
        with running.http() as http:
            chat = ("How are the plants?", first, "Tell me more about the thesis, and of all the others.", second)
            ask(http, *chat, "Thanks.")
            last, before = figures(running, http, 6), figures(running, http, 5)
            # what was said last is put into tokens again, and may be cut otherwise
            assert before["prompt_tokens"] + before["reused_tokens"] - 16 <= last["reused_tokens"]
            assert last["prompt_tokens"] > 0
    text = running.log.read_text()
    assert "Traceback" not in text and "made again" not in text


def test_a_session_outlives_a_restart(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said comes from the spool, and its keys and values from one snapshot. Its client sends what is new."""
    kept = tmp_path / "cache" / "flashd" / "snapshots"
    with Running(tmp_path, tiny_bundle) as running:
        running.start()
        with running.http() as http:
            called = call_of(http, session="pump")
            said = [in_session(http, text, session="garden") for text in ("How are the plants?", "And the soil?")]
            refused = http.post("/v1/chat/completions", json=body("x", session="a/b"))
            assert refused.status_code == 400 and "session" in refused.text
        assert not list(kept.glob("*session*")) and running.stop() == 0
        (snapshot,) = kept.glob("*session*.kv")
        running.start()
        chat = flashd_chat(running, monkeypatch, "--resume", "garden")
        assert chat.communicate("Thanks.\n/reset\nWho are you?\n", timeout=60)[0].strip()
        with running.http() as http:
            jobs = [running.ended(http, number) for number in (4, 5)]
        asked, anew = ([turn["content"] for turn in job["request"]["turns"]] for job in jobs)
        assert asked == ["How are the plants?", said[0], "And the soil?", said[1], "Thanks."]
        assert anew == ["Who are you?"]
        assert [path.name for path in kept.glob("*session*")] == [snapshot.name]
        cost = jobs[0]["result"]["figures"]
        assert cost["reused_tokens"] > 40 and cost["card_bytes"] >= snapshot.stat().st_size // 2, cost
        with running.http() as http:
            pumped = {"role": "tool", "tool_call_id": called["id"], "content": "The pump is on."}
            strange = body("x", session="pump") | {"messages": [pumped | {"tool_call_id": "call_9_9"}]}
            reply = http.post("/v1/chat/completions", json=strange)
            assert reply.status_code == 400 and "no call that session pump waits for has the id" in reply.text
            in_session(http, "x", session="pump", messages=[pumped])
            in_session(http, "And now?", session="pump")
            turns = running.ended(http, 7)["request"]["turns"]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant", "user"]
        assert turns[1]["calls"][0]["name"] == turns[2]["name"] == "pump" and turns[2]["content"] == "The pump is on."
        assert running.stop() == 0


def call_of(http: httpx.Client, **more: object) -> dict[str, Any]:
    """A call that the model must make."""
    tools = [{"type": "function", "function": {"name": "pump"}}]
    asked = body("Water!", tools=tools, tool_choice="required") | {"max_tokens": 60} | more
    reply = http.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    call: dict[str, Any] = reply.json()["choices"][0]["message"]["tool_calls"][0]
    return call


def body(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}


def in_session(http: httpx.Client, text: str, **more: object) -> str:
    reply = http.post("/v1/chat/completions", json=body(text, **more))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def flashd_chat(running: Running, monkeypatch: pytest.MonkeyPatch, *options: str) -> subprocess.Popen[str]:
    monkeypatch.setenv("FLASHD_SOCKET", str(running.socket))
    command = [sys.executable, "-m", "flashd", "chat", "--max-tokens", "4", *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_snapshots_can_be_turned_off(tiny_bundle: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_bundle, "snapshots: false\n") as running:
        running.start()
        with running.http() as http:
            first, second = (ask(http, "How are the plants?") for _ in range(2))
            assert first[0] == second[0]
        assert running.stop() == 0
    assert not (tmp_path / "cache" / "flashd" / "snapshots").exists()
