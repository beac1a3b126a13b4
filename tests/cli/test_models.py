"""flashd models, use and rm, and models that are packed at their first use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from flashd.cli import bundles
from flashd.cli.commands import models
from flashd.cli.main import main
from flashd.config.edit import with_key
from flashd.config.settings import load
from tests.cli.command import refused, run


@pytest.mark.parametrize(
    ("text", "value", "wanted"),
    [
        ("", "/a/b.flash", "model: /a/b.flash\n"),
        ("memory: 1G", "/a/b.flash", "memory: 1G\nmodel: /a/b.flash\n"),
        ("model: /old.flash\nmemory: 1G\n", "/new.flash", "model: /new.flash\nmemory: 1G\n"),
        ("# mine\nmodel:   '/a # b'   # the best\n", "/new.flash", "# mine\nmodel: /new.flash   # the best\n"),
        ("# model: /a\ncard:\n  model: x\n", "/n", "# model: /a\ncard:\n  model: x\nmodel: /n\n"),
        ("model: /a#b # c\n", "/n", "model: /n # c\n"),
        ("model:\n", "/with space: #1", 'model: "/with space: #1"\n'),
    ],
)
def test_a_key_is_set_and_the_rest_stays(text: str, value: str, wanted: str) -> None:
    assert with_key(text, "model", value) == wanted


def test_a_gguf_is_packed_at_its_first_use(tmp_path: Path, tiny_bundle: Path, cache: Path) -> None:
    model = Path(shutil.copy(tiny_bundle.with_name("tiny.gguf"), tmp_path / "mine.gguf"))
    ask: list[str | Path] = [
        "ask",
        "the",
        "--model",
        model,
        "--memory",
        "400M",
        "--max-tokens",
        "2",
        "--no-snapshots",
    ]
    packed = cache / "flashd" / "mine.flash"

    def asked() -> int:
        done = run(*ask)
        assert done.returncode == 0, done.stderr
        return packed.stat().st_ino

    first = asked()
    assert asked() == first
    os.utime(model, (packed.stat().st_mtime + 5,) * 2)
    assert asked() != first
    assert json.loads(run("models", "--json").stdout)[-1]["name"] == "mine"


def test_pack_needs_no_place_and_no_model_is_said(tmp_path: Path, tiny_bundle: Path, cache: Path) -> None:
    done = run("pack", tiny_bundle.with_name("tiny.gguf"))
    assert done.returncode == 0 and str(cache / "flashd" / "tiny.flash") in done.stdout.decode(), done.stderr
    refused(run("ask", "hi", "--model", tmp_path / "none.gguf"), os.EX_NOINPUT, "none.gguf")


@pytest.fixture
def board(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the service has it, with two bundles and a configuration."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for name in ("one", "two"):
        shutil.copy(tiny_bundle, folder / f"{name}.flash")
    (folder / "flashd.yaml").write_text(
        f"# my board\nmodel: {folder}/one.flash  # the first\nmemory: 1M  # too little\ncontext: 64\n"
    )
    monkeypatch.setattr(bundles, "FOLDERS", (folder,))
    monkeypatch.setattr(models, "HIDDEN", ())
    monkeypatch.setattr(models, "CONFIG", folder / "flashd.yaml")
    return folder


def test_models_are_listed_with_what_they_need(board: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (board / "bad.flash").write_bytes(b"no bundle")
    assert main(["models", "--json"]) == 0
    out, err = capfd.readouterr()
    one, two = json.loads(out)
    assert (one["name"], one["family"], one["daemon"], two["daemon"]) == ("one", "llama", True, False)
    assert one["size_bytes"] == (board / "one.flash").stat().st_size and one["least_bytes"] > 20 << 20
    assert "bad.flash" in err and err.count("\n") == 1
    assert main(["models"]) == 0
    assert "two" in capfd.readouterr().out


def test_use_writes_a_model_and_a_memory_that_works(board: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = board / "flashd.yaml"
    config.chmod(0o640)
    assert main(["use", "two", "--config", str(config)]) == 0
    assert "sudo systemctl restart flashd" in capfd.readouterr().out
    lines = config.read_text().splitlines()
    assert lines[:2] == ["# my board", f"model: {board}/two.flash  # the first"]
    assert lines[2].startswith("memory: ") and lines[2].endswith("M  # too little") and lines[3:] == ["context: 64"]
    settings = load(config)
    assert settings.memory is not None and int(settings.memory[:-1]) > 50
    assert config.stat().st_mode & 0o777 == 0o640
    assert main(["use", "one", "--config", str(config)]) == 0
    assert load(config).memory == settings.memory


def test_use_refuses_what_cannot_work(
    board: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = board / "flashd.yaml"
    before = config.read_text()
    assert main(["use", "three", "--config", str(config)]) == os.EX_NOINPUT
    assert "no bundle is called 'three'; those on this machine: one, two" in capfd.readouterr().err
    monkeypatch.setattr(models, "HIDDEN", (board,))
    assert main(["use", "two", "--config", str(config)]) == os.EX_USAGE
    assert "the service cannot see this folder" in capfd.readouterr().err
    monkeypatch.setattr(models, "HIDDEN", ())
    monkeypatch.setattr("flashd.system.memory.available_memory", lambda: 30 << 20)
    assert main(["use", "two", "--config", str(config)]) == os.EX_TEMPFAIL
    assert "M are free" in capfd.readouterr().err
    assert config.read_text() == before


def test_use_leaves_a_file_that_it_does_not_understand(board: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = board / "flashd.yaml"
    config.write_text(f"{{model: {board}/one.flash, context: 64}}\n")
    assert main(["use", "two", "--config", str(config)]) == os.EX_CONFIG
    assert f"change it yourself to model: {board}/two.flash" in capfd.readouterr().err
    assert config.read_text().startswith("{model")


def test_rm_removes_all_but_what_the_daemon_uses(board: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(board / "flashd.yaml")]
    assert main(["rm", "one", *config]) == os.EX_USAGE
    assert "the daemon answers with" in capfd.readouterr().err
    assert main(["rm", "two", *config]) == 0
    assert (board / "one.flash").exists() and not (board / "two.flash").exists()
    assert main(["rm", str(config[1]), *config]) == os.EX_NOINPUT
