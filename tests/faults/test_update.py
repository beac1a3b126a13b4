"""Updates from a folder: verified first, switched at once, undone where the daemon does not start with them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from flashd.bundle.reader import Bundle
from flashd.cli.main import main
from flashd.config import settings
from flashd.errors import CannotWrite, ConfigError, DataError, FlashdError, InputMissing
from flashd.pack.pack import pack
from flashd.update import stick as updates
from flashd.update.stick import MANIFEST, read_manifest, undo, update
from tests import tiny
from tests.faults.test_newfile import killed_at

pytestmark = pytest.mark.slow


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Board:
    """A model and a configuration in use, and a stick that brings others."""

    def __init__(self, root: Path, bundle: Path) -> None:
        self.stick, home = root / "stick", root / "home"
        for folder in (self.stick, home):
            folder.mkdir()
        self.config, self.model = home / "flashd.yaml", home / "model.flash"
        self.unfinished = home / "update.unfinished"
        self.model.write_bytes(bundle.read_bytes())
        self.config.write_text(f"model: {self.model}\ncontext: 256\n")
        pack(tiny.write(root / "new.gguf", "qwen2"), self.stick / "new.flash", "int4")
        (self.stick / "flashd.yaml").write_text(f"model: {self.model}\ncontext: 512\n")
        self.starts: list[tuple[str, int]] = []
        self.broken = False
        self.write()

    def write(self, needs: str = "0.1", **sums: str) -> None:
        new, settings = self.stick / "new.flash", self.stick / "flashd.yaml"
        (self.stick / MANIFEST).write_text(
            f"needs: '{needs}'\n"
            f"bundle: {{file: new.flash, sha256: '{sums.get('bundle', sha(new))}'}}\n"
            f"configuration: {{file: flashd.yaml, sha256: '{sums.get('configuration', sha(settings))}'}}\n"
        )

    def state(self) -> tuple[str, int]:
        """The model's name and the configured context, both whole."""
        with Bundle(self.model) as bundle:
            bundle.verify()
            return bundle.header.model.family, settings.load(self.config).context

    def restart(self) -> None:
        self.starts.append(self.state())
        if self.broken and self.starts[-1] != OLD:
            raise FlashdError("flashd does not start")

    def update(self) -> list[Path]:
        return update(self.stick, self.config, self.unfinished, self.restart)


OLD, NEW = ("llama", 256), ("qwen2", 512)


class PowerCut(BaseException):
    """Nothing catches it."""


@pytest.fixture
def board(tmp_path: Path, tiny_bundle: Path) -> Board:
    return Board(tmp_path, tiny_bundle)


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
    assert undo(board.unfinished) == [board.config, board.model]
    assert board.state() == OLD and sha(board.model) == before
    assert undo(board.unfinished) == []
    assert board.update() and board.state() == NEW
    assert undo(board.unfinished) == []  # one that came to its end stays
    assert board.state() == NEW


def test_what_was_not_there_is_gone_after_an_undo(board: Board) -> None:
    board.model.unlink()
    board.broken = True
    with pytest.raises(InputMissing, match=r"model\.flash"):  # from the second start, which has none again
        board.update()
    assert not board.model.exists() and undo(board.unfinished) == []


@pytest.mark.parametrize("rot", [b"[[", b'[["/a\xff","b"]]'])
def test_a_damaged_record_is_named(board: Board, rot: bytes) -> None:
    board.unfinished.write_bytes(rot)
    with pytest.raises(DataError, match=r"update\.unfinished: damaged"):
        undo(board.unfinished)


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
        ("\x00", "special characters"),
        ("needs: '0'\nrun: rm", "line 2: 'run' is not known; allowed are needs, bundle, configuration"),
    ],
)  # fmt: skip
def test_manifests_that_are_refused(board: Board, text: str, error: str) -> None:
    (board.stick / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=error):
        read_manifest(board.stick)


def test_a_stick_without_an_update(board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputMissing, match="not there; README says"):
        update(tmp_path, board.config, board.unfinished, board.restart)
    assert main(["update", str(tmp_path), "--config", str(board.config)]) == os.EX_NOINPUT
    assert "flashd-update.yaml" in capsys.readouterr().err


def test_a_stick_pulled_while_it_is_copied_changes_nothing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = updates._keep

    def pulled(path: Path) -> None:
        keep(path)
        (board.stick / "flashd.yaml").unlink(missing_ok=True)  # when the model has been copied

    monkeypatch.setattr(updates, "_keep", pulled)
    with pytest.raises(FlashdError, match=r"old one is in place again: .*flashd\.yaml: .*is the stick still in\?"):
        board.update()
    assert board.state() == OLD and board.starts == [OLD] and not board.unfinished.exists()


def test_where_nothing_is_installed_nothing_is_undone(board: Board, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "update.unfinished"
    with pytest.raises(InputMissing, match="nowhere: not there; updates are for a board"):
        undo(nowhere)
    with pytest.raises(InputMissing, match="nowhere: not there; updates are for a board"):
        update(board.stick, board.config, nowhere, board.restart)
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
            undo(board.unfinished)  # as the next boot does
            assert board.state() == (OLD if begun else found)
        board.update()
        assert board.state() == NEW
        left = {p.name for p in board.model.parent.iterdir()}
        assert left <= {"model.flash", "flashd.yaml", "model.flash.old", "flashd.yaml.old"}
        for path in (*old, *board.model.parent.glob("*.old")):
            path.unlink()
        if not killed:
            break
    assert {OLD, NEW} <= seen <= {OLD, NEW, ("qwen2", 256)} and number > 10
