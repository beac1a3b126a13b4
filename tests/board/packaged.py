"""python -m tests.board.packaged DEB: flashd's package on a Debian with systemd as PID 1 and no network.

As root, with mmdebstrap and systemd-container. The Debian is a container of this machine's own architecture, so
nothing is emulated. What is tried here is tried on an image, too: see flashed.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tests.board.image import PYTHON

PACKAGES = "systemd-sysv,udev,dbus,procps,iproute2,init-system-helpers,python3"
DEBS = "/mnt/medium"
NEW, NEWER = "flashd.deb", "flashd-newer.deb"
NEWER_VERSION = "99.0"

UNITS = ("flashd.service", "flashd-undo.service", "flashd-update@sdz1.service", "flashd-serial@ttyUSB9.service")
MOST_EXPOSED = 2.0
"""What systemd-analyze may rate a unit of these; 10 is a unit without any protection."""

LEFT = (
    "/usr/lib/flashd /usr/bin/flashd /usr/lib/systemd/system/*flashd* /etc/systemd/system/*flashd*"
    " /etc/systemd/system/*.wants/*flashd* /usr/lib/udev/rules.d/70-flashd.rules /usr/share/doc/flashd"
)
"""Where the package puts what is not data; and what is gone once it is purged, as well."""

DATA = "/etc/flashd /var/cache/flashd /var/lib/flashd-update /run/flashd"

ASK = "flashd ask --max-tokens 3 --temperature 0 'What is the capital of France?'"


class Machine(Protocol):
    """A Debian that runs; guest.Guest is one."""

    def run(self, command: str, seconds: float = 120, check: bool = True) -> str: ...

    def wait(self, command: str, wanted: str, seconds: float) -> str: ...


class Packaged:
    """What becomes of the package; each method's docstring is its line of the result.

    Args:
        machine: a Debian that has the two packages in DEBS.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def steps(self) -> list[Callable[[], str]]:
        """In order. The first needs a machine without the package."""
        return [self.install, *self.steps_installed()]

    def steps_installed(self) -> list[Callable[[], str]]:
        return [self.answers, self.exposure, self.upgrade, self.remove, self.again, self.purge]

    def install(self) -> str:
        """apt install ./flashd.deb, with no network"""
        assert not self.machine.run("ls /sys/class/net").replace("lo", "").strip(), "there is a network"
        said = self._apt(f"install {DEBS}/{NEW}")
        assert "To try it: flashd ask" in said, said[-2000:]
        return said.splitlines()[-1]

    def mount(self) -> str:
        """the disk with the packages, on a board that has one"""
        return self.machine.run(f"mkdir -p {DEBS} && mount -o ro LABEL=medium {DEBS} && ls {DEBS}")

    def answers(self) -> str:
        """the service runs as the package enabled it, and answers over its socket"""
        self._wait_ready()
        m = self.machine
        assert m.run("cat /proc/1/comm") == "systemd"
        assert m.run("readlink /proc/$(systemctl show -P MainPID flashd)/exe").startswith("/usr/bin/python3")
        sockets = m.run("systemctl is-enabled flashd-network.socket", check=False)
        assert sockets == "disabled", f"the network's socket is {sockets}"
        said = m.run(ASK, 600)
        assert said, "no answer"
        return f"{m.run('systemctl show -P StatusText flashd')}; {said}"

    def exposure(self) -> str:
        """what systemd-analyze security says of the units"""
        m, rated = self.machine, {}
        for unit in UNITS:
            said = m.run(f"systemd-analyze security --no-pager {unit} | tail -1")
            rated[unit] = float(re.findall(r"\d+\.\d", said)[-1])
        assert max(rated.values()) <= MOST_EXPOSED, rated
        return ", ".join(f"{unit} {exposure}" for unit, exposure in rated.items())

    def upgrade(self) -> str:
        """a newer package: configuration, jobs and a unit that was turned off stay as they are; it answers"""
        m = self.machine
        m.run("echo 'answer: {max_tokens: 7}' >>/etc/flashd/flashd.yaml")
        m.run("systemctl disable --quiet media-flashd.mount")
        before, jobs = m.run("sha256sum /etc/flashd/flashd.yaml"), self._jobs()
        pid = m.run("systemctl show -P MainPID flashd")
        self._apt(f"install {DEBS}/{NEWER}")
        self._wait_ready()
        assert m.run("dpkg-query -W -f '${Version} ${Status}' flashd") == f"{NEWER_VERSION} install ok installed"
        assert (m.run("sha256sum /etc/flashd/flashd.yaml"), self._jobs()) == (before, jobs)
        assert m.run("systemctl show -P MainPID flashd") != pid
        units = m.run("systemctl is-enabled flashd.service flashd.socket media-flashd.mount", check=False).split()
        assert units == ["enabled", "enabled", "disabled"], units
        return m.run(ASK, 600)

    def remove(self) -> str:
        """apt remove: the program is gone, configuration and jobs stay"""
        m = self.machine
        self._apt("remove flashd")
        self._nothing_left("/usr/lib/flashd /usr/bin/flashd /usr/lib/systemd/system/*flashd*")
        units = m.run("systemctl list-units --all --no-legend --plain --no-pager 'flashd*'")
        # who enabled them keeps the links until the purge
        left = [line for line in units.splitlines() if "not-found inactive" not in " ".join(line.split())]
        assert not left, left
        assert not m.run("pgrep -u flashd", check=False), "something still runs"
        return m.run("ls -d /etc/flashd/flashd.yaml /var/lib/flashd/*").replace("\n", " ")

    def again(self) -> str:
        """apt install after that: configuration and jobs are taken up"""
        m = self.machine
        self._apt(f"install {DEBS}/{NEWER}")
        self._wait_ready()
        assert m.run("tail -1 /etc/flashd/flashd.yaml") == "answer: {max_tokens: 7}"
        return f"{self._jobs()} jobs"

    def purge(self) -> str:
        """apt purge: nothing is left but a bundle of somebody's own"""
        m = self.machine
        m.run("echo mine >/var/lib/flashd/mine.flash")
        said = self._apt("purge flashd")
        self._nothing_left(f"{LEFT} {DATA}")
        assert m.run("find /var/lib/flashd -type f") == "/var/lib/flashd/mine.flash"
        assert "The bundles in /var/lib/flashd are still there." in said
        return m.run("dpkg-query -W flashd", check=False)

    # --- what the steps share -----------------------------------------------------------------------------

    def _apt(self, words: str) -> str:
        said = self.machine.run(f"DEBIAN_FRONTEND=noninteractive apt-get --yes --no-install-recommends {words}", 1500)
        wrong = [line for line in said.splitlines() if re.search(r"warning|error", line, re.IGNORECASE)]
        # dpkg does not know that another package has the folder, too, by the name /lib/systemd/system-preset
        wrong = [line for line in wrong if not line.endswith("system-preset' not empty so not removed")]
        assert not wrong, wrong
        return said

    def _nothing_left(self, paths: str) -> None:
        left = self.machine.run(f"ls -d {paths} 2>/dev/null", check=False)
        assert not left, left

    def _wait_ready(self) -> None:
        self.machine.wait("systemctl is-active flashd; systemctl status --no-pager -n 20 flashd", "^active", 600)

    def _jobs(self) -> int:
        return int(self.machine.run("flashd jobs --most 1000 | wc -l"))


class Container:
    """A Debian in a folder, with systemd as PID 1 and no network. Close it."""

    def __init__(self, root: Path, debs: Path) -> None:
        root = root.resolve()
        self._process = subprocess.Popen(
            [
                "systemd-nspawn", "--quiet", f"--directory={root}", "--boot", "--private-network", "--register=no",
                "--keep-unit", f"--bind-ro={debs.resolve()}:{DEBS}", "--hostname=board", "--console=pipe",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 60
        while not (pid := self._first_process()):
            if time.monotonic() > until or self._process.poll() is not None:
                self.close()
                raise TimeoutError("the container did not start")
            time.sleep(0.1)
        self._pid = pid
        self.wait("systemctl is-system-running", "running|degraded", 120)

    def _first_process(self) -> str:
        """The number, out here, of what is number 1 in the container; "" if it is not there yet."""
        for pid in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # a helper that is gone again
                continue
            if re.search(r"(?m)^Name:\tsystemd$", status) and re.search(r"(?m)^NSpid:.*\t1$", status):
                return pid
        return ""

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def run(self, command: str, seconds: float = 120, check: bool = True) -> str:
        """What a root shell's command prints. Raises AssertionError if it fails and `check` is set."""
        done = subprocess.run(
            ["nsenter", "-t", self._pid, "-m", "-u", "-i", "-n", "-p", "-r", "-w", "sh", "-c", command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            timeout=seconds * 3,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"},
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}: {done.stdout[-2000:]}")
        return done.stdout.strip()

    def wait(self, command: str, wanted: str, seconds: float) -> str:
        """Runs a command until it prints what matches `wanted`."""
        until = time.monotonic() + seconds
        while not re.search(wanted, said := self.run(command, check=False)):
            if time.monotonic() > until:
                raise AssertionError(f"{command} never said {wanted!r}; it said {said[-2000:]}")
            time.sleep(0.5)
        return said


def folder_of_debs(deb: Path, folder: Path) -> Path:
    """The package, and the same as a newer version, under the names that the steps use."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(deb, folder / NEW)
    subprocess.run(["dpkg-deb", "--raw-extract", deb, folder / "newer"], check=True)
    control = folder / "newer" / "DEBIAN" / "control"
    control.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {NEWER_VERSION}", control.read_text()))
    build = ["dpkg-deb", "-Znone", "--build", str(folder / "newer"), str(folder / NEWER)]
    subprocess.run(build, check=True, capture_output=True)
    shutil.rmtree(folder / "newer")
    return folder


def try_all(title: str, steps: Sequence[Callable[[], str]], result: Path) -> int:
    """Prints and keeps a line for each step. Returns 1 if one failed."""
    lines = [f"{title}, {time.strftime('%Y-%m-%d', time.gmtime())}"]
    print(lines[0], flush=True)
    failed = 0
    for step in steps:
        try:
            word, note = "ok  ", step()
        except Exception as error:  # noqa: BLE001 - the rest is to be tried all the same
            word, note, failed = "FAIL", f"{type(error).__name__}: {error}", 1
        lines.append(f"{word}  {step.__doc__}: {' '.join(note.split())[:1000]}")
        print(lines[-1], flush=True)
        if failed and step is steps[0]:
            break
    result.write_text("\n".join(lines) + "\n")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.board.packaged")
    parser.add_argument("deb", type=Path, help="what deploy/make-deb made for this machine's architecture")
    parser.add_argument("--suite", choices=tuple(PYTHON), default="bookworm")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/flashd-board"), help="where the Debian is kept")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("tests.board.packaged: making a Debian and starting it needs root")
    args.work.mkdir(parents=True, exist_ok=True)
    made, root = args.work / f"{args.suite}-root", args.work / f"{args.suite}-used"
    if not made.exists():
        options = ["--quiet", "--mode=root", "--variant=minbase", f"--include={PACKAGES}"]
        subprocess.run(
            ["unshare", "--mount", "mmdebstrap", *options, args.suite, made, "http://deb.debian.org/debian"],
            check=True,
        )  # fmt: skip
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", made, root], check=True)
    container = Container(root, folder_of_debs(args.deb, args.work / "debs"))
    try:
        title = f"the package on {args.suite} {os.uname().machine} in a container"
        return try_all(title, Packaged(container).steps(), args.work / f"result-package-{args.suite}.txt")
    finally:
        container.close()


if __name__ == "__main__":
    sys.exit(main())
