"""Links, pipes and files of other users where the daemon keeps its own: they lead nowhere and hold nobody up."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from flashd.daemon.http.server import Server
from flashd.daemon.last_run import death_file, note_death, watched
from flashd.daemon.spool import Spool, held_alone, read_latest
from flashd.errors import CannotWrite, FlashdError, InputMissing
from flashd.system import paths
from flashd.system.child import Limits, in_child
from flashd.system.memory import MIB
from flashd.system.paths import cache_folder, make_folder
from flashd.system.plain_file import NOT_PLAIN
from flashd.system.remembered import Remembered

NOBODY = 65534


def begin(path: Path) -> None:
    """What a daemon does with its spool."""
    with held_alone(path), watched(path) as last:
        last.noted()
        Spool(path, keep=10).close()


@pytest.mark.parametrize("name", ["spool.db", "spool.db.lock", "spool.db.death"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_planted_beside_a_spool_is_not_followed(tmp_path: Path, name: str, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("all of it")
    precious.chmod(0o600)
    planted = tmp_path / "spool" / name
    planted.parent.mkdir()
    if kind == "link":
        planted.symlink_to(precious)
    else:
        os.mkfifo(planted)
    with pytest.raises(CannotWrite, match=NOT_PLAIN) as refused:
        begin(planted.with_name("spool.db"))
    assert str(refused.value).startswith(f"{planted}: ")
    assert (precious.read_text(), stat.S_IMODE(precious.stat().st_mode)) == ("all of it", 0o600)
    if name == "spool.db":
        with pytest.raises(InputMissing, match=NOT_PLAIN):
            read_latest(planted, 1)


def test_a_note_of_a_death_that_cannot_be_written_keeps_no_pin_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins are turned off behind it."""
    os.mkfifo(death_file(tmp_path / "spool.db"))
    with caplog.at_level(logging.ERROR):
        note_death(tmp_path / "spool.db", {"SERVICE_RESULT": "oom-kill"})
    assert NOT_PLAIN in caplog.text


def as_nobody(action: Callable[[], None]) -> str:
    """What goes wrong if another user does it."""

    def act() -> str:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            action()
        except FlashdError as error:
            return str(error)
        return "nothing"

    return in_child(act, Limits(seconds=20, memory=64 * MIB))


@pytest.mark.root
def test_two_users_and_their_umasks_share_a_spool_or_are_told_whose_it_is(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    path = tmp_path / "spool" / "spool.db"
    before = os.umask(0o077)
    try:
        begin(path)
    finally:
        os.umask(before)
    path.parent.chmod(0o777)
    lock = path.with_name("spool.db.lock")
    assert as_nobody(lambda: begin(path)) == f"{lock}: Permission denied; it belongs to root"
    for each in path.parent.iterdir():
        os.chown(each, NOBODY, NOBODY)
    assert as_nobody(lambda: begin(path)) == "nothing"
    with held_alone(path):
        served = "another flashd serves from this spool; stop it first"
        assert as_nobody(lambda: begin(path)) == f"{path}: {served}"
    os.umask(0)
    try:
        begin(tmp_path / "open" / "spool.db")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "open").iterdir()}
    assert modes == {0o660}


@pytest.mark.parametrize("kind", ["link", "pipe", "file"])
def test_what_is_not_a_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "flashd.sock"
    if kind == "link":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
    with pytest.raises(CannotWrite, match="something else than a socket; remove it"):
        Server(path, None)
    assert os.path.lexists(path)


@pytest.mark.root
def test_a_socket_of_somebody_who_is_busy_or_another_is_not_taken(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    path = shared / "flashd.sock"
    with closing(socket.socket(socket.AF_UNIX)) as theirs, closing(socket.socket(socket.AF_UNIX)) as waits:
        theirs.bind(str(path))
        theirs.listen(0)
        path.chmod(0o600)
        assert "is another flashd running?" in as_nobody(lambda: Server(path, None).close())
        waits.setblocking(False)
        with suppress(BlockingIOError):
            waits.connect(str(path))  # no more may wait now
        with pytest.raises(CannotWrite, match="is another flashd running"):
            Server(path, None)
        assert path.is_socket()


def test_root_goes_nowhere_by_a_link_of_the_service_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(paths, "SERVICE", tmp_path / "service")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "service" / "flashd").mkdir(parents=True)
    (tmp_path / "service" / "flashd" / "snapshots").symlink_to(elsewhere)
    assert cache_folder() == tmp_path / "home" / ".cache" / "flashd"
    (tmp_path / "service" / "flashd" / "snapshots").unlink()
    assert cache_folder() == tmp_path / "service" / "flashd"
    os.mkfifo(cache_folder() / "figures.json")
    assert Remembered("figures.json", int, "flashd doctor").get("card") is None  # and nobody is waited for


@pytest.mark.root
def test_what_root_makes_in_the_service_s_folder_is_the_service_s(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    make_folder(tmp_path / "flashd" / "snapshots", 0o700)
    made = [tmp_path / "flashd", tmp_path / "flashd" / "snapshots"]
    assert [(each.stat().st_uid, stat.S_IMODE(each.stat().st_mode)) for each in made] == [
        (NOBODY, 0o755),
        (NOBODY, 0o700),
    ]
