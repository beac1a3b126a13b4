"""The daemon as a process: systemd's protocol on a real socket, signals, the API through OpenAI's own client."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpiozero
import httpx2 as httpx
import openai
import pexpect
import pytest
import serial
from gpiozero.pins.mock import MockFactory

from flashd.bundle.reader import Bundle
from flashd.cli.main import main
from flashd.config.settings import parse
from flashd.daemon.job import MAX_TEXT
from flashd.errors import ConfigError, MemoryTaken
from flashd.pack import default_model
from flashd.serve import Daemon
from flashd.system.memory import MIB
from tests.daemon.running import PATIENCE, Running
from tests.waiting import wait

TRIGGERS = """
schemas: true
triggers:
  - {kind: button, name: front, pin: 4, bounce: 0, prompt: "Say hello."}
  - {kind: manual, name: plants, prompt: "Is grass green? Answer yes or no.", choose: ["yes", "no"]}
"""


@pytest.fixture(scope="module")
def daemon(packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("daemon"), packed["int4"], TRIGGERS)
    running.start()
    yield running
    running.close()


ASK: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_openai_client(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.owned_by == "flashd" and client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="no model is called 'gpt'"):
        client.models.retrieve("gpt")
    whole = client.chat.completions.create(model="any", messages=ASK, max_tokens=16)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.choices[0].finish_reason == "stop" and whole.usage is not None and whole.usage.completion_tokens == 7
    chunks = list(client.chat.completions.create(model="any", messages=ASK, max_tokens=4, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "The capital of France"
    assert chunks[-1].choices[0].finish_reason == "length"
    text = client.completions.create(model="any", prompt="1, 2, 3, 4,", max_tokens=3)
    assert text.choices[0].text.startswith(" 5")


def test_openai_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"], "additionalProperties": False,
    }  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema}}
    answer = client.chat.completions.create(
        model="any",
        messages=ASK,
        max_tokens=40,
        response_format=wanted,
    )
    assert json.loads(answer.choices[0].message.content or "")["city"] == "Paris"


def test_bad_bodies_are_refused_in_openai_s_shape(http: httpx.Client, client: openai.OpenAI) -> None:
    for body, words in (
        (b"", "truncated"), (b"{}", "messages"), (b'{"messages": []}', "length >= 1"), (b"\xff", "malformed"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "Invalid enum"), (b"[" * 100_000, "array"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "empty"), (b"x" * (2 << 20), "more than 1048576 bytes"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "'image_url' is not understood"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens"),
    ):  # fmt: skip
        reply = http.post("/v1/chat/completions", content=body)
        assert reply.status_code == 400, body[:50]
        assert words in reply.json()["error"]["message"], reply.text
    assert http.get("/nowhere").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="any", messages=ASK, max_tokens=-1)


def test_who_goes_away_in_the_middle_of_a_request_is_no_fault(daemon: Running, http: httpx.Client) -> None:
    before = len(http.get("/api/jobs").json())
    for part in (b"", b'{"messages": ['):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.socket))
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + part)
            time.sleep(0.1)  # so that the daemon reads on
    assert http.get("/health").json() == {"status": "ok"}
    assert len(http.get("/api/jobs").json()) == before
    assert "Traceback" not in daemon.log.read_text()


def test_a_prompt_that_does_not_fit_fails_in_words(http: httpx.Client) -> None:
    before = http.get("/api/jobs").json()
    reply = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "word " * 800}]})
    error = reply.json()["error"]
    assert http.get("/api/jobs").json() == before  # it is refused before it is kept
    assert reply.status_code == 400 and "the context room for 511" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_message_that_the_spool_would_not_give_back_is_refused(http: httpx.Client) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a" * (MAX_TEXT + 1)}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * (MAX_TEXT + 1)}]}),
    ):
        reply = http.post(path, json=body)
        assert reply.status_code == 400
        assert re.search(f"allowed is {MAX_TEXT}|shorten it", reply.json()["error"]["message"])


def test_of_a_talk_that_is_too_long_the_oldest_is_forgotten(daemon: Running, http: httpx.Client) -> None:
    talk = [{"role": "system", "content": "Be brief."}]
    for i in range(6):
        talk += [{"role": "user", "content": f"{i}: " + "word " * 80}, {"role": "assistant", "content": "Yes."}]
    body = {"messages": [*talk, *ASK], "max_tokens": 16}
    assert "context room" in http.post("/v1/chat/completions", json=body).text
    reply = http.post("/v1/chat/completions", json=body | {"forget": True})
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"]
    assert len(daemon.job(http, int(reply.headers["X-Job"]))["request"]["turns"]) == 6  # no more than that is kept
    assert reply.json()["flashd"]["forgotten"] == 8
    used = reply.json()["usage"]["prompt_tokens"]
    two = http.post("/v1/chat/completions", json=body | {"messages": [talk[0], *talk[9:], *ASK]}).json()["usage"]
    assert used == two["prompt_tokens"]  # four exchanges went at once, the system's words stayed


def test_decisions_come_with_their_probabilities(http: httpx.Client) -> None:
    reply = http.post("/v1/chat/completions", json={"messages": ASK, "choose": ["Paris", "Rome", "Parma"]}).json()
    p = reply["flashd"]["probabilities"]
    assert reply["choices"][0]["message"]["content"] == "Paris"
    assert set(p) == {"Paris", "Rome", "Parma"} and abs(sum(p.values()) - 1) < 1e-6 and p["Paris"] > 0.5


def test_a_button_and_a_named_trigger_start_jobs(daemon: Running, http: httpx.Client) -> None:
    number = http.post("/api/triggers/plants").json()["job"]
    assert daemon.ended(http, number)["result"]["text"] in ("yes", "no")
    http.post("/demo/press/4")
    job = daemon.ended(http, number + 1)
    assert job["request"]["source"] == "trigger:front" and job["state"] == "done"
    assert http.post("/api/triggers/none").status_code == 404


def test_a_cancel_takes_effect_at_once(daemon: Running, http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Count to a thousand."}], "max_tokens": 400, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        number = int(reply.headers["X-Job"])
        lines = reply.iter_lines()
        next(line for line in lines if '"delta": {"content"' in line)
        with daemon.http() as other:
            assert other.request("DELETE", f"/api/jobs/{number}").json() == {"cancelled": True}
        rest = list(lines)
    assert any("cancelled" in line for line in rest)
    job = daemon.ended(http, number)
    assert job["state"] == "cancelled" and job["result"]["figures"]["tokens"] < 100


def test_a_client_that_goes_away_cancels_its_job(daemon: Running, http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Count to a thousand."}], "max_tokens": 400, "stream": True}
    with daemon.http() as other, other.stream("POST", "/v1/chat/completions", json=body) as reply:
        number = int(reply.headers["X-Job"])
        next(reply.iter_lines())
    assert daemon.ended(http, number)["state"] == "cancelled"


def test_metrics_status_and_health(http: httpx.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    assert families["flashd_tokens"].samples[0].value > 0
    budget = families["flashd_memory_budget_bytes"].samples[0].value
    assert 0 < families["flashd_peak_bytes"].samples[0].value <= budget == 600 << 20
    assert http.get("/health").json() == {"status": "ok"}
    status = http.get("/api/status").json()
    assert status["model"]["neurons in RAM"] == "100 %" and status["triggers"] == ["front", "plants"]


def flashd(daemon: Running, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashd", *args], capture_output=True, text=True, check=False,
        env=os.environ | {"FLASHD_SOCKET": str(daemon.socket)},
    )  # fmt: skip


def test_the_command_asks_the_daemon(daemon: Running) -> None:
    asked = flashd(daemon, "ask", "What is the capital of France?", "--max-tokens", "16")
    assert (asked.returncode, asked.stdout) == (0, "The capital of France is Paris.\n")
    refused = flashd(daemon, "ask", "word " * 800)
    assert refused.returncode == os.EX_USAGE and "the context room for 511" in refused.stderr
    spool = ["--spool", str(daemon.folder / "spool.db")]
    line = flashd(daemon, "jobs", *spool).stdout.splitlines()[0]
    assert "The capital of France is Paris." in line
    number = line.split()[0]
    shown = flashd(daemon, "show", number, *spool).stdout
    assert "user: What is the capital of France?" in shown and "first token after" in shown
    flashd(daemon, "ask", "Tell me a story.")  # what is not said is as the configuration has it
    assert (
        json.loads(flashd(daemon, "jobs", *spool, "--json", "--most", "1").stdout)[0]["result"]["figures"]["tokens"]
        == 8
    )
    assert flashd(daemon, "show", "99999", *spool).returncode == os.EX_NOINPUT
    dead = subprocess.run(
        [sys.executable, "-m", "flashd", "ask", "x"], capture_output=True, text=True, check=False,
        env=os.environ | {"FLASHD_SOCKET": str(_dead_socket(daemon.folder))},
    )  # fmt: skip
    assert dead.returncode == os.EX_UNAVAILABLE and "start it with: sudo systemctl start flashd" in dead.stderr


def test_what_an_answer_cost_is_the_daemon_s_to_say(daemon: Running) -> None:
    ask = ("ask", "What is the capital of France?")
    facts = json.loads(flashd(daemon, *ask, "--max-tokens", "16", "--json").stdout)
    assert (facts["text"], facts["finish"], facts["tokens"]) == ("The capital of France is Paris.", "stop", 7)
    assert facts["memory_bytes"] == 600 << 20
    cost = flashd(daemon, *ask, "--max-tokens", "2", "--stats")
    assert cost.stdout == "The capital\n" and "decode    2 tokens" in cost.stderr
    assert f"{facts['prompt_tokens'] + facts['reused_tokens']:.0f} more were kept" in cost.stderr
    assert "ended by length" in cost.stderr and "600 allowed" in cost.stderr


def _dead_socket(folder: Path) -> Path:
    """A socket that somebody left behind."""
    path = folder / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    return path


def test_systemd_is_told(packed: dict[str, Path], tmp_path: Path) -> None:
    """Loading in steps, ready when a prompt can be answered, the watchdog fed, reload, a clean stop."""
    with Running(tmp_path, packed["int4"]) as daemon:
        told = daemon.start(watchdog=2)
        assert any("STATUS=loading 5" in t for t in told) and told.index("WATCHDOG=1") < len(told) - 1
        with daemon.http() as http:
            assert http.get("/health").status_code == 200
            daemon.told_until("WATCHDOG=1")
            reply = http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 4})
            assert reply.status_code == 200
            daemon.told_until("STATUS=answering job 1 of api")
            daemon.told_until("STATUS=idle")
        daemon.config.write_text(daemon.config.read_text() + TRIGGERS)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        told = daemon.told_until("READY=1")
        assert any("RELOADING=1" in t and "MONOTONIC_USEC=" in t for t in told)
        with daemon.http() as http:
            assert http.get("/api/status").json()["triggers"] == ["front", "plants"]
        daemon.config.write_text("modle: x")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.told_until("READY=1")
        assert (
            "not reloaded, all is as it was" in daemon.log.read_text()
            and "'modle' is not known" in daemon.log.read_text()
        )
        assert daemon.stop() == 0
        daemon.told_until("STOPPING=1")
        assert not daemon.socket.exists()


def test_a_stop_while_the_model_loads_is_obeyed(packed: dict[str, Path], tmp_path: Path) -> None:
    """A model takes minutes to load from a slow card, and systemd kills after half a one."""
    with Running(tmp_path, packed["int4"]) as daemon:
        daemon.deaf_from = "STATUS=loading"
        daemon.start(until="STATUS=loading")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)  # it waits in the middle of loading for systemd to read on
        daemon.deaf_from = ""
        assert daemon.process.wait(60) == 0
        daemon.process = None
        assert "ready" not in daemon.log.read_text() and not daemon.socket.exists()


def test_a_hang_starves_the_watchdog(packed: dict[str, Path], tmp_path: Path) -> None:
    """No timer feeds it: while the job that runs does nothing, because nobody takes its words, systemd hears nothing.

    The hang is real: the spool is locked by another writer, so the worker waits in its commit.
    """
    with Running(tmp_path, packed["int4"]) as daemon:
        daemon.start(watchdog=0.4)
        daemon.told_until("WATCHDOG=1")
        with sqlite3.connect(tmp_path / "spool.db", isolation_level=None) as other, daemon.http() as http:
            with http.stream(
                "POST", "/v1/chat/completions", json={"messages": ASK, "max_tokens": 200, "stream": True}
            ):
                daemon.told_until("STATUS=answering")
                other.execute("BEGIN IMMEDIATE")
                daemon.wait_for_silence(2.0)
                other.execute("ROLLBACK")
            daemon.told_until("WATCHDOG=1")


def test_a_stop_keeps_the_running_job(packed: dict[str, Path], tmp_path: Path) -> None:
    with Running(tmp_path, packed["int4"]) as daemon:
        daemon.start()
        with daemon.http() as http:
            story = [{"role": "user", "content": "Tell a long story."}]
            with http.stream(
                "POST", "/v1/chat/completions", json={"messages": story, "max_tokens": 300, "stream": True}
            ):
                time.sleep(0.5)
                assert daemon.stop() == 0
        daemon.start()
        with daemon.http() as http:
            job = daemon.ended(http, 1)
        assert job["state"] == "done" and job["attempts"] == 1 and len(job["result"]["text"]) > 100


DRIVES = """
triggers:
  - {kind: manual, name: plants, prompt: "Water?", choose: [water, wait],
     drive: {pin: 8, answer: water, active_high: false}}
"""


def test_a_stop_waits_for_a_hook_and_a_kill_leaves_it_the_whole_job(packed: dict[str, Path], tmp_path: Path) -> None:
    begun, told = tmp_path / "begun", tmp_path / "told"
    slow = f"touch {begun}; sleep 1; cat > {told}.part && mv {told}.part {told}"
    settings = f"schemas: true\noutputs: [{{kind: hook, event: failed, timeout: 120, command: [sh, -c, '{slow}']}}]"
    # its JSON is cut after a token
    asked = {
        "messages": [{"role": "user", "content": "Name a sea."}], "max_tokens": 1, "stop": ["long " * 50],
        "response_format": {"type": "json_object"},
    }  # fmt: skip
    with Running(tmp_path, packed["int4"], settings) as daemon, daemon.http() as http:
        for number in (signal.SIGTERM, signal.SIGKILL):
            daemon.start()
            assert http.post("/v1/chat/completions", json=asked).status_code == 400
            wait(begun.exists, PATIENCE)
            daemon.stop(number)
            if number == signal.SIGKILL:
                wait(told.exists, PATIENCE)
            assert json.loads(told.read_text())["state"] == "failed"
            begun.unlink()
            told.unlink()


@pytest.mark.parametrize("became", ["triggers: []", "modle: x", None])
def test_safe_turns_off_what_a_killed_daemon_held(
    became: str | None, packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the unit runs it, whatever has become of the configuration since the start."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    with Running(tmp_path, packed["int4"], DRIVES) as daemon:
        daemon.start(until="STATUS=loading")  # pins are held from here on
        daemon.stop(signal.SIGKILL)
        if became is None:
            daemon.config.unlink()
        else:
            daemon.config.write_text(became)
        pins = MockFactory()
        monkeypatch.setattr(gpiozero.Device, "pin_factory", pins)
        pin = pins.pin(8)
        pin.function, pin.state = "output", False  # on: what the killed one left
        pin.clear_states()
        assert main(["safe", "--config", str(daemon.config)]) == 0
        assert [bool(s.state) for s in pin.states][:2] == [False, True]


def test_memory_that_somebody_else_has_is_waited_for(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit tries again what ends with 75, and never what ends with 78."""
    monkeypatch.setattr("flashd.engine.engine.available_memory", lambda: 40 * MIB)
    with Bundle(packed["int4"]) as bundle:
        for text, error in (("", MemoryTaken), ("memory: 40M", ConfigError)):
            with pytest.raises(error, match=r"the smallest that works is|at the least"):
                Daemon(parse(text), lambda: parse(""))._load(bundle, None)
    unit = (Path(__file__).parents[2] / "deploy" / "flashd.service").read_text()
    (never,) = (line.split("=")[1].split() for line in unit.splitlines() if line.startswith("RestartPrevent"))
    assert str(ConfigError.exit_code) in never and str(MemoryTaken.exit_code) not in never


def test_a_daemon_that_cannot_start_says_why(packed: dict[str, Path], tmp_path: Path) -> None:
    for text, code, words in (
        ("memory: 40M", os.EX_CONFIG, "the smallest that works is"),
        ("model: /none.flash", os.EX_NOINPUT, "/none.flash"),
        ("triggers: [{kind: manual, name: a, prompt: '{{ x }}'}]", os.EX_CONFIG, "prompt: it names 'x'"),
        ("nonsense: 1", os.EX_CONFIG, "line 1: 'nonsense' is not known"),
    ):
        config = tmp_path / "flashd.yaml"
        model = "" if "model" in text else f"\nmodel: {packed['int4']}"
        config.write_text(f"{text}{model}\napi: {{socket: {tmp_path}/s}}\nspool: {{path: {tmp_path}/db}}\n")
        done = subprocess.run(
            [sys.executable, "-m", "flashd", "serve", "--config", str(config)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.systemd
@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="needs systemd's tools")
@pytest.mark.parametrize("ports", [True, False])
def test_socket_activation(ports: bool, packed: dict[str, Path], tmp_path: Path) -> None:
    """systemd holds the sockets: a client that comes before the model is loaded waits for it.

    Where it does not hold those that the configuration names, that is said.
    """
    port, network = _free_port(), _free_port()
    with Running(tmp_path, packed["int4"]) as daemon:
        text = daemon.config.read_text()
        daemon.config.write_text(
            text.replace(
                "flashd.sock}", (f"flashd.sock, loopback: {port}, network: {{port: {network}, code: 493817}}}}")
            )
        )
        held = tmp_path / "held.sock"
        listen = ["-l", str(held), *(["-l", f"127.0.0.1:{port}", "-l", f"0.0.0.0:{network}"] if ports else [])]
        module = ["-m", "tests.daemon.appliance_process", str(daemon.config)]
        with daemon.log.open("ab") as log:
            process = subprocess.Popen(["systemd-socket-activate", *listen, sys.executable, *module], stderr=log)
        until = time.monotonic() + 30
        while not held.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        transport = httpx.HTTPTransport(uds=str(held))
        with httpx.Client(transport=transport, base_url="http://flashd", timeout=60) as http:
            assert http.get("/health").json() == {"status": "ok"}
        if ports:
            form = httpx.get(f"http://127.0.0.1:{network}/")
            assert form.status_code == 401 and "PIN" in form.text
            at = f"http://127.0.0.1:{port}/health"
            assert httpx.get(at).json() == {"status": "ok"}
            assert httpx.get(at, headers={"Host": f"localhost:{port}"}).status_code == 200
            assert httpx.get(at, headers={"Origin": f"http://127.0.0.1:{port}"}).status_code == 200
            for stranger in ({"Host": "flashd.example"}, {"Origin": "http://flashd.example"}, {"Origin": "null"}):
                assert httpx.get(at, headers=stranger).status_code == 403
        else:
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.1:{port}/health")
        for where in (f"127.0.0.1:{port}", f"0.0.0.0:{network}"):
            assert (f"systemd does not listen on {where};" in daemon.log.read_text()) is not ports
        assert "behind its PIN; nothing of it is encrypted" in daemon.log.read_text()
        process.terminate()
        assert process.wait(60) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_demo(packed: dict[str, Path], tmp_path: Path) -> None:
    """As a person tries it with no board: the cable, the button, Ctrl-C."""
    cache = tmp_path / "flashd"
    cache.mkdir()
    embedded_name = default_model.bundle_path().name
    (cache / embedded_name).symlink_to(packed["int4"])
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    demo = pexpect.spawn(sys.executable, ["-m", "flashd", "serve", "--demo"], env=env, timeout=60, encoding="utf-8")
    demo.expect(r"the cable    screen (\S+)")
    cable = demo.match.group(1)
    demo.expect("Ctrl-C ends the demo")
    line = serial.Serial(cable, timeout=30)
    line.write(b"What is the capital of France?\r")
    _, said = line.read_until(b"\r> ").split(b"\r\n", 1)  # the question comes back first; the answer is random
    assert len(said.split()) > 3
    line.close()
    assert httpx.post("http://127.0.0.1:8765/demo/press/17").json() == {"pressed": 17}
    assert httpx.post("http://127.0.0.1:8765/demo/press/99").json() == {
        "error": "there is nothing on pin 99; what can be touched: button 17, door 27"
    }
    demo.expect("button 17: pressed")
    demo.expect(r"button 17: up after [0-9.]+ s")
    demo.expect("The button “front” asks: Say hello to whoever has just pressed the button.")
    demo.expect(r"the answer: \S+")
    demo.expect("LED 22 ● [0-9.]+ s  pin 5 ○ off .*  button 17 ○ .*  door 27 ○ closed [0-9.]+ ")
    demo.sendintr()
    demo.expect(pexpect.EOF)
    assert demo.wait() == 0, demo.before  # not close alone, which kills what is slow to end
    demo.close()
    assert not list(tmp_path.glob("flashd-demo-*"))  # it leaves nothing behind
