"""`flashd chat` with a daemon that runs, at a terminal and on a serial line of its own."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from pexpect import fdpexpect

from device.consoles.port import Port
from flashd.config.settings import Serial
from tests.daemon.running import PATIENCE, Running
from tests.waiting import wait

PROMPT = "\r\n\r> \x1b\\[K"

STORY = "Write a long story about a lighthouse keeper and his daughter, with many details."


@pytest.fixture
def daemon(packed: dict[str, Path], tmp_path: Path) -> Iterator[Running]:
    """One whose answers are long enough to be stopped."""
    with Running(tmp_path, packed["int4"], most=1) as running:
        running.config.write_text(running.config.read_text().replace("max_tokens: 8", "max_tokens: 120"))
        running.start()
        yield running


def environment(daemon: Running) -> dict[str, str]:
    """In which a model of one's own would be none."""
    nothing = str(daemon.folder / "nothing")
    return os.environ | {"FLASHD_SOCKET": str(daemon.socket), "XDG_CACHE_HOME": nothing, "TERM": "dumb"}


def states(daemon: Running) -> list[tuple[str, str]]:
    """Of all jobs, the first one first, how they stand and the last thing that was asked."""
    with daemon.http() as http:
        jobs = http.get("/api/jobs").json()
    return [(job["state"], job["prompt"]) for job in reversed(jobs)]


def last_turns(daemon: Running) -> list[str]:
    with daemon.http() as http:
        latest = daemon.job(http, http.get("/api/jobs").json()[0]["id"])
    return [turn["content"] for turn in latest["request"]["turns"]]


@pytest.fixture
def chat(daemon: Running) -> Iterator[pexpect.spawn]:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "flashd", "chat"],
        encoding="utf-8",
        timeout=PATIENCE,
        env=environment(daemon),
        dimensions=(24, 250),
    )
    child.expect("/help says more." + PROMPT)
    yield child
    child.close(force=True)


def test_a_talk_is_the_daemons(daemon: Running, chat: pexpect.spawn) -> None:
    chat.sendline("What is the capital of France?")
    chat.expect("The capital of France is Paris." + PROMPT)
    chat.sendline("What is the capital of Italy?")
    chat.expect("Rome.*" + PROMPT)
    assert last_turns(daemon)[-3:] == [
        "What is the capital of France?", "The capital of France is Paris.", "What is the capital of Italy?",
    ]  # fmt: skip
    chat.sendline("/reset")
    chat.expect(PROMPT)
    chat.sendline("What is the capital of France?")
    chat.expect("The capital of France is Paris." + PROMPT)
    assert "What is the capital of Italy?" not in last_turns(daemon)
    chat.sendline("/quit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_ctrl_c_stops_the_answer_and_not_the_talk(daemon: Running, chat: pexpect.spawn) -> None:
    chat.sendline(STORY)
    chat.expect("lighthouse")  # the echo
    chat.expect("waiting")
    chat.expect("[A-Z][a-z]+ ")
    chat.sendintr()
    chat.expect(PROMPT)
    wait(lambda: states(daemon) == [("cancelled", STORY)], PATIENCE)
    chat.sendline("What is the capital of France?")
    chat.expect("Paris")


def test_what_is_typed_while_it_answers_is_kept(daemon: Running, chat: pexpect.spawn) -> None:
    chat.send(f"{STORY}\r")
    chat.expect("many details.\r\n")
    chat.expect("[A-Z][a-z]+ ")
    chat.send("What is the capital of Frnce?\x1b[D\x1b[D\x1b[D\x1b[D")
    chat.expect("[a-z]+ [a-z]+ ")
    chat.sendintr()
    chat.expect(r"\(stopped\)" + PROMPT)
    wait(lambda: states(daemon) == [("cancelled", STORY)], PATIENCE)
    chat.send("a\r")
    chat.expect("Paris.*" + PROMPT)
    first, part, second, _ = *last_turns(daemon), ""
    assert first == STORY and part and second == "What is the capital of France?"
    chat.send("\x1b[A\x1b[A\r")  # the story again
    chat.expect("many details.\x1b\\[K\r\n")
    chat.expect("[A-Z][a-z]+ ")
    chat.send("What is 1 + 1?\r/help\r")  # two lines, which come one after the other when this has ended
    chat.expect("What is 1 \\+ 1\\?\r\n")
    chat.expect(PROMPT + "/help\r\n")
    chat.expect("/reset           forget")


def test_a_talk_that_fills_the_context_forgets_its_oldest_messages_and_says_so(
    daemon: Running, chat: pexpect.spawn
) -> None:
    said = ""
    for i in range(8):
        chat.send(f"{i} {'red green blue ' * 12}: which colours are these?\r")
        chat.expect("which colours are these.\r\n")
        chat.expect(PROMPT)
        said += chat.before
    assert re.search(r"\(the context is full: the oldest \d+ messages are forgotten\)", said), said
    assert "flashd: " not in said
    # the client forgets what the daemon left out: it is not asked about it again
    assert 1 <= len(last_turns(daemon)) <= 9


def test_a_daemon_that_dies_in_an_answer_is_said_and_the_next_one_answers(
    daemon: Running, chat: pexpect.spawn
) -> None:
    chat.sendline(STORY)
    chat.expect("keeper")
    chat.expect("[a-z]+ [a-z]+ [a-z]+ ")
    daemon.stop(signal.SIGKILL)
    chat.expect("\r\nflashd: the daemon went away in the middle of the answer[^\r\n]*" + PROMPT)
    chat.sendline("Are you there?")
    chat.expect("flashd: [^\r\n]*no daemon answers[^\r\n]*" + PROMPT)
    daemon.start()
    chat.sendline("What is the capital of France?")
    chat.expect("Paris")


def test_ask_says_that_an_answer_is_not_whole(daemon: Running) -> None:
    ask = [sys.executable, "-m", "flashd", "ask", STORY]
    with subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(daemon)) as process:
        assert process.stdout and process.stderr
        process.stdout.read(12)
        daemon.stop(signal.SIGKILL)
        process.stdout.read()
        assert b"went away in the middle" in process.stderr.read()
    assert process.returncode == os.EX_UNAVAILABLE


# --- on a serial line -------------------------------------------------------------------------------------


class Line:
    """A line: `far` is the end that a person is at, `port` the device at ours."""

    def __init__(self) -> None:
        master, self.slave = pty.openpty()
        self.port = os.ttyname(self.slave)
        self.far = fdpexpect.fdspawn(master, encoding="utf-8", codec_errors="replace", timeout=PATIENCE)

    def close(self) -> None:
        os.close(self.slave)
        self.far.close()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    if line.far.isalive():
        line.close()


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts flashd as systemd would: a session of its own, and no terminal."""
    begun: list[subprocess.Popen[bytes]] = []

    def run(*args: str, socket: Path = tmp_path / "flashd.sock") -> subprocess.Popen[bytes]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "flashd", *args], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, start_new_session=True, env=os.environ | {"FLASHD_SOCKET": str(socket)},
            )
        )  # fmt: skip
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def refused(process: subprocess.Popen[bytes], code: int, words: str) -> None:
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, said
    assert said.startswith(b"flashd: ") and said.count(b"\n") == 1 and words in said.decode(), said


def test_a_console_on_a_line(daemon: Running, line: Line, start: Start) -> None:
    """Noise on the line and keys that suspend, quit or hold up a terminal are only text."""
    process = start("chat", "--port", line.port, "--speed", "9600")
    line.far.expect("/help says more." + PROMPT)
    assert termios.tcgetattr(line.slave)[4:6] == [termios.B9600] * 2
    os.write(line.far.child_fd, b"\xff\xfe\x1a\x1c\x13\x11\x12 Is this noise?\r")
    line.far.expect("Is this noise.\r\n")
    line.far.expect("waiting")
    line.far.expect("[a-z]+ [a-z]+ ")
    line.far.send("\x03")
    line.far.expect(PROMPT)
    wait(lambda: states(daemon)[-1][0] == "cancelled", PATIENCE)  # with one that waits there is no room for two
    line.far.send("/reset\r")  # how much was said before is chance, and what is said to that too
    line.far.expect("/reset" + PROMPT)
    line.far.send(STORY[:10] + "é\x7f\x7f\x7f" + STORY[8:] + "\r")
    line.far.expect("waiting")
    line.far.expect("[A-Z][a-z]+ ")
    line.far.send("\x03")
    line.far.expect(PROMPT)
    wait(lambda: states(daemon)[-1] == ("cancelled", STORY), PATIENCE)
    daemon.stop()
    line.far.send("Are you there?\r")
    line.far.expect(r"flashd:.*no\s+daemon\s+answers.*" + PROMPT)
    assert process.poll() is None
    line.far.send("/quit\r")
    assert process.wait(PATIENCE) == 0
    assert process.stderr and process.stderr.read() == b""


@pytest.mark.parametrize("on_hangup", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_line_that_goes_away_ends_it(line: Line, start: Start, on_hangup: signal.Handlers) -> None:
    before = signal.signal(signal.SIGHUP, on_hangup)  # which is handed on
    try:
        process = start("chat", "--port", line.port)
    finally:
        signal.signal(signal.SIGHUP, before)
    line.far.expect(PROMPT)
    line.close()
    assert process.wait(PATIENCE) == (-signal.SIGHUP if on_hangup == signal.SIG_DFL else 0)


def test_a_line_has_one_user(line: Line, start: Start) -> None:
    """Whoever has it does not notice that another wanted it."""
    port = Port(Serial(name="console", port=line.port, baud=38400))
    mode = termios.tcgetattr(line.slave)
    refused(start("chat", "--port", line.port), os.EX_TEMPFAIL, f"{line.port}: another program has it")
    assert termios.tcgetattr(line.slave) == mode
    port.write("still here")
    port.read(0.1)
    line.far.expect("still here")
    port.close()
    start("chat", "--port", line.port)
    line.far.expect(PROMPT)
    with pytest.raises(OSError):
        Port(Serial(name="console", port=line.port))


def test_lines_that_are_none(line: Line, start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(start("chat", "--port", str(tmp_path / "none")), os.EX_NOINPUT, "none: No such file")
    refused(start("chat", "--port", str(tmp_path / "file")), os.EX_USAGE, "file: this is not a serial line")
    refused(start("chat", "--port", line.port, "--speed", "1234"), os.EX_USAGE, "--speed 1234")
    refused(start("chat", "--port", line.port, "--memory", "400M"), os.EX_USAGE, "--port is a console of the daemon")
