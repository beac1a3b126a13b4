"""The command as a person meets it: one clear line for each mistake, the right exit code, no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.command import FLASHD, refused, run


def test_what_is_right_and_would_not_work_is_said(tmp_path: Path) -> None:
    config = tmp_path / "flashd.yaml"
    for text, doubt in (
        ("model: /none.flash", "model: /none.flash is not there"),
        (f"model: {tiny.write(tmp_path / 'm.gguf')}", "m.gguf is not a bundle; make one of it with: flashd pack"),
        ("memory: 900G", "memory: 900G is more than the "),
        (
            "serial: [{name: a, port: /dev/ttyUSB99}, {name: b, port: /dev/null}]",
            "serial: /dev/ttyUSB99 is not there",
        ),
        (f"serial: [{{name: a, port: {tmp_path}}}]", "is not a serial line"),
        ("outputs: [{kind: speech, command: [no-such-voice]}]", "outputs: no-such-voice is not installed"),
    ):
        config.write_text(text)
        done = run("check-config", config)
        assert done.returncode == 0 and b": right; " in done.stdout
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("warning: ") and doubt in line


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8:strict", b"g\xc3\xbc\xff.flash: whole"), ("ascii:strict", b"g\\xfc\\udcff.flash: ")],
)
def test_any_name_of_a_file_is_printed_in_any_locale(
    encoding: str, shown: bytes, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copy(tiny_bundle, tmp_path / os.fsdecode(b"g\xc3\xbc\xff.flash"))
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = run("verify", bundle)
    assert done.returncode == 0 and shown in done.stdout, done


def test_sizes_and_threads_that_nobody_means_are_refused(tiny_bundle: Path) -> None:
    ask: list[str | Path] = ["ask", "the", "--model", tiny_bundle]
    refused(run(*ask, "--memory", "512"), os.EX_USAGE, "'512' is not a size of memory that works; write for example")
    for threads in ("0", "257"):
        refused(run(*ask, "--threads", threads), os.EX_USAGE, f"--threads {threads} is out of range")


def test_a_mistyped_command_is_a_line(tmp_path: Path) -> None:
    for command, words in (
        (["ask", "hi", "--context", "x"], "argument --context: invalid int value: 'x'; see flashd ask --help"),
        (["eval", "m.flash"], "the following arguments are required: --text"), (["sing"], "invalid choice: 'sing'"),
        ([], "COMMAND"), (["bench", tmp_path, "--repeat", "0"], "--repeat 1 and --tokens 2 are the least"),
        (["bench", tmp_path, "--wrap", "'a"], "--wrap 'a: No closing quotation"),
        (["bench", tmp_path, "--wrap", "no-such-command x"], "no-such-command is not a command on this machine"),
    ):  # fmt: skip
        refused(run(*command), os.EX_USAGE, words)


def test_pack_takes_the_place_of_bundles_alone(tmp_path: Path, tiny_bundle: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(tiny_bundle.with_name("tiny.gguf"), model)
    before = model.read_bytes()
    refused(run("pack", model, "--out", model), os.EX_USAGE, "already exists and is not a flashd bundle")
    refused(run("pack", model, "--out", tmp_path), os.EX_USAGE, f"--out {tmp_path}: is a folder")
    assert model.read_bytes() == before
    refused(run("pack", model, "--out", tmp_path / "no" / "m.flash"), os.EX_CANTCREAT, "No such file or directory")
    out = tmp_path / "m.flash"
    for _ in range(2):
        assert run("pack", model, "--out", out).returncode == 0


def test_where_the_default_model_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(run("ask", "hi"), os.EX_CANTCREAT, "Not a directory")


def test_bad_model_files(tmp_path: Path, tiny_bundle: Path) -> None:
    source = tiny_bundle.with_name("tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:5000])
    refused(run("pack", tmp_path / "cut.gguf", "--out", tmp_path / "o.flash"), os.EX_DATAERR, "cut.gguf")
    mamba = tiny.write(tmp_path / "mamba.gguf", "mamba")
    refused(run("pack", mamba, "--out", tmp_path / "o.flash"), os.EX_DATAERR, "'mamba'", "llama, ", "qwen2")
    refused(run("pack", tmp_path / "none", "--out", tmp_path / "o.flash"), os.EX_NOINPUT, "no such file")
    refused(run("pack", source, "--out", "/proc/none/o.flash"), os.EX_CANTCREAT, "/proc/none/o.flash")
    assert not (tmp_path / "o.flash").exists()


def test_bad_bundles(tmp_path: Path, tiny_bundle: Path) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "m.flash"))
    raw = bytearray(path.read_bytes())
    raw[-20000] ^= 1
    path.write_bytes(raw)
    refused(run("verify", path), os.EX_DATAERR, "damaged at byte")
    raw[8] = 99
    path.write_bytes(raw)
    refused(run("info", path), os.EX_DATAERR, "update flashd")
    refused(run("info", tmp_path / "none.flash"), os.EX_NOINPUT, "none.flash")
    refused(run("ask", "hi", "--model", __file__), os.EX_DATAERR, "not a flashd bundle")


def test_bad_prompts(tiny_bundle: Path) -> None:
    ask: list[str | Path] = ["ask", "--model", tiny_bundle, "--memory", "400M"]
    refused(run(*ask, ""), os.EX_USAGE, "the prompt is empty")
    refused(run(*ask, "-", stdin=b" \n"), os.EX_USAGE, "the prompt is empty")
    refused(run(*ask, "-", stdin=b"caf\xe9"), os.EX_DATAERR, "not UTF-8 (byte 3)")
    done = subprocess.run(
        [*(os.fsencode(a) for a in FLASHD), b"ask", b"--model", os.fsencode(tiny_bundle), b"caf\xe9"],
        capture_output=True, check=False,
    )  # fmt: skip
    refused(done, os.EX_DATAERR, "not UTF-8")
    refused(run(*ask, "word " * 300, "--context", "64"), os.EX_USAGE, "context room for 63")
    refused(run(*ask, "hi", "--temperature", "-1"), os.EX_USAGE, "--temperature", "0 to 10")
    refused(run(*ask, "hi", "--memory", "lots"), os.EX_USAGE, "'lots'", "512M")
