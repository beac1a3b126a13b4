"""What the units in deploy/ bring when they are enabled, with systemctl itself in a folder of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flashd.cli.main import main
from flashd.daemon.http.server import PORTS
from flashd.update.places import Places
from flashd.update.undo import RECORD

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.skipif(not shutil.which("systemctl"), reason="needs systemctl"),
]

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
UNITS = Path("etc/systemd/system")


class Root:
    """A root file system with our units in it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        (root / UNITS).mkdir(parents=True)
        for pattern in ("*.service", "*.socket"):
            for unit in DEPLOY.glob(pattern):
                shutil.copy(unit, root / UNITS)

    def systemctl(self, *words: str) -> None:
        subprocess.run(["systemctl", "--root", self._root, "--quiet", *words], check=True)

    def listening(self) -> dict[str, str]:
        """Where systemd listens from boot on for flashd.service, and for which unit."""
        found = {}
        for link in sorted((self._root / UNITS / "sockets.target.wants").glob("flashd*.socket")):
            for address in _values(DEPLOY / link.name, "Socket", "ListenStream"):
                found[address] = (_values(DEPLOY / link.name, "Socket", "Service") or [f"{link.stem}.service"])[0]
        return found


def _values(unit: Path, section: str, key: str) -> list[str]:
    """A key's values, of which there may be several."""
    found, inside = [], False
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            inside = line == f"[{section}]"
        elif inside and line.partition("=")[0] == key:
            found.append(line.partition("=")[2])
    return found


SOCKET, LOOPBACK, NETWORK = "/run/flashd/flashd.sock", "127.0.0.1:8080", "0.0.0.0:8088"


def test_loopback_is_listened_on_with_the_kiosk_only(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.systemctl("enable", "flashd.service", "flashd.socket", "flashd-undo.service")  # as deploy/install does
    assert root.listening() == {SOCKET: "flashd.service"}
    root.systemctl("enable", "flashd-kiosk.service")
    assert root.listening() == {SOCKET: "flashd.service", LOOPBACK: "flashd.service"}
    root.systemctl("disable", "flashd-kiosk.service")
    assert root.listening() == {SOCKET: "flashd.service"}


def test_a_kiosk_enabled_before_there_was_a_loopback_socket_gets_it(tmp_path: Path) -> None:
    root = Root(tmp_path)
    wants = tmp_path / UNITS / "multi-user.target.wants"
    wants.mkdir()
    (wants / "flashd-kiosk.service").symlink_to("/etc/systemd/system/flashd-kiosk.service")
    root.systemctl("is-enabled", "flashd-kiosk.service")
    root.systemctl("reenable", "flashd-kiosk.service")
    assert LOOPBACK in root.listening()


def test_the_kiosk_brings_the_socket_of_its_address() -> None:
    kiosk = DEPLOY / "flashd-kiosk.service"
    assert LOOPBACK in _values(DEPLOY / "flashd-loopback.socket", "Socket", "ListenStream")
    assert f"http://{LOOPBACK}/" in kiosk.read_text()
    for key in ("Wants", "After"):
        assert "flashd-loopback.socket" in _values(kiosk, "Unit", key)[0].split()


def test_each_start_of_the_service_brings_loopback_back(tmp_path: Path) -> None:
    """Of one that systemd gave up, because a start was triggered too often, nobody else would think."""
    root = Root(tmp_path)
    link = tmp_path / UNITS / "flashd.service.wants" / "flashd-loopback.socket"
    root.systemctl("enable", "flashd.service", "flashd.socket")
    assert not link.is_symlink()
    root.systemctl("enable", "flashd-loopback.socket")
    assert link.is_symlink()


def test_the_network_is_listened_on_only_if_that_is_enabled_by_itself(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.systemctl("enable", "flashd.service", "flashd.socket", "flashd-kiosk.service")
    assert root.listening() == {SOCKET: "flashd.service", LOOPBACK: "flashd.service"}
    root.systemctl("enable", "flashd-network.socket")
    assert root.listening()[NETWORK] == "flashd.service"
    unit = DEPLOY / "flashd-network.socket"
    assert _values(unit, "Socket", "IPAddressDeny") == ["any"]
    assert "0.0.0.0/0" not in _values(unit, "Socket", "IPAddressAllow")[0]
    assert PORTS["network"] == int(NETWORK.rpartition(":")[2])
    assert PORTS["loopback"] == int(LOOPBACK.rpartition(":")[2])


def test_a_stop_waits_for_hooks_and_voices() -> None:
    """And does not end them together with the daemon, which is told to stop alone."""
    assert _values(DEPLOY / "flashd.service", "Service", "KillMode") == ["mixed"]


def test_the_kiosk_may_use_its_session_s_folder() -> None:
    """The compositor's socket is in /run/user, which ProtectHome= hides with /home."""
    assert _values(DEPLOY / "flashd-kiosk.service", "Service", "ProtectHome") == []


def test_a_reload_allows_what_the_configuration_names_before_it_is_read() -> None:
    allow, tell = _values(DEPLOY / "flashd.service", "Service", "ExecReload")
    assert "flashd allow --devices " in allow and allow.startswith("+-") and "-HUP" in tell


def test_a_reload_leaves_the_memory_that_the_daemon_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "systemctl").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    config = tmp_path / "flashd.yaml"
    config.write_text("memory: 400m\ntriggers: [{kind: door, name: door, pin: 4, prompt: p}]")
    devices = "set-property --runtime flashd.service DeviceAllow= DeviceAllow=char-gpiochip rw"
    for more, memory in (["--devices"], ""), ([], f" MemoryMax={400 << 20}"):
        assert main(["allow", "--config", str(config), *more]) == 0
        assert capfd.readouterr().out == f"{devices}{memory}\n"


def test_a_serial_console_comes_with_its_adapter(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.systemctl("enable", "flashd-serial@ttyUSB0.service")
    link = tmp_path / UNITS / "dev-ttyUSB0.device.wants/flashd-serial@ttyUSB0.service"
    assert link.is_symlink() and link.resolve().name == "flashd-serial@.service"
    root.systemctl("disable", "flashd-serial@ttyUSB0.service")
    assert not link.is_symlink()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize(
    "name", ["flashd.service", "flashd-serial@ttyUSB0.service", "flashd-update@sda.service", "flashd-undo.service"]
)
def test_the_sandbox_is_rated_safe(name: str, tmp_path: Path) -> None:
    unit = re.sub("@.*[.]", "@.", name)
    shutil.copy(DEPLOY / unit, tmp_path / name)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", tmp_path / name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """A key that systemd does not know is a protection that is not there, and it only warns of it."""
    units = []
    for pattern in ("*.service", "*.socket", "*.mount"):
        for unit in DEPLOY.glob(pattern):
            # the program is not installed where this test runs
            text = unit.read_text().replace("/opt/flashd/current/bin/flashd", "/bin/true")
            units.append(tmp_path / unit.name.replace("@.", "@sda."))
            units[-1].write_text(text.replace("/usr/bin/cage", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "flashd" in line]
    assert not said and len(units) >= 8, done.stderr


def test_no_link_on_a_stick_or_card_is_followed() -> None:
    (options,) = _values(DEPLOY / "media-flashd.mount", "Mount", "Options")
    (mount,) = _values(DEPLOY / "flashd-update@.service", "Service", "ExecStartPre")
    for words in (options, mount.split()[2]):
        assert {"ro", "nosuid", "nodev", "noexec", "nosymfollow"} <= set(words.split(","))
    assert mount.startswith("+/bin/mount")  # inside the sandbox the next command would not see it


def test_updates_write_where_they_may_and_root_s_record_is_not_the_service_s() -> None:
    places = Places()
    for unit in ("flashd-update@.service", "flashd-undo.service"):
        (writable,) = _values(DEPLOY / unit, "Service", "ReadWritePaths")
        assert writable.split() == [f"-{places.models}", str(places.configuration.parent)]
        assert _values(DEPLOY / unit, "Service", "StateDirectory") == [places.state.name]
        assert _values(DEPLOY / unit, "Service", "StateDirectoryMode") == ["0700"]
    (record,) = _values(DEPLOY / "flashd-undo.service", "Unit", "ConditionPathExists")
    assert Path(record) == places.state / RECORD
    folders = (DEPLOY / "flashd.tmpfiles").read_text()
    assert f"d {places.state} 0700 root root" in folders and f"d {places.keys} 0755 root root" in folders
