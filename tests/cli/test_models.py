"""flashd models, use and rm, and models that are packed at their first use."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from flashd.cli import bundles
from flashd.cli.commands import models
from flashd.cli.main import main
from flashd.cli.parser import parse
from flashd.config.edit import with_key
from flashd.config.settings import load
from flashd.engine.paging.card_speed import CardSpeed, remember
from flashd.engine.planning import plan as plan_module
from flashd.pack.pack import pack
from flashd.update import service
from tests import tiny
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


def test_pack_names_what_can_guess_for_what(
    tmp_path: Path, tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundles, "SMALL", 0.9)  # most of these files is the same in all
    source, out = tiny_bundle.with_name("tiny.gguf"), tmp_path / "small.flash"
    (cache / "flashd").mkdir(parents=True)
    large = cache / "flashd" / "large.flash"
    pack(source, large, "f16")
    shutil.copy(tiny_bundle, tmp_path / "as_large.flash")
    (tmp_path / "bad.flash").write_bytes(tiny_bundle.read_bytes()[:5000])
    with monkeypatch.context() as patch:
        texts, merges = tiny._vocabulary()
        patch.setattr(tiny, "_vocabulary", lambda: ([*texts[:-2], "tin", *texts[-2:]], merges))
        pack(tiny.write(tmp_path / "words.gguf"), tmp_path / "words.flash", "f16")
    assert main(["pack", str(source), "--out", str(out), "--rows", "int4"]) == 0
    _, said = capfd.readouterr().out.splitlines()
    assert said == (
        "small.flash can make guesses for large.flash, since their tokenizers are the same. Whether it pays:"
        f" flashd plan {large} --draft {out}"
    )
    parse(said.split("flashd ")[1].split())
    # packed after it, the large one names it just as well
    shutil.copy(out, large.with_name("small.flash"))
    assert list(bundles.guessers(large)) == [bundles.Guesser(large, large.with_name("small.flash"))]


@pytest.fixture
def board(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the service has it, with two bundles and a configuration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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
    assert one["whole"] and one["tokens_per_second"] > 0
    assert main(["models"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[0].split() == ["NAME", "FAMILY", "SIZE", "LEAST", "RAM", "TOKENS/S"]
    assert re.fullmatch(r"two +llama +\d+ MiB +\d+ MiB  about \d+(\.\d)?", shown[2]), shown
    assert shown[-1] == "Tokens/s are an estimate for this machine, with memory: 1M."


def test_a_plan_says_the_rate_to_expect(board: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(board / "one.flash"), "--memory", "1G"]
    for after in ("", " or more, if the text repeats itself"):
        pages = bool(after)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan_module, "_can_be_whole", lambda header, pages=pages: not pages)
            assert main(plan) == 0
            shown = capfd.readouterr().out
            assert re.search(rf"^tokens a second, about +[0-9.]+{after}$", shown, re.MULTILINE), shown
            assert ("A card of 45 MB/s is assumed" in shown) == pages
            assert main([*plan, "--json"]) == 0
            assert json.loads(capfd.readouterr().out)["tokens_per_second"] > 0


def test_the_rate_of_a_model_that_pages_is_not_known_without_its_card(
    board: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_can_be_whole", lambda header: False)
    monkeypatch.setattr(plan_module, "_passing_bytes", lambda header, pinned: 1 << 20)
    monkeypatch.setattr(models, "_rate", lambda found: "?" if found.tokens_per_second is None else "known")
    assert main(["models"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^two .* \?$", out, re.MULTILINE) and out.endswith(
        "?: flashd doctor measures the card, once.\n"
    )
    remember(board / "two.flash", CardSpeed(bandwidth=45e6, random_reads={4096: 100.0}, when=0.0))
    assert main(["models"]) == 0
    assert re.search(r"^two .* known$", capfd.readouterr().out, re.MULTILINE)


SYSTEMCTL = """#!/bin/sh
echo "$@" >>{log}
case $1 in
show) echo {pid} ;;
restart) grep -q two.flash {config} && [ -e {folder}/bad ] && {{ echo 'it failed' >&2; exit 1; }} ;;
esac
exit 0
"""


@pytest.fixture
def systemd(board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that says it ran this process, and writes down what it is told. `bad` has it fail with `two`."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "systemctl.log"
    text = SYSTEMCTL.format(log=log, pid=os.getpid(), config=board / "flashd.yaml", folder=board)
    (tmp_path / "bin/systemctl").write_text(text)
    (tmp_path / "bin/systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(models, "SYSTEMD", tmp_path)
    return log


def test_use_starts_the_service_again(board: Path, systemd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["use", "two", "--config", str(board / "flashd.yaml")]) == 0
    assert systemd.read_text().splitlines()[-1] == "restart flashd.service"
    assert capfd.readouterr().out.splitlines()[-1] == "flashd answers with it now"


def test_use_puts_the_configuration_back_if_the_service_does_not_start(
    board: Path, systemd: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (board / "bad").touch()
    config = board / "flashd.yaml"
    before = config.read_text()
    assert main(["use", "two", "--config", str(config)]) == os.EX_SOFTWARE
    words = f"flashd does not start: it failed; {config} is as it was again. Why: journalctl -u flashd\n"
    assert capfd.readouterr().err == f"flashd: {words}"
    assert config.read_text() == before
    assert systemd.read_text().splitlines()[-2:] == ["restart flashd.service"] * 2


def test_use_counts_what_the_service_will_give_back(
    board: Path, systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashd.system.memory.available_memory", lambda: 1 << 20)
    assert service.held() > 20 << 20
    monkeypatch.setattr(service, "held", lambda: 1 << 40)
    assert main(["use", "two", "--config", str(board / "flashd.yaml")]) == 0


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
