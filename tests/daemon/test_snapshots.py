"""The daemon is killed and stopped: the next one pays for no token of what was asked often, nor of a chat so far."""

from __future__ import annotations

import signal
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


def test_snapshots_can_be_turned_off(tiny_bundle: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_bundle, "snapshots: false\n") as running:
        running.start()
        with running.http() as http:
            first, second = (ask(http, "How are the plants?") for _ in range(2))
            assert first[0] == second[0]
        assert running.stop() == 0
    assert not (tmp_path / "cache" / "flashd" / "snapshots").exists()
