"""python -m tests.board: builds a board, installs flashd as deploy/README.md says, and does what happens to boards.

As root, on Debian, with mmdebstrap, qemu-system-arm or qemu-system-x86, qemu-utils, device-tree-compiler, and for the
other architecture's image qemu-user-static; an architecture of another machine is emulated, so only counts and states
are judged, never times. Each line of the result is one thing that was tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashd.engine.paging.card import READ_BYTES
from flashd.engine.planning.parts import BUFFERS
from tests.board import image
from tests.board.guest import CARD_SPEED, UART, Guest
from tests.board.shorten import shorten

PROMPT = r"\r> \x1b\[K"
"""What the console shows when it waits for a question."""

PINS_IN_USE = "/var/lib/flashd/pins.json"
"""What `flashd safe` goes by after a crash."""

PIN_BUTTON, PIN_YES, PIN_NO = 3, 5, 6

MEMORY = 210
"""MiB of flashd's budget: less than six layers of the default model take, so that an answer reads the card."""

CONFIG = """\
model: /media/flashd/model.flash
memory: {memory}M
context: 512
answer: {{max_tokens: 1, temperature: 0, system: Answer in one word.}}
api: {{loopback: 8080}}
kiosk: {{title: The emulated board}}
serial:
  - {{name: console, port: {uart}}}
  - {{name: adapter, port: /dev/ttyUSB0, mode: machine}}
  - {{name: screen, port: /dev/tty1}}
triggers:
  - {{kind: manual, name: greet, prompt: Say hello.}}
"""

PINS = f"""\
  - {{kind: button, name: front, pin: {PIN_BUTTON}, prompt: Say good morning.}}
  - kind: manual
    name: yes_drive
    prompt: Is water wet?
    choose: ["yes", "no"]
    drive: {{pin: {PIN_YES}, answer: "yes", most: 80000}}
  - kind: manual
    name: no_drive
    prompt: Is water wet?
    choose: ["yes", "no"]
    drive: {{pin: {PIN_NO}, answer: "no", most: 80000}}
"""

OURS = (
    "/opt/flashd /usr/local/bin/flashd /etc/sysusers.d/flashd.conf /etc/tmpfiles.d/flashd.conf /run/flashd"
    " /etc/modules-load.d/flashd.conf /etc/udev/rules.d/*flashd* /etc/systemd/system/*flashd*"
    " /etc/systemd/system/*.wants/*flashd* /var/cache/flashd /etc/flashd/flashd.*.yaml /etc/flashd/flashd.schema.json"
    " /usr/local/share/man/man1/flashd.1 /usr/local/share/man/man5/flashd.yaml.5"
)
"""Where the installer puts what is not data."""

UPDATES = "-u 'flashd-update@*' -b -o cat --no-pager"

CURL = "python3 -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())'"
STATUS = f"{CURL} http://127.0.0.1:8080/api/status"

WATCHDOG = 60
"""flashd.service's WatchdogSec."""


class Board:
    """What is tried, in order; each method's docstring is its line of the result."""

    def __init__(self, guest: Guest, boot_seconds: float, work: Path) -> None:
        self.guest, self._boot_seconds, self._work = guest, boot_seconds, work
        self._pins = guest.arch == "aarch64"

    def steps(self) -> list[Callable[[], str]]:
        pins = [self.button, self.decision] if self._pins else []
        return [
            self.boot, self.install, self.start, self.sandbox, self.uart, self.adapter, self.screen, self.kiosk,
            *pins, self.journal, self.reload, self.line_break, self.replug, self.one_more, self.flow, self.slow_card,
            self.watchdog, self.kill, self.pull_card, self.put_card, self.activation, self.stick, self.bad_stick,
            self.read_only, self.reboot, self.power_cut, self.upgrade, self.uninstall,
        ]  # fmt: skip

    # --- install ------------------------------------------------------------------------------------------

    def boot(self) -> str:
        """boots"""
        self.guest.boot(self._boot_seconds)
        return self.guest.run("uname -rm; . /etc/os-release; echo $PRETTY_NAME; systemctl --version | head -1")

    def install(self) -> str:
        """deploy/install, no network, wheels beside it"""
        g = self.guest
        assert not g.run("ls /sys/class/net").replace("lo", "").strip(), "the board has a network"
        config = CONFIG.format(uart=UART[g.arch], memory=MEMORY) + (PINS if self._pins else "")
        g.run("mkdir -p /mnt/medium /etc/flashd && mount -o ro LABEL=medium /mnt/medium")
        g.run(f"cat > /etc/flashd/flashd.yaml <<'EOF'\n{config}EOF")
        said = g.run("/mnt/medium/deploy/install", seconds=1500)
        return said.splitlines()[-1]

    def start(self) -> str:
        """the service is ready under systemd as PID 1"""
        self._wait_ready()
        assert self.guest.run("cat /proc/1/comm") == "systemd"
        return self._show("StatusText") + ", " + self.guest.run("flashd check-config")

    def sandbox(self) -> str:
        """systemd-analyze security at most 1.5; devices and memory are those of the configuration"""
        g = self.guest
        said = g.run("systemd-analyze security --no-pager flashd.service | tail -1")
        exposure = float(re.findall(r"\d+\.\d", said)[-1])
        assert exposure <= 1.5, said
        wanted = {UART[g.arch], "char-ttyUSB", "/dev/tty1", *(["char-gpiochip"] if self._pins else [])}
        allowed = set(re.findall(r"DeviceAllow=(\S+) rw", self._show("DeviceAllow", value=False)))
        assert allowed == wanted, allowed
        assert self._show("MemoryMax") == str(MEMORY << 20), self._show("MemoryMax")
        units = (
            "service", "socket", "undo.service", "update@sda.service", "kiosk.service", "loopback.socket",
            "network.socket", "serial@ttyUSB1.service",
        )  # fmt: skip
        names = [f"flashd{'.' if '.' not in unit else '-'}{unit}" for unit in units]
        verified = g.run(f"systemd-analyze verify {' '.join(names)}", check=False)
        assert "flashd" not in verified, verified
        return f"exposure {exposure}; {', '.join(sorted(allowed))}; MemoryMax {MEMORY}M"

    # --- asking -------------------------------------------------------------------------------------------

    def uart(self) -> str:
        """a question on the UART is answered"""
        self.guest.uart.send("\r")
        self._expect(self.guest.uart, PROMPT)
        return self._ask_uart("What is the capital of France?")

    def adapter(self) -> str:
        """a machine asks through a USB adapter, in JSON"""
        return self._ask_adapter(1, "What is the capital of Italy?", tokens=2)

    def screen(self) -> str:
        """a question is typed on the keyboard and answered on tty1"""
        g = self.guest
        g.wait("cat /dev/vcs1", "The emulated board", 60)
        before = self._jobs("serial:screen")
        g.type_on_screen("name a colour\n")
        self._wait_done("serial:screen", before + 1)
        shown = " ".join(g.wait("cat /dev/vcs1", r"name a colour\s+\S", 20).split())
        return shown.partition("> ")[2][:80]

    def kiosk(self) -> str:
        """the page is on loopback once its socket is enabled and not before, of a service that has no network"""
        g = self.guest
        assert g.run("grep -c ':1F90 ' /proc/net/tcp", check=False) == "0", "something listens on port 8080 already"
        g.run("systemctl stop flashd && systemctl enable --now flashd-loopback.socket && systemctl start flashd", 120)
        self._wait_ready()
        page = g.run(f"{CURL} http://127.0.0.1:8080/ | head -c 3000")
        assert "<title>" in page, page
        assert '"title":"The emulated board"' in g.run(STATUS)
        pid = self._show("MainPID")
        assert g.run(f"readlink /proc/{pid}/ns/net") != g.run("readlink /proc/1/ns/net")
        return (
            g.run(f"nsenter -n -t {pid} ls /sys/class/net")
            + " only; "
            + g.run("flashd ask --max-tokens 1 'Say hi.'", 120)
        )

    def button(self) -> str:
        """a button on a pin of the board's GPIO chip, through lgpio"""
        before = self._jobs("trigger:front")
        self.guest.press_button()
        self._wait_done("trigger:front", before + 1)
        time.sleep(1)
        assert self._jobs("trigger:front") == before + 1
        return "one press, one job"

    def decision(self) -> str:
        """a decision drives a pin"""
        assert {self.guest.pin(PIN_YES), self.guest.pin(PIN_NO)} == {"low"}, "pins are not off before"
        self._decide()
        self.guest.run(f"test -s {PINS_IN_USE}")
        return self._pins_say()

    def journal(self) -> str:
        """journald has a job's fields"""
        said = self.guest.run("journalctl -u flashd -o json --no-pager TRIGGER=serial:console -n 1")
        entry = json.loads(said.splitlines()[-1])
        return ", ".join(f"{key}={entry[key]}" for key in ("JOB_ID", "TRIGGER", "TOKENS", "CARD_BYTES", "PRIORITY"))

    def reload(self) -> str:
        """systemctl reload takes a new trigger and drops nothing"""
        g = self.guest
        pid = self._show("MainPID")
        g.run("cat >> /etc/flashd/flashd.yaml <<'EOF'\n  - {kind: manual, name: later, prompt: Say later.}\nEOF")
        g.run("systemctl reload flashd")
        g.wait(STATUS, '"later"', 30)
        assert self._show("MainPID") == pid
        return self._journal_line("reloaded")

    # --- lines --------------------------------------------------------------------------------------------

    def line_break(self) -> str:
        """a BREAK on the UART and on the adapter is survived and in the journal"""
        self.guest.send_break("uart")
        self.guest.send_break("adapter")
        answer = self._ask_uart("What is the capital of Spain?")
        answer += "; " + self._ask_adapter(2, "What is the capital of Greece?")
        return answer + "; " + self._journal_line("a break")

    def replug(self) -> str:
        """the adapter is pulled and put back"""
        g = self.guest
        g.pull_adapter()
        g.wait("journalctl -u flashd --no-pager", "serial adapter: gone", 60)
        g.put_adapter()
        g.wait("journalctl -u flashd --no-pager | grep 'serial adapter: ' | tail -1", "open on", 60)
        return self._ask_adapter(3, "What is the capital of Norway?")

    def one_more(self) -> str:
        """flashd-serial@: a console comes with a second adapter and goes with it, and keeps off the daemon's own"""
        g, unit = self.guest, "flashd-serial@ttyUSB1"
        g.run(f"systemctl enable {unit}")
        g.put_adapter("second")
        self._expect(g.second, r"/help says more\.\r\n\r> ")
        said = g.run(f"systemctl is-active {unit}; systemd-analyze security --no-pager {unit} | tail -1")
        exposure = float(re.findall(r"\d+\.\d", said)[-1])
        assert said.startswith("active") and exposure <= 1.5, said
        question = "What is the capital of Malta?"
        g.second.send(question + "\r")
        self._expect(g.second, re.escape(question) + r"\r\n")
        shown = " ".join(re.sub(r"\r[^\r\n]*\x1b\[K", "", self._expect(g.second, r"\r\n\r> ")).split())
        assert shown, "no answer"
        g.second.send("/quit\r")
        self._expect(g.second, r"/help says more\.\r\n\r> ")
        gone = "journalctl -u flashd -b --no-pager -o cat | grep -c 'serial adapter: gone'"
        before = g.run(gone, check=False)
        g.run("systemctl start flashd-serial@ttyUSB0")
        g.wait("journalctl -u flashd-serial@ttyUSB0 --no-pager -o cat", "another program has it", 60)
        g.run("systemctl stop flashd-serial@ttyUSB0")
        other = self._ask_adapter(9, "What is the capital of Iceland?")
        assert g.run(gone, check=False) == before, "the daemon's line was disturbed"
        g.pull_adapter("second")
        g.wait(f"systemctl is-active {unit}", "inactive|failed", 60)
        g.put_adapter("second")
        self._expect(g.second, r"/help says more\.\r\n\r> ")
        g.pull_adapter("second")
        g.wait(f"systemctl is-active {unit}", "inactive|failed", 60)
        return f"exposure {exposure}; {question} {shown}; {other}"

    def flow(self) -> str:
        """hardware flow control on the UART (the emulated PL011 never says clear to send, the 16550 always does)"""
        g = self.guest
        g.run(f"sed -i 's#port: {UART[g.arch]}#&, flow: rtscts#' /etc/flashd/flashd.yaml && systemctl restart flashd")
        try:
            self._wait_ready()
            if g.arch == "aarch64":
                before = self._jobs("serial:console")
                g.uart.send("Is anybody there?\r")
                self._wait_done("serial:console", before + 1)
                said = "asked and not shown; " + self._ask_adapter(4, "What is the capital of Sweden?")
            else:
                g.uart.send("\r")
                self._expect(g.uart, PROMPT)
                said = self._ask_uart("What is the capital of Sweden?")
        finally:
            g.run("sed -i 's#, flow: rtscts##' /etc/flashd/flashd.yaml && systemctl restart flashd")
        self._wait_ready()
        gone = g.run("journalctl -u flashd --no-pager | grep -c 'serial console: gone'", check=False)
        assert gone == "0", f"{gone} times gone"
        return said

    # --- faults -------------------------------------------------------------------------------------------

    def slow_card(self) -> str:
        """a pass that takes longer than the watchdog allows, because the card is slow, is waited for"""
        g = self.guest
        before, restarts = self._jobs("serial:console"), self._show("NRestarts")
        # what is read ahead is there already
        g.slow_card(int((min(self._card_bytes()) - BUFFERS * READ_BYTES) / (1.8 * WATCHDOG)))
        g.uart.send("What is the capital of Poland?\r")
        g.wait(STATUS, r'"running":\[[0-9]', 30)
        time.sleep(1.5 * WATCHDOG)
        assert '"running":[]' not in g.run(STATUS), "it was not slow at all"
        g.slow_card(CARD_SPEED)
        self._wait_done("serial:console", before + 1)
        assert self._show("NRestarts") == restarts
        return f"not restarted in {1.5 * WATCHDOG:.0f} s of one pass, WatchdogUSec={self._show('WatchdogUSec')}"

    def watchdog(self) -> str:
        """a daemon that hangs (SIGSTOP) is killed by the watchdog, its pins are made safe, it starts again"""
        g = self.guest
        if self._pins:
            self._decide()
        pid = self._show("MainPID")
        g.run(f"kill -STOP {pid}")
        g.wait("journalctl -u flashd -b --no-pager -o cat | grep 'Failed with result'", "watchdog", 120)
        g.wait("systemctl show -P MainPID flashd", rf"^(?!{pid}$|0$)\d+$", 120)
        if self._pins:  # turned off and let go, or taken again already
            assert "high" not in {g.pin(PIN_YES), g.pin(PIN_NO)}, self._pins_say()
        self._wait_ready()
        return f"NRestarts={self._show('NRestarts')}" + (f"; {self._pins_say()}" if self._pins else "")

    def kill(self) -> str:
        """kill -9 in the middle of an answer: systemd starts it again and the job is answered once"""
        number = self._leave_a_job()
        self.guest.run(f"kill -9 {self._show('MainPID')}")
        self.guest.slow_card(CARD_SPEED)
        return self._answered_once(number)

    def pull_card(self) -> str:
        """the card is pulled in the middle of an answer: the job fails in words, the daemon stays"""
        g = self.guest
        pid, number = self._show("MainPID"), self._leave_a_job()
        g.pull_card()
        g.slow_card(CARD_SPEED)
        job = self._wait_job(number)
        assert job["state"] == "failed", job
        assert self._show("MainPID") == pid
        g.wait("systemctl is-active media-flashd.mount", "inactive|failed", 60)
        return str(job["result"]["finish"])

    def put_card(self) -> str:
        """the card is put back: it is mounted and the next question is answered"""
        g = self.guest
        g.put_card()
        g.wait("systemctl is-active media-flashd.mount", "^active", 60)
        self._wait_ready()
        return self._ask_adapter(5, "What is the capital of Denmark?")

    def activation(self) -> str:
        """stopped in the middle of an answer, then asked: the socket starts it, and both are answered"""
        g = self.guest
        number = self._leave_a_job()
        g.run("systemctl stop flashd.service")
        g.slow_card(CARD_SPEED)
        states = g.run("systemctl is-active flashd.service flashd.socket", check=False).split()
        assert states == ["inactive", "active"], states
        assert g.run(f"cat {PINS_IN_USE} 2>/dev/null", check=False) == "", "a clean stop leaves pins"
        said = g.run("flashd ask --max-tokens 1 'Say hi.'", 300)
        assert self._show("ActiveState") == "active"
        return f"{said}; " + self._answered_once(number, attempts=1)

    def stick(self) -> str:
        """a USB stick with an update, where 90-flashd-update.rules was copied into place: it is taken"""
        g = self.guest
        g.run("cp /mnt/medium/deploy/90-flashd-update.rules /etc/udev/rules.d/ && udevadm control --reload")
        g.run(f"echo '{image.KEY.public_text().strip()}' >/etc/flashd/update-keys/tests.pub")
        self._put_stick("The emulated board", "The updated board")
        g.wait(STATUS, '"title":"The updated board"', 120)
        said = g.wait(f"journalctl {UPDATES}", r"updated; the old one is flashd\.yaml\.old", 60)
        g.pull_stick()
        g.wait("ls -d /run/flashd-update/* 2>&1; findmnt -n LABEL=STICK", "No such file", 60)
        return said.splitlines()[-1]

    def bad_stick(self) -> str:
        """a stick whose configuration does not start: the old one is in place again, and runs"""
        g = self.guest
        before = g.run("sha256sum /etc/flashd/flashd.yaml")
        self._put_stick("/media/flashd/model.flash", "/media/flashd/another.flash")
        said = g.wait(f"journalctl {UPDATES}", "not taken, the old one is in place again: .*", 120)
        self._wait_ready()
        g.pull_stick()
        assert g.run("sha256sum /etc/flashd/flashd.yaml") == before
        return said.splitlines()[-1]

    def read_only(self) -> str:
        """a read-only root with only /var/lib/flashd writable: it starts and answers"""
        g = self.guest
        # whoever writes to the root keeps it from becoming read-only: flashd's spool, the journal
        g.run("systemctl stop flashd.service && journalctl --relinquish-var")
        g.run(
            "for f in /tmp /var/tmp; do mount -t tmpfs tmpfs $f; done; mount --bind /var/lib/flashd /var/lib/flashd"
        )
        try:
            g.run("mount -o remount,bind,ro /")
            assert "Read-only" in g.run("touch /etc/x", check=False)
            g.run("systemctl start flashd")
            self._wait_ready()
            return self._ask_adapter(8, "What is the capital of Austria?")
        finally:
            g.run("systemctl stop flashd.service; mount -o remount,bind,rw /; journalctl --flush")
            g.run("umount /var/lib/flashd /tmp /var/tmp; systemctl start flashd")
            self._wait_ready()

    def reboot(self) -> str:
        """a reboot: the service is there again, and so are jobs and answers; a cut update is undone before that"""
        g = self.guest
        jobs = self._jobs("")
        before = g.run("sha256sum </etc/flashd/flashd.yaml")
        self._cut_update()
        g.reboot(self._boot_seconds)
        self._wait_ready()
        assert "<title>" in g.run(f"{CURL} http://127.0.0.1:8080/ | head -c 3000"), "loopback is not served again"
        assert self._jobs("") >= jobs, "jobs were lost"
        assert g.run("sha256sum </etc/flashd/flashd.yaml") == before, "the update was not undone"
        g.uart.send("\r")
        self._expect(g.uart, PROMPT)
        return f"{jobs} jobs kept; " + self._ask_uart("What is the capital of France?")

    def power_cut(self) -> str:
        """the power is cut in the middle of an answer: after the next boot the job is answered"""
        g = self.guest
        number = self._leave_a_job()
        g.close()
        g.boot(self._boot_seconds)
        return self._answered_once(number)

    def upgrade(self) -> str:
        """deploy/install again: configuration and jobs stay, and the question that it ends with is one more"""
        g = self.guest
        g.run("mount -o ro LABEL=medium /mnt/medium")
        before = g.run("sha256sum /etc/flashd/flashd.yaml"), self._jobs("")
        version = g.run("readlink /opt/flashd/current")
        g.run("/mnt/medium/deploy/install", seconds=1500)
        assert (g.run("sha256sum /etc/flashd/flashd.yaml"), self._jobs("") - 1) == before
        self._wait_ready()
        assert g.run("readlink /opt/flashd/current") != version
        assert g.run("ls /opt/flashd | wc -l") == "2"
        return self._ask_adapter(6, "What is the capital of Finland?")

    def uninstall(self) -> str:
        """deploy/install --uninstall leaves nothing but data"""
        g = self.guest
        g.run("/mnt/medium/deploy/install --uninstall")
        left = g.run(f"ls -d {OURS} 2>/dev/null", check=False)
        assert not left, left
        assert "0 loaded units listed" in g.run("systemctl list-units --all --no-pager 'flashd*'")
        return g.run("ls -d /etc/flashd/* /var/lib/flashd/*").replace("\n", " ")

    # --- what the steps share -----------------------------------------------------------------------------

    def _wait_ready(self) -> None:
        self.guest.wait("systemctl is-active flashd; systemctl status --no-pager -n 20 flashd", "^active", 300)

    def _show(self, name: str, value: bool = True) -> str:
        return self.guest.run(f"systemctl show {'--value' if value else ''} -p {name} flashd")

    def _journal_line(self, text: str) -> str:
        said = self.guest.run(f"journalctl -u flashd --no-pager -o cat | grep -F '{text}' | tail -1")
        assert said, f"nothing in the journal of {text!r}"
        return said

    def _put_stick(self, word: str, other: str) -> None:
        """A stick with the board's own configuration, but for one word."""
        configuration = self.guest.run("cat /etc/flashd/flashd.yaml")
        assert word in configuration
        self.guest.put_stick(image.stick(configuration.replace(word, other) + "\n", self._work))

    def _cut_update(self) -> None:
        """What a power cut leaves between an update's switch and flashd's start with it."""
        record = '[{\\"path\\":\\"/etc/flashd/flashd.yaml\\",\\"nbytes\\":$(stat -c %s flashd.yaml),'
        record += '\\"sha256\\":\\"$sum\\",\\"replaces\\":true}]'
        self.guest.run(
            "cd /etc/flashd && cp flashd.yaml new && sed -i 's/^model:.*/model: none/' new"
            " && sum=$(sha256sum <new | cut -d' ' -f1) && mv flashd.yaml flashd.yaml.old && mv new flashd.yaml"
            f' && echo "{record}" >/var/lib/flashd-update/unfinished && sync'
        )

    def _expect(self, line: Any, pattern: str, seconds: float = 120) -> str:
        line.expect(pattern, timeout=seconds * self.guest.patience)
        return str(line.before)

    def _ask_uart(self, question: str) -> str:
        self.guest.uart.send(question + "\r")
        self._expect(self.guest.uart, re.escape(question) + r"\r\n")
        said = self._expect(self.guest.uart, PROMPT)
        shown = " ".join(re.sub(r"\r[^\r\n]*\x1b\[K", "", said).split())
        assert shown, f"no answer: {said!r}"
        return f"{question} {shown}"

    def _ask_adapter(self, number: int, question: str, tokens: int = 1) -> str:
        line = self.guest.adapter
        line.send(json.dumps({"id": number, "prompt": question, "max_tokens": tokens}) + "\n")
        line.expect(rf'\{{"event":"end","id":{number},.*?\}}\r?\n', timeout=120 * self.guest.patience)
        end = json.loads(line.after)
        assert end["state"] == "done" and end["text"], end
        return f"{question} {end['text']}"

    def _leave_a_job(self) -> int:
        """Has an answer begun for somebody who does not wait for it, on a card so slow that it takes a minute."""
        number = self._jobs("") + 1
        self.guest.slow_card(max(self._card_bytes()) // 60)
        self.guest.adapter.send(json.dumps({"id": f"long{number}", "prompt": f"Count to {number}."}) + "\n")
        self.guest.wait(STATUS, rf'"running":\[([0-9]+,)*{number}\b', 30)
        return number

    def _answered_once(self, number: int, attempts: int = 2) -> str:
        """Of a job whose first attempt was cut: a clean stop does not count it, a crash does."""
        self._wait_ready()
        job = self._wait_job(number)
        assert (job["state"], job["attempts"]) == ("done", attempts), job
        said = self.guest.run(f"journalctl -u flashd --no-pager -o cat JOB_ID={number} | grep -c ' done$'")
        assert said == "1", f"{said} times done in the journal"
        return f"job {number}, attempt {attempts}, answered once"

    def _card_bytes(self) -> list[int]:
        """What answers of one token on the UART read of the card, where no snapshot saved them that."""
        asked = [j for j in self._all_jobs() if j["request"]["source"] == "serial:console" and j["state"] == "done"]
        read = [int(job["result"]["figures"]["card_bytes"]) for job in asked]
        return [nbytes for nbytes in read if nbytes]

    def _decide(self) -> None:
        before = self._jobs("trigger:yes_drive"), self._jobs("trigger:no_drive")
        for name, count in zip(("yes_drive", "no_drive"), before, strict=True):
            self.guest.adapter.send(json.dumps({"id": name, "trigger": name}) + "\n")
            self._wait_done(f"trigger:{name}", count + 1)
        time.sleep(1)
        assert {self.guest.pin(PIN_YES), self.guest.pin(PIN_NO)} == {"low", "high"}, self._pins_say()

    def _pins_say(self) -> str:
        return f"yes is {self.guest.pin(PIN_YES)}, no is {self.guest.pin(PIN_NO)}"

    def _all_jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = json.loads(self.guest.run("flashd jobs --json --most 1000"))
        return jobs

    def _job(self, number: int) -> dict[str, Any]:
        return next(job for job in self._all_jobs() if job["id"] == number)

    def _jobs(self, source: str) -> int:
        return sum(job["request"]["source"].startswith(source) for job in self._all_jobs())

    def _wait_done(self, source: str, count: int) -> None:
        command = (
            f"""flashd jobs --most 1000 | awk '$4 == "done" && $5 == "{source}"' | wc -l; flashd jobs --most 3"""
        )
        self.guest.wait(command, rf"^{count}\b", 200)

    def _wait_job(self, number: int) -> dict[str, Any]:
        self.guest.wait(f"flashd show --json {number}", '"state":"(done|failed|cancelled|expired)"', 300)
        return self._job(number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.board")
    parser.add_argument("--arch", choices=tuple(UART), default="aarch64")
    parser.add_argument("--suite", choices=tuple(image.PYTHON), default="bookworm")
    parser.add_argument("--memory", default="1G", help="the board's RAM (default 1G)")
    parser.add_argument("--kvm", action="store_true", help="do not emulate this machine's own architecture")
    parser.add_argument("--bundle", type=Path, help="default: SmolLM2-135M-Instruct, packed now")
    parser.add_argument("--layers", type=int, help="only so many of its layers: nonsense is answered, and sooner")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/flashd-board"), help="where images are kept")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("tests.board: making a root file system and disks needs root")
    args.work.mkdir(parents=True, exist_ok=True)
    bundle = args.bundle or _packed(args.work, args.layers)
    made = image.debian(args.arch, args.suite, args.work)
    guest = Guest(
        args.arch, made, image.medium(args.arch, args.suite, args.work), image.card(bundle, args.work), args.memory,
        args.work, args.kvm,
    )  # fmt: skip
    try:
        return _try_all(Board(guest, 120 * guest.patience, args.work), args)
    finally:
        guest.close()


def _packed(work: Path, layers: int | None) -> Path:
    path = work / f"smollm2-{layers or 'whole'}.flash"
    if not path.exists():
        from flashd.pack import default_model

        source = default_model.model_file()
        # f16 rows are always paged, however few there are
        rows = ["--rows", "f16"] if layers else []
        if layers:
            source = shorten(source, work / "short.gguf", layers)
        subprocess.run([sys.executable, "-m", "flashd", "pack", source, "--out", path, *rows], check=True)
    return path


def _try_all(board: Board, args: argparse.Namespace) -> int:
    model = f"{args.layers} layers of the model" if args.layers else "the whole model"
    lines = [f"{args.suite} {args.arch}, {args.memory}, {model}, {time.strftime('%Y-%m-%d', time.gmtime())}"]
    print(lines[0], flush=True)
    failed = 0
    for step in board.steps():
        try:
            word, note = "ok  ", step()
        except Exception as error:  # noqa: BLE001 - the rest is to be tried all the same
            word, note = "FAIL", f"{type(error).__name__}: {error}"
            failed += 1
        lines.append(f"{word}  {step.__doc__}: {' '.join(note.split())[:1000]}")
        print(lines[-1], flush=True)
        if failed and step.__name__ in ("boot", "install"):
            break
    (args.work / f"result-{args.suite}-{args.arch}.txt").write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
