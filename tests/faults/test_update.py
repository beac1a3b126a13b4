"""Updates from a folder: verified first, switched at once, undone where the daemon does not start with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import pytest

from flashd.cli.main import main
from flashd.errors import CannotWrite, ConfigError, DataError, FlashdError, InputMissing
from flashd.update import install
from flashd.update.folder import Folder
from flashd.update.install import update
from flashd.update.manifest import MANIFEST, read_manifest
from tests.faults.test_newfile import killed_at
from tests.update.board import NEW, OLD, Board, sha

pytestmark = pytest.mark.slow


class PowerCut(BaseException):
    """Nothing catches it."""


def test_an_update_is_taken_once_and_the_old_one_kept(board: Board) -> None:
    before = sha(board.model)
    assert board.update() == [board.model, board.config]
    assert board.state() == NEW and board.starts == [NEW]
    assert sha(board.model.with_name("model.flash.old")) == before
    assert board.update() == [] and board.starts == [NEW]


def test_what_does_not_start_is_undone(board: Board) -> None:
    board.broken = True
    with pytest.raises(FlashdError, match="the old one is in place again: flashd does not start"):
        board.update()
    assert board.state() == OLD and board.starts == [NEW, OLD]


def test_a_power_cut_before_the_new_has_started_is_undone(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut() -> None:
        raise PowerCut

    before = sha(board.model)
    with monkeypatch.context() as power, pytest.raises(PowerCut):
        power.setattr(board, "restart", cut)
        board.update()
    assert board.state() == NEW
    assert board.undo() == [board.config, board.model]
    assert board.state() == OLD and sha(board.model) == before
    assert board.undo() == []
    assert board.update() and board.state() == NEW
    assert board.undo() == []  # one that came to its end stays
    assert board.state() == NEW


def test_what_was_not_there_is_gone_after_an_undo(board: Board) -> None:
    board.model.unlink()
    board.broken = True
    with pytest.raises(InputMissing, match=r"model\.flash"):  # from the second start, which has none again
        board.update()
    assert not board.model.exists() and board.undo() == []


@pytest.mark.parametrize("rot", [b"[[", b'[["/a\xff","b"]]'])
def test_a_damaged_record_is_named(board: Board, rot: bytes) -> None:
    board.unfinished.write_bytes(rot)
    with pytest.raises(DataError, match=r"unfinished: damaged"):
        board.undo()


def test_what_is_damaged_changes_nothing(board: Board) -> None:
    new, good = board.stick / "new.flash", (board.stick / "new.flash").read_bytes()
    bent = bytearray(good)
    bent[-9] ^= 1
    new.write_bytes(bent)
    board.write()  # the sum is that of the damaged file: the bundle's own checksums find it
    with pytest.raises(DataError, match="damaged"):
        board.update()
    new.write_bytes(good)
    board.write(configuration="0" * 64)
    with pytest.raises(DataError, match="its SHA-256 is"):
        board.update()
    (board.stick / "flashd.yaml").write_text("modle: x")
    board.write()
    with pytest.raises(ConfigError, match="'modle' is not known"):
        board.update()
    new.unlink()
    with pytest.raises(FlashdError):
        board.update()
    assert board.state() == OLD and board.starts == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("needs: '99'\n", "for flashd 99 and later"),
        ("needs: 1\n", "yaml, line 1: needs: expected a version in quotes, such as '1.0'"),
        ("", "line 1: 'needs' is missing"), ("- x", "line 1: expected keys with their values"),
        ("needs: '0'\nbundle: {file: ../etc/passwd, sha256: x}", "line 2: bundle.file: expected the name of a file"),
        ("needs: '0'\nbundle:\n  file: a\n  sha256: 12", "line 4: bundle.sha256: expected 64 digits in quotes"),
        ("needs: '0'\nbundle: a", "line 2: bundle: expected keys with their values"),
        ("\x00", "a character that no text has"),
        ("needs: '0'\nrun: rm", "line 2: 'run' is not known; allowed are needs, bundle, configuration"),
    ],
)  # fmt: skip
def test_manifests_that_are_refused(board: Board, text: str, error: str) -> None:
    (board.stick / MANIFEST).write_text(text)
    with Folder.at(board.stick) as stick, pytest.raises(DataError, match=error):
        read_manifest(stick, board.places)


def test_a_stick_without_an_update(board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputMissing, match="not there; README says"):
        update(tmp_path, board.places, board.restart)
    assert main(["update", str(tmp_path)]) == os.EX_NOINPUT
    assert "flashd-update.yaml" in capsys.readouterr().err


def test_a_stick_pulled_while_it_is_copied_changes_nothing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    read = install._parts

    def pulled(file: BufferedReader, shown: Path, most: int) -> Iterator[bytes]:
        if shown.suffix == ".flash":
            with Path("/proc/self/mem").open("rb") as gone:  # whose first byte cannot be read
                yield from read(gone, shown, 1)
        yield from read(file, shown, most)

    monkeypatch.setattr(install, "_parts", pulled)
    with pytest.raises(InputMissing, match=r"new\.flash: .*is the stick still in\?"):
        board.update()
    assert board.state() == OLD and board.starts == [] and not board.unfinished.exists()


def test_where_nothing_is_installed_nothing_is_undone(board: Board) -> None:
    board.places.state.rmdir()
    with pytest.raises(InputMissing, match="state: not there; updates are for a board"):
        board.undo()
    with pytest.raises(InputMissing, match="state: not there; updates are for a board"):
        board.update()
    assert board.state() == OLD


def test_a_full_disk_changes_nothing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CannotWrite, match="disk is full"):
        board.update()
    assert board.state() == OLD


def test_a_kill_at_each_write_leaves_whole_files_and_can_be_gone_on_with(board: Board) -> None:
    old = {p: p.read_bytes() for p in (board.model, board.config)}
    seen = set()
    for number in range(1, 200):
        for path, data in old.items():
            path.write_bytes(data)
        killed = killed_at(board.update, number)
        seen.add(found := board.state())
        if killed and number % 2:
            begun = board.unfinished.exists()
            board.undo()  # as the next boot does
            assert board.state() == (OLD if begun else found)
        board.update()
        assert board.state() == NEW
        left = {
            p.name for folder in (board.model.parent, board.config.parent) for p in folder.iterdir() if p.is_file()
        }
        assert left <= {"model.flash", "flashd.yaml", "model.flash.old", "flashd.yaml.old"}
        for path in (*old, *board.config.parent.rglob("*.old")):
            path.unlink()
        if not killed:
            break
    assert {OLD, NEW} <= seen <= {OLD, NEW, ("qwen2", 256)} and number > 10
