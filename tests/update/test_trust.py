"""What the service can write, or a stick has, leads root nowhere: no other file changes, and nothing hangs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flashd.config import settings
from flashd.errors import CannotWrite, ConfigError, DataError, FlashdError, InputMissing
from flashd.system.new_file import NewFile
from flashd.update import install
from flashd.update.manifest import MANIFEST
from flashd.update.undo import Change
from tests.update.board import OLD, Board, sha


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """A pipe that is opened waits for whoever writes into it."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A file that is none of an update's business."""
    path = tmp_path / "shadow"
    path.write_text("secret")
    return path


def write_record(board: Board, path: Path, replaces: bool = True) -> None:
    change = Change(str(path), path.stat().st_size, sha(path), replaces)
    board.unfinished.write_bytes(msgspec.json.encode([change]))


def test_a_record_that_the_service_wrote_is_not_read(board: Board, other: Path) -> None:
    """As `update.unfinished` in the service's own folder once was."""
    for name in ("update.unfinished", "unfinished"):
        (board.places.models / name).write_text(f'[["{other}", "{sha(other)}"]]')
    assert board.undo() == [] and other.read_text() == "secret"
    board.update()
    assert other.read_text() == "secret"


@pytest.mark.parametrize("replaces", [True, False])
def test_a_record_can_name_only_what_an_update_may_touch(board: Board, other: Path, replaces: bool) -> None:
    other.with_name("shadow.old").write_text("root::0:0")
    for path in (other, board.places.models / ".." / ".." / "shadow"):
        write_record(board, path, replaces)
        with pytest.raises(ConfigError, match="shadow: an update may not change it"):
            board.undo()
    assert other.read_text() == "secret"


def test_a_record_s_folder_that_became_a_link_is_not_followed(board: Board, other: Path) -> None:
    (board.places.models / "inner").symlink_to(other.parent)
    write_record(board, board.places.models / "inner" / "shadow", replaces=False)
    with pytest.raises(CannotWrite, match=r"inner: .*; an update needs a folder there, not a link"):
        board.undo()
    assert other.read_text() == "secret"


@pytest.mark.parametrize("where", ["../shadow", "/", ".", "inner/shadow", "/etc/passwd"])
def test_a_stick_names_no_destination_outside(board: Board, other: Path, where: str) -> None:
    (board.places.models / "inner").symlink_to(other.parent)
    (board.stick / "flashd.yaml").write_text(f"model: {board.places.models / where}\n")
    board.write()
    with pytest.raises((ConfigError, CannotWrite), match=r"an update (may not change it|needs a folder there)"):
        board.update()
    assert other.read_text() == "secret" and board.state() == OLD and board.starts == []


def odd(path: Path, kind: str, other: Path) -> None:
    path.unlink()
    match kind:
        case "link":
            path.symlink_to(other)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero, which never ends


KINDS = ["link", "pipe", "folder", pytest.param("device", marks=pytest.mark.skipif(os.geteuid() != 0, reason="root"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [MANIFEST, f"{MANIFEST}.minisig", "new.flash", "flashd.yaml"])
def test_a_stick_s_files_are_plain(board: Board, other: Path, name: str, kind: str) -> None:
    (board.stick / name).touch()
    odd(board.stick / name, kind, other)
    with pytest.raises(
        InputMissing, match=rf"{re.escape(name)}: not a file but a link, a folder, a pipe or a device"
    ):
        board.update()
    assert board.state() == OLD and board.starts == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_service_s_file_is_plain(board: Board, other: Path, kind: str) -> None:
    odd(board.model, kind, other)
    with pytest.raises(CannotWrite, match=r"model\.flash: not a file but a link"):
        board.update()
    assert other.read_text() == "secret" and board.starts == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_service_s_file_is_plain_when_it_is_put_back(board: Board, other: Path, kind: str) -> None:
    write_record(board, board.model)
    odd(board.model, kind, other)
    with pytest.raises(CannotWrite, match=r"model\.flash: cannot be put back: not a file but a link"):
        board.undo()
    assert other.read_text() == "secret"


def test_a_kept_name_that_is_a_link_is_replaced_and_not_followed(board: Board, other: Path) -> None:
    for name in ("model.flash.old", "model.flash.old.new"):
        (board.model.parent / name).symlink_to(other)
    (board.model.parent / ".model.flash.999999999.partial").mkdir()  # as if a killed update had left it
    before = sha(board.model)
    board.update()
    assert other.read_text() == "secret" and sha(board.model.with_name("model.flash.old")) == before


def test_a_folder_swapped_for_a_link_meanwhile_leads_nowhere(board: Board, tmp_path: Path) -> None:
    """The folder is held open: what has its name when the file is published does not matter."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    inner = board.places.models / "inner"
    inner.mkdir()
    (board.stick / "flashd.yaml").write_text(f"model: {inner / 'model.flash'}\n")
    board.write()

    def swap() -> None:
        inner.rename(board.places.models / "was")
        inner.symlink_to(elsewhere)
        raise FlashdError("flashd does not start")

    board.restart = swap  # type: ignore[method-assign]
    with pytest.raises(CannotWrite, match="an update needs a folder there, not a link"):
        board.update()
    assert list(elsewhere.iterdir()) == []


def test_a_stick_that_gives_other_bytes_later_gains_nothing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is parsed is the copy whose SHA-256 was right, and not what the stick says when it is asked again."""
    seen = []
    verify = install._verify_bundle

    def lies(copy: NewFile, shown: Path) -> None:
        (board.stick / "new.flash").write_bytes(b"other")
        verify(copy, shown)
        seen.append(shown)

    monkeypatch.setattr(install, "_verify_bundle", lies)
    assert board.update() and seen == [board.stick / "new.flash"]


def test_what_fails_its_sum_is_not_parsed(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(text: str, name: str, *_: object) -> settings.Settings:
        parsed.append(name)
        return parse(text, name)

    parsed: list[str] = []
    parse = settings.parse
    monkeypatch.setattr(install, "_verify_bundle", lambda copy, shown: parsed.append(shown.name))
    monkeypatch.setattr(settings, "parse", counted)
    for part in ("bundle", "configuration"):
        board.write(**{part: "0" * 64})
        with pytest.raises(DataError, match="its SHA-256 is"):
            board.update()
    # the board's own each time, and the stick's before its bundle turned out to be another
    assert parsed == [str(board.config), str(board.stick / "flashd.yaml"), str(board.config)]
