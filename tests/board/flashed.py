"""python -m tests.board.flashed IMAGE: a card that deploy/image made, booted by an emulated board as it is.

As root, with qemu-system-arm and qemu-efi-aarch64, or qemu-system-x86 and ovmf; and qemu-utils, e2fsprogs, fdisk.
All that is added to the card is the test's own way in, a shell on a line that no board has, and that the compositor
draws with no OpenGL, which the emulated screen lacks. With `--deb` the package
is upgraded, removed and purged in the end. Only states are judged, never times: the processor is emulated.
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

from tests.board.guest import UART, Guest
from tests.board.image import SHELL_UNIT, Card, disk
from tests.board.packaged import Packaged, folder_of_debs, try_all

FIRMWARE = {
    "aarch64": Path("/usr/share/qemu-efi-aarch64/QEMU_EFI.fd"),
    "x86_64": Path("/usr/share/ovmf/OVMF.fd"),
}
CARD_SIZE = "8G"
BOOT_SECONDS = 180.0
PROMPT = r"\r> \x1b\[K"
QUESTION = "What is the capital of France?"
TRIES = 3
"""Answers of which one has to be right: the small default model, whose answers are drawn, is wrong now and then."""

CURL = "python3 -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())'"


class Flashed:
    """What is tried, in order; each method's docstring is its line of the result."""

    def __init__(self, guest: Guest, work: Path) -> None:
        self.guest, self._work = guest, work

    def steps(self) -> list[Callable[[], str]]:
        return [self.boot, self.grows, self.starts, self.console, self.page, self.screen, self.closed]

    def boot(self) -> str:
        """the board's firmware boots from the card"""
        self.guest.boot(BOOT_SECONDS * self.guest.patience)
        return self.guest.run("uname -rm; . /etc/os-release; echo $PRETTY_NAME; hostname; cat /proc/cmdline")

    def grows(self) -> str:
        """the root file system is as large as the card, and only the first boot makes it so"""
        g = self.guest
        g.wait("systemctl is-system-running", "running|degraded", 600)
        nbytes = int(g.run("df -B1 --output=size / | tail -1"))
        assert nbytes > 6.5 * 2**30, f"{nbytes} bytes"
        assert g.run("systemctl is-enabled flashd-grow", check=False) == "disabled"
        assert g.run("findmnt -n -o FSTYPE /boot/firmware") == "vfat"
        return f"{nbytes >> 20} MiB of a card of {CARD_SIZE}"

    def starts(self) -> str:
        """the service is ready with the model that the image has; no unit has failed"""
        g = self.guest
        g.wait("systemctl is-active flashd; systemctl status --no-pager -n 20 flashd", "^active", 600)
        failed = g.run("systemctl --failed --no-legend --plain")
        assert not failed, failed
        return g.run("systemctl show -P StatusText flashd")

    def console(self) -> str:
        """an Enter on the UART is greeted, and a question is answered"""
        uart = self.guest.uart
        uart.send("\r")
        uart.expect(r"/help says more", timeout=60 * self.guest.patience)
        uart.expect(PROMPT, timeout=60 * self.guest.patience)
        answers = []
        for _ in range(TRIES):
            uart.send(f"{QUESTION}\r")
            uart.expect(re.escape(QUESTION) + r"\r\n", timeout=60 * self.guest.patience)
            uart.expect(PROMPT, timeout=200 * self.guest.patience)
            answers.append(" ".join(re.sub(r"\r[^\r\n]*\x1b\[K", "", str(uart.before)).split()))
            if "Paris" in answers[-1]:
                return f"{UART[self.guest.arch]}: {QUESTION} {answers[-1]}"
        raise AssertionError(answers)

    def page(self) -> str:
        """the page and the API answer on loopback"""
        g = self.guest
        page = g.run(f"{CURL} http://127.0.0.1:8080/ | head -c 3000")
        assert "<title>" in page and "main.js" in page, page
        status = json.loads(g.run(f"{CURL} http://127.0.0.1:8080/api/status"))
        assert status["phase"] == "idle", status
        return f"{status['title']}: {status['phase']}"

    def screen(self) -> str:
        """the screen shows the page, or a console if the image has no Chromium"""
        g, path = self.guest, self._work / "screen.png"
        if g.run("test -e /usr/bin/cage && echo yes", check=False) == "yes":
            # read from a cold card by an emulated processor, Chromium may give up on its own network process
            g.wait("journalctl -b -t sh --no-pager; ss -tn dport = :8080", "ESTAB.*127.0.0.1:8080", 600)
            g.wait("systemctl is-active flashd-kiosk", "^active", 600)
            said = f"Chromium has the page, started anew {g.run('systemctl show -P NRestarts flashd-kiosk')} times"
            time.sleep(15 * g.patience)  # it draws what it has fetched
        else:
            said = g.wait("cat /dev/vcs1", "/help lists the commands", 120)
        g.photograph_screen(path)
        return f"{' '.join(said.split())[:80]}; see {path}"

    def closed(self) -> str:
        """nobody can log in, and nothing listens but the page on loopback"""
        g = self.guest
        open_to = [line.split()[4] for line in g.run("ss -tulnH").splitlines()]
        assert open_to in ([], ["127.0.0.1:8080"]), open_to
        able = g.run("awk -F: '$2 !~ /^[!*]/ {print $1}' /etc/shadow")
        assert not able, f"{able} may log in"
        return " ".join(open_to)


def way_in(image: Path, copy: Path) -> Path:
    """A copy of the image that starts a shell on QEMU's virtio console, and draws on its screen."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", image, copy], check=True)
    table = json.loads(subprocess.run(["sfdisk", "--json", copy], check=True, capture_output=True).stdout)
    start = int(table["partitiontable"]["partitions"][1]["start"]) * 512
    unit = copy.with_name("board-shell.service")
    unit.write_text(SHELL_UNIT)
    drawn = copy.with_name("board-screen.conf")
    drawn.write_text("[Service]\nEnvironment=WLR_RENDERER=pixman\n")
    units = "/etc/systemd/system"
    words = (
        f"write {unit} {units}/board-shell.service\n"
        f"mkdir {units}/basic.target.wants\n"
        f"symlink {units}/basic.target.wants/board-shell.service {units}/board-shell.service\n"
        f"mkdir {units}/flashd-kiosk.service.d\n"
        f"write {drawn} {units}/flashd-kiosk.service.d/board-screen.conf\n"
    )
    subprocess.run(
        ["debugfs", "-w", f"{copy}?offset={start}"], input=words, text=True, check=True, capture_output=True
    )  # fmt: skip
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.board.flashed")
    parser.add_argument("image", type=Path, help="what deploy/image made")
    parser.add_argument("--deb", type=Path, help="the package that is in it")
    parser.add_argument("--arch", choices=tuple(FIRMWARE), default="aarch64")
    parser.add_argument("--memory", default="1G", help="the board's RAM (default 1G)")
    parser.add_argument("--kvm", action="store_true", help="do not emulate this machine's own architecture")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/flashd-board"), help="where images are kept")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("tests.board.flashed: reading and making disks needs root")
    args.work.mkdir(parents=True, exist_ok=True)
    debs = folder_of_debs(args.deb, args.work / "debs") if args.deb else args.work / "no-debs"
    debs.mkdir(exist_ok=True)
    disk(args.work / "debs.ext4", debs, "medium", more_mib=16)
    card = Card(way_in(args.image, args.work / "card.img"), FIRMWARE[args.arch], CARD_SIZE)
    guest = Guest(args.arch, card, args.work / "debs.ext4", None, args.memory, args.work, args.kvm)
    steps = Flashed(guest, args.work).steps()
    if args.deb:
        packaged = Packaged(guest)
        steps += [packaged.mount, *packaged.steps_installed()]
    try:
        title = f"{args.image.name} on {args.arch}, {args.memory}"
        return try_all(title, steps, args.work / f"result-image-{args.arch}.txt")
    finally:
        guest.close()


if __name__ == "__main__":
    sys.exit(main())
