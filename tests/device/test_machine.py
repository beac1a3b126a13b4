"""A microcontroller at the cable: JSON lines in, JSON lines out, and nothing it sends that breaks us."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.appliance import Appliance
from device.consoles.machine import MAX_LINE
from device.demo import Cable
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from tests.daemon.fake_worker import Clerk
from tests.device.conftest import Terminal

Make = Callable[..., Appliance]
YAML = """
serial: [{{name: board, port: {port}, mode: machine, charset: ascii}}]
triggers: [{{kind: manual, name: greet, prompt: "Greet."}}]
"""


def line(terminal: Terminal) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(terminal.expect("\n").encode("ascii"))
    return found


def ready(terminal: Terminal) -> None:
    """Opening a port discards what has come before."""
    assert line(terminal) == {"event": "ready"}


def until_end(terminal: Terminal) -> list[dict[str, Any]]:
    lines = [line(terminal)]
    while lines[-1]["event"] not in ("end", "error"):
        lines.append(line(terminal))
    return lines


def test_a_prompt(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    appliance(YAML.format(port=cable.ours))
    ready(terminal)
    clerk = Clerk(jobs, words=["25 ", "°C"])
    terminal.type('{"id": "a", "prompt": "How warm?", "system": "Be brief.", "max_tokens": 5}\r\n')
    lines = until_end(terminal)
    clerk.close()
    assert [x["event"] for x in lines] == ["accepted", "text", "text", "end"]
    assert {x["id"] for x in lines} == {"a"}
    assert lines[-1]["text"] == "25 °C" and lines[-1]["state"] == "done"
    asked = clerk.answered[0].request
    assert [t.content for t in asked.turns] == ["Be brief.", "How warm?"] and asked.max_tokens == 5


def test_tools_of_the_board_and_a_session_that_remembers_them(
    appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs
) -> None:
    tools = "schemas: true\ntools: [{kind: time, name: clock}]\n"
    appliance(tools + YAML.format(port=cable.ours).replace("charset", "tools: [clock], charset"))
    ready(terminal)
    clerk = Clerk(jobs, calls=[[("clock", "{}")]])
    terminal.type('{"prompt": "Late?", "session": "garden"}\n')
    assert "It looked at the clock" in next(x["text"] for x in until_end(terminal) if x["event"] == "did")
    clerk.calls = []
    terminal.type('{"prompt": "And now?", "session": "garden"}\n')
    assert until_end(terminal)[-1]["state"] == "done"
    terminal.type('{"prompt": "Late?", "choose": ["yes", "no"]}\n')
    assert until_end(terminal)[-1]["text"] == "yes"
    clerk.close()
    turns = clerk.answered[-2].request.turns
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant", "user"]
    assert turns[1].calls[0].id == turns[2].call and turns[2].name == "clock"


def test_choose_trigger_status_and_cancel(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    appliance(YAML.format(port=cable.ours))
    ready(terminal)
    clerk = Clerk(jobs, paced=True)
    assert clerk.permits is not None
    clerk.permits.release(4)
    terminal.type('{"id": 1, "prompt": "p", "choose": ["yes", "no"]}\n')
    assert until_end(terminal)[-1]["text"] == "yes"
    terminal.type('{"id": 2, "trigger": "greet"}\n')
    assert until_end(terminal)[-1]["text"] == "one two three"
    terminal.type('{"id": 3, "status": true}\n')
    assert line(terminal)["phase"] in ("idle", "answering", "thinking")
    terminal.type('{"id": 4, "prompt": "p"}\n{"cancel": 4}\n')
    assert until_end(terminal)[-1]["state"] == "cancelled"
    clerk.close()
    assert jobs.recent(1)[0].state is State.CANCELLED


def test_a_session_goes_on_with_what_was_said(appliance: Make, cable: Cable, terminal: Terminal, jobs: Jobs) -> None:
    """A microcontroller need not remember it. One question of a session is answered at a time."""
    appliance(YAML.format(port=cable.ours))
    ready(terminal)
    clerk = Clerk(jobs, words=["so"], paced=True)
    assert clerk.permits is not None
    clerk.permits.release(3)
    for text in ("a", "b"):
        terminal.type(f'{{"prompt": "{text}", "session": "garden", "system": "Be {text}."}}\n')
        until_end(terminal)
    terminal.type('{"prompt": "c", "session": "garden", "new_session": true}\n')
    until_end(terminal)
    third, second, _ = ([f"{t.role}: {t.content}" for t in job.request.turns] for job in jobs.recent(3))
    assert second == ["system: Be b.", "user: a", "assistant: so", "user: b"] and third == ["user: c"]
    terminal.type('{"id": 1, "prompt": "d", "session": "garden"}\n{"id": 2, "prompt": "e", "session": "garden"}\n')
    assert [line(terminal)["event"] for _ in range(2)] == ["accepted", "error"]
    clerk.permits.release(1)
    until_end(terminal)
    clerk.close()


def test_bad_lines_are_refused_in_words(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk, caplog: pytest.LogCaptureFixture
) -> None:
    appliance(YAML.format(port=cable.ours))
    ready(terminal)
    for typed, words in (
        (b"hello", "malformed"), (b'{"prompt": 3}', "Expected `str | null`"), (b'{"promt": "x"}', "unknown field"),
        (b'{"prompt": "x", "prompt": "y"}', "prompt: the name stands twice"),
        (b"{}", "needs one of"), (b'{"prompt": "  "}', "empty"), (b'{"trigger": "none"}', "no trigger is called"),
        (b'{"prompt": "x", "new_session": true}', "needs session"), (b'{"cancel": 7}', "nothing under way"),
        (b"\xff\xfe", "malformed"),
        (b'{"json_schema": ' + b'{"a":' * 5000, "recursion"),
        (b"x" * (MAX_LINE + 70000), "a line of more than"), (b"y" * (MAX_LINE + 1), "a line of more than"),
    ):  # fmt: skip
        terminal.type(typed + b"\n")
        refused = line(terminal)
        assert refused["event"] == "error" and words in refused["message"], (typed[:30], refused)
    assert caplog.text.count("a line that is not understood") == caplog.text.count("a line of more than") == 1
    terminal.type('{"prompt": "fine"}\n')
    assert until_end(terminal)[-1]["state"] == "done"


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_leave_it_serving(
    appliance: Make, cable: Cable, terminal: Terminal, clerk: Clerk, sent: list[bytes]
) -> None:
    if not hasattr(terminal, "started"):
        appliance(YAML.format(port=cable.ours))
        ready(terminal)
        terminal.started = True  # type: ignore[attr-defined]
    terminal.type(b"\n".join(sent) + b"\n" + b'{"id": "mark", "cancel": "mark"}\n')
    while line(terminal).get("id") != "mark":
        pass
