"""A stick is taken if the owner of a key that the board knows has signed it, and not parsed before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flashd.cli.main import main
from flashd.errors import ConfigError, DataError
from flashd.update import manifest, signature
from flashd.update.manifest import MANIFEST, SIGNATURE
from flashd.update.signature import SecretKey
from tests.update.board import NEW, OLD, Board

FILE = b'needs: "0.1"\n'
KEY = """\
untrusted comment: minisign public key CA6F60E83A18E838
RWQ46Bg66GBvyuASvTsXBgnm3JYIJDEtpD29etkm1VZRvjN4TzXz37C/
"""
SECRET = """\
untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAOOgYOuhgb8oRTL739/jXGMk8aFMuFqGRoPf6Wnu09bUQ\
FIO6bbLifuASvTsXBgnm3JYIJDEtpD29etkm1VZRvjN4TzXz37C/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
"""
SIGNED = """\
untrusted comment: signature from minisign secret key
RUQ46Bg66GBvykB6DJDAB/F5FAcuT+chP84mTA1Ou8mNNJWX3jKawce36KEiZjlKu8mzKQlUCE6R/MhCVsmxRjlL0WPgho/8CgQ=
trusted comment: timestamp:1795698830	file:m.yaml	hashed
H6mMMhA9N/+m4Bpv2pjg31vhJj2aBPUJklmwL0MnX3Oleng6piH0TkIFUUcDA8zyRyqrszF/m0K+IvihmZQ3Cg==
"""
"""What minisign 0.11 has made: a key without a password, and a signature of FILE."""


@pytest.fixture
def careful(board: Board) -> Board:
    """A board that takes only what is signed."""
    board.config.write_text(board.config.read_text().replace("updates: {unsigned: true}\n", ""))
    return board


def signed(board: Board, key: SecretKey) -> None:
    (board.stick / SIGNATURE).write_text(key.sign((board.stick / MANIFEST).read_bytes(), "a test"))


def trusted(board: Board, key: SecretKey) -> None:
    (board.places.keys / "maker.pub").write_text(key.public_text())


def test_minisign_s_keys_and_signatures_are_understood(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_text(KEY)
    keys = signature.read_keys(tmp_path)
    signature.check(FILE, SIGNED.encode(), keys, tmp_path)
    with pytest.raises(DataError, match="wrong: the files are not those"):
        signature.check(FILE + b"#", SIGNED.encode(), keys, tmp_path)
    with pytest.raises(DataError, match="wrong: the files are not those"):
        signature.check(FILE, SIGNED.replace("file:m", "file:n").encode(), keys, tmp_path)
    key = SecretKey.parse(SECRET.encode(), tmp_path)
    assert key.name == "CA6F60E83A18E838" and key.public_text().splitlines()[1] == KEY.splitlines()[1]
    assert key.text().splitlines()[1] == SECRET.splitlines()[1]
    assert key.sign(FILE, "x").splitlines()[1] == SIGNED.splitlines()[1]


@pytest.mark.skipif(not shutil.which("minisign"), reason="needs minisign")
def test_minisign_understands_ours(tmp_path: Path) -> None:
    key = SecretKey.new()
    for name, text in (("k.pub", key.public_text()), ("m.minisig", key.sign(FILE, "ours")), ("m", FILE.decode())):
        (tmp_path / name).write_text(text)
    assert os.system(f"cd {tmp_path} && minisign -V -q -p k.pub -m m") == 0


def test_a_stick_that_is_not_signed_is_not_even_parsed(careful: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "parse_manifest", lambda *_: pytest.fail("parsed"))
    with pytest.raises(DataError, match=r"minisig: not there, and this board takes only what is signed"):
        careful.update()
    trusted(careful, SecretKey.new())
    for sign, words in (
        (lambda: signed(careful, SecretKey.new()), "which this board does not know"),
        (lambda: (careful.stick / SIGNATURE).write_text(SIGNED), "key CA6F60E83A18E838, which this board does not"),
        (lambda: (careful.stick / SIGNATURE).write_text("x"), "not a signature as"),
        (lambda: (careful.stick / SIGNATURE).write_bytes(SIGNED.encode() + bytes(5000)), "not a signature as"),
    ):
        sign()
        with pytest.raises(DataError, match=words):
            careful.update()
    assert careful.state() == OLD and careful.starts == []


def test_a_signed_stick_is_taken(careful: Board) -> None:
    key = SecretKey.new()
    trusted(careful, key)
    signed(careful, key)
    assert careful.update() == [careful.model, careful.config] and careful.state() == NEW


def test_a_stick_changed_after_it_was_signed_is_refused(careful: Board) -> None:
    key = SecretKey.new()
    trusted(careful, key)
    signed(careful, key)
    with (careful.stick / "flashd.yaml").open("a") as file:
        file.write("context: 99999999999")
    with pytest.raises(DataError, match="its SHA-256 is"):
        careful.update()
    careful.write()
    with pytest.raises(DataError, match="wrong: the files are not those that were signed"):
        careful.update()
    assert careful.state() == OLD


def test_a_wrong_signature_is_refused_even_if_none_is_needed(board: Board) -> None:
    signed(board, SecretKey.new())
    with pytest.raises(DataError, match="which this board does not know"):
        board.update()


@pytest.mark.parametrize("text", ["", "x\ny\n", KEY.replace("RWQ", "RXQ"), KEY[:-8], SIGNED])
def test_a_file_among_the_keys_that_is_not_one_is_named(careful: Board, text: str) -> None:
    (careful.places.keys / "odd.pub").write_text(text)
    signed(careful, SecretKey.new())
    with pytest.raises(ConfigError, match=r"odd\.pub: not a public key"):
        careful.update()


def test_flashd_makes_a_key_and_signs(careful: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, stick = tmp_path / "maker.key", str(careful.stick)
    assert main(["sign", "--new-key", str(key)]) == 0
    assert key.stat().st_mode & 0o777 == 0o600
    shutil.copy(f"{key}.pub", careful.places.keys)
    assert main(["sign", stick, "--key", str(key)]) == 0
    assert careful.update() and careful.state() == NEW
    capsys.readouterr()
    assert main(["sign", "--new-key", str(key)]) == os.EX_CANTCREAT
    assert main(["sign", stick, "--key", f"{key}.pub"]) == os.EX_DATAERR
    assert main(["sign", stick, "--key", str(tmp_path / "no")]) == os.EX_NOINPUT
    assert main(["sign", stick]) == main(["sign", stick, "--new-key", "x"]) == os.EX_USAGE
    (careful.stick / "flashd.yaml").write_text("model: x\n")
    assert main(["sign", stick, "--key", str(key)]) == os.EX_DATAERR
    said = capsys.readouterr().err
    assert "is there already" in said and "not a secret key" in said and "correct the manifest" in said
    assert len(said.splitlines()) == 6
