"""A board under QEMU: its UART, a serial adapter, a shell of the test's own, and QEMU's monitor for the rest."""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from pexpect import EOF, TIMEOUT, fdpexpect

from tests.board.image import Card, Image

UART = {"aarch64": "/dev/ttyAMA0", "x86_64": "/dev/ttyS0"}

REVISION = 0xC03114
"""What a Raspberry Pi 4's device tree says it is: gpiozero asks for that before it touches a pin."""

CARD_SPEED = 45_000_000
"""Bytes a second that can be read of the card."""

GPIO_DATA, GPIO_DIRECTION = 0x090303FC, 0x09030400
"""Registers of the virt machine's PL061, whose eight lines are the board's pins."""


class Guest:
    """One machine, off until `boot`. Close it.

    Args:
        arch: aarch64 or x86_64.
        image: what it boots.
        medium: a disk that is only read.
        card: a disk that can be pulled; a board that boots from its card has no other.
        memory: RAM, as QEMU writes it.
        work: a folder for sockets and the root disk's changes.
        kvm: run on the processor itself rather than emulate it.
    """

    def __init__(
        self,
        arch: str,
        image: Image | Card,
        medium: Path,
        card: Path | None,
        memory: str,
        work: Path,
        kvm: bool = False,
    ) -> None:
        self.arch, self._kvm = arch, kvm
        self._image, self._medium, self._card, self._memory, self._work = image, medium, card, memory, work
        self._process: subprocess.Popen[bytes] | None = None
        self._disk = work / "root.qcow2"
        self._disk.unlink(missing_ok=True)
        backing = ["-b", str(image.root.resolve()), "-F", "raw"]
        size = [image.size] if isinstance(image, Card) else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(self._disk), *size], check=True)

    def boot(self, seconds: float) -> None:
        """Starts the machine and waits for its shell."""
        for name in ("qmp", "shell", "uart", "adapter", "second"):
            (self._work / name).unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command(), stderr=(self._work / "qemu.log").open("ab"))
        self._qmp = Qmp(self._connect("qmp"))
        self._shell = self._terminal("shell")
        self.uart = self._terminal("uart")
        self.adapter = self._terminal("adapter")
        self.second = self._terminal("second")
        self._wait_for_shell(seconds)

    def reboot(self, seconds: float) -> None:
        """As an administrator does it."""
        boot = self.run("cat /proc/sys/kernel/random/boot_id")
        self._shell.send("systemctl reboot\n")
        until = time.monotonic() + seconds
        while True:
            self._wait_for_shell(seconds)
            try:
                if self.run("cat /proc/sys/kernel/random/boot_id", 5) != boot:
                    return
            except (TIMEOUT, AssertionError):
                pass  # it was going down, and took the command with it
            if time.monotonic() > until:
                raise TimeoutError("it did not reboot")

    def close(self) -> None:
        """Cuts the power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _wait_for_shell(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        # what is typed before the shell is there is lost
        while True:
            self._shell.send("stty -echo; export TERM=dumb SYSTEMD_COLORS=0; PS1=; PS2=; echo board-is''-up\n")
            if self._shell.expect(["board-is-up", TIMEOUT], timeout=3) == 0:
                break
            if time.monotonic() > until:
                raise TimeoutError(f"no shell after {seconds:.0f} s; see {self._work}/shell.log")
        self.run("true")  # past what the earlier tries have said

    def run(self, command: str, seconds: float = 120, check: bool = True) -> str:
        """What a root shell's command prints; the kernel's and systemd's messages go elsewhere."""
        marker = os.urandom(4).hex()
        self._shell.send(f"{{ {command}\n}} </dev/null 2>&1; echo {marker}''-$?-\n")
        self._shell.expect(f"{marker}-(\\d+)-\r?\n", timeout=seconds * self.patience)
        said = str(self._shell.before).replace("\r", "").strip()
        if check and int(self._shell.match.group(1)):
            raise AssertionError(f"{command}: {self._shell.match.group(1)}: {said[-2000:]}")
        return said

    def wait(self, command: str, wanted: str, seconds: float) -> str:
        """Runs a command until it prints what matches `wanted`."""
        until = time.monotonic() + seconds * self.patience
        while True:
            said = self.run(command, check=False)
            if re.search(wanted, said):
                return said
            if time.monotonic() > until:
                raise AssertionError(f"{command} never said {wanted!r}; it said {said[-2000:]}")
            # what asks takes an emulated processor from what it waits for
            time.sleep(0.5 * self.patience)

    @property
    def patience(self) -> float:
        """How much longer than on a machine of its own things may take here."""
        return 1.0 if self._accelerated else 10.0

    # --- hands --------------------------------------------------------------------------------------------

    def pull_card(self) -> None:
        self._qmp.ask("device_del", id="card")
        self._qmp.wait_for("DEVICE_DELETED", lambda data: data.get("device") == "card")

    def put_card(self) -> None:
        self._qmp.ask("device_add", driver="virtio-blk-pci", id="card", drive="card", bus="cardslot")

    def slow_card(self, bytes_a_second: int) -> None:
        limits = {"bps-read": bytes_a_second}
        self._qmp.ask("qom-set", path="/objects/limits", property="limits", value=limits)

    def pull_adapter(self, name: str = "adapter") -> None:
        self._qmp.ask("device_del", id=name)
        self._qmp.wait_for("DEVICE_DELETED", lambda data: data.get("device") == name)

    def put_adapter(self, name: str = "adapter") -> None:
        """The one that is there from the start, or a `second` one."""
        self._qmp.ask("device_add", driver="usb-serial", id=name, chardev=name)

    def put_stick(self, path: Path) -> None:
        file = {"driver": "file", "filename": str(path), "read-only": True}
        self._qmp.ask("blockdev-add", **{"driver": "raw", "node-name": "stick", "read-only": True, "file": file})
        self._qmp.ask("device_add", driver="usb-storage", id="stick", drive="stick")

    def pull_stick(self) -> None:
        self._qmp.ask("device_del", id="stick")
        self._qmp.wait_for("DEVICE_DELETED", lambda data: data.get("device") == "stick")
        self._qmp.ask("blockdev-del", **{"node-name": "stick"})

    def send_break(self, line: str) -> None:
        self._qmp.ask("chardev-send-break", id=line)

    def type_on_screen(self, text: str) -> None:
        names = {" ": "spc", "\n": "ret", "/": "slash", ".": "dot"}
        for c in text:
            keys = [{"type": "qcode", "data": name} for name in (["shift"] if c.isupper() else [])]
            keys.append({"type": "qcode", "data": names.get(c, c.lower())})
            self._qmp.ask("send-key", keys=keys)
            time.sleep(0.2 if self._accelerated else 0.5)

    def photograph_screen(self, path: Path) -> None:
        """What is on the screen, as a PNG."""
        self._qmp.ask("screendump", filename=str(path), format="png")

    def press_button(self) -> None:
        """QEMU's power button: it pulls line 3 of the PL061 up for a tenth of a second."""
        self._qmp.ask("system_powerdown")

    def pin(self, number: int) -> str:
        """What a pin does, read from the chip itself: in, low or high."""
        data, direction = (self._register(address) >> number & 1 for address in (GPIO_DATA, GPIO_DIRECTION))
        return ("low", "high")[data] if direction else "in"

    def _register(self, address: int) -> int:
        said = self._qmp.ask("human-monitor-command", **{"command-line": f"xp /1wx {address:#x}"})
        return int(said.split(":")[1], 16)

    # --- the machine --------------------------------------------------------------------------------------

    @property
    def _accelerated(self) -> bool:
        # KVM within a virtual machine is asked for: it may be there and boot nothing
        return self.arch == os.uname().machine and self._kvm

    def _command(self) -> list[str]:
        w, arm = self._work, self.arch == "aarch64"
        accel = "kvm" if self._accelerated else "tcg,thread=multi"
        cpu = "host" if self._accelerated else "cortex-a76" if arm else "max"
        machine = ["-M", "virt" if arm else "q35", "-accel", accel, "-cpu", cpu, "-smp", "2", "-m", self._memory]
        disks = [
            "-drive", f"file={self._disk},format=qcow2,if=none,id=root", "-device", "virtio-blk-pci,drive=root",
            "-drive", f"file={self._medium},format=raw,if=none,id=medium,readonly=on",
            "-device", "virtio-blk-pci,drive=medium",
        ]  # fmt: skip
        card = [
            "-object", f"throttle-group,id=limits,x-bps-read={CARD_SPEED},x-iops-read=2500",
            "-blockdev", f"driver=file,node-name=cardfile,filename={self._card},read-only=on",
            "-blockdev", "driver=throttle,node-name=card,throttle-group=limits,file=cardfile,read-only=on",
            "-device", "pcie-root-port,id=cardslot,chassis=1",
            "-device", "virtio-blk-pci,id=card,drive=card,bus=cardslot",
        ]  # fmt: skip
        lines = [
            *_chardev(w, "uart"), "-serial", "chardev:uart",
            *_chardev(w, "adapter"), "-device", "qemu-xhci", "-device", "usb-serial,id=adapter,chardev=adapter",
            *_chardev(w, "second"),
            *_chardev(w, "shell"), "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=shell",
            "-chardev", f"socket,id=qmp,path={w}/qmp,server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        screen = (
            ["-device", "usb-kbd", "-device", "virtio-gpu-pci", "-display", "none"] if arm else ["-display", "none"]
        )
        return [
            f"qemu-system-{self.arch}", *machine, *self._loader(machine), *disks, *(card if self._card else []),
            *lines, *screen, "-nic", "none",
        ]  # fmt: skip

    def _loader(self, machine: list[str]) -> list[str]:
        if isinstance(self._image, Card):
            return ["-bios", str(self._image.firmware)]
        tree = ["-dtb", str(self._device_tree(machine))] if self.arch == "aarch64" else []
        return [
            "-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd),
            "-append", "root=/dev/vda rw console=hvc0 quiet loglevel=1 systemd.show_status=no panic=-1", *tree,
        ]  # fmt: skip

    def _device_tree(self, machine: list[str]) -> Path:
        """The machine's own, with a Raspberry Pi's revision, and without the power key that would claim a pin."""
        tree = self._work / "tree.dtb"
        dump = [*machine[:1], f"{machine[1]},dumpdtb={tree}", *machine[2:]]
        subprocess.run([f"qemu-system-{self.arch}", *dump, "-display", "none"], check=True, capture_output=True)
        subprocess.run(["fdtput", "-r", str(tree), "/gpio-keys"], check=True)
        subprocess.run(["fdtput", "-c", str(tree), "/system"], check=True)
        subprocess.run(["fdtput", "-t", "x", str(tree), "/system", "linux,revision", f"{REVISION:x}"], check=True)
        return tree

    def _connect(self, name: str) -> socket.socket:
        until = time.monotonic() + 30
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._work / name))
                return connection
            except OSError:
                connection.close()
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _terminal(self, name: str) -> Line:
        log = (self._work / f"{name}.log").open("a")
        return Line(self._connect(name).detach(), encoding="utf-8", codec_errors="replace", logfile=log)


class Line(fdpexpect.fdspawn):  # type: ignore[misc]
    """A serial line that is always read, whoever waits for what it says.

    QEMU writes a character at a time, of which some 280 fill a socket, and then the whole machine stands still.
    """

    def __init__(self, fd: int, **options: Any) -> None:
        super().__init__(fd, **options)
        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read_on, name="line", daemon=True).start()

    def _read_on(self) -> None:
        said = b"-"
        while said:
            try:
                said = os.read(self.child_fd, 65536)
            except OSError:
                said = b""
            self._said.put(said)

    def read_nonblocking(self, size: int = 1, timeout: float | None = -1) -> str:  # noqa: ARG002 - as its base
        """What came, as much as it is. Raises pexpect.TIMEOUT, pexpect.EOF."""
        try:
            said = self._said.get(timeout=self.timeout if timeout == -1 else timeout)
        except queue.Empty:
            raise TIMEOUT(f"nothing was said for {timeout} s") from None
        if not said:
            self.flag_eof = True
            raise EOF("the line is closed")
        text = str(self._decoder.decode(said, final=False))
        self._log(text, "read")
        return text


class Qmp:
    """QEMU's monitor."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rw")
        self._events: list[dict[str, Any]] = []
        self._next()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """A command's answer. Raises AssertionError where QEMU refuses."""
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while "return" not in (reply := self._next()):
            if "error" in reply:
                raise AssertionError(f"{command}: {reply['error']['desc']}")
            self._events.append(reply)
        return reply["return"]

    def wait_for(self, event: str, like: Any) -> None:
        while True:
            known = next((e for e in self._events if e.get("event") == event and like(e["data"])), None)
            if known is not None:
                self._events.remove(known)
                return
            self._events.append(self._next())

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise AssertionError("QEMU is gone")
        reply: dict[str, Any] = json.loads(line)
        return reply


def _chardev(work: Path, name: str) -> list[str]:
    return ["-chardev", f"socket,id={name},path={work}/{name},server=on,wait=off"]
