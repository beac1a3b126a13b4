"""A bundle appears whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashd.bundle.prefix import MAGIC
from flashd.bundle.reader import Bundle
from flashd.bundle.writer import BundleWriter
from flashd.errors import CannotWrite
from flashd.pack.pack import pack
from tests import tiny


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_a_full_disk_is_said_and_nothing_is_left(
    full_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "LAYERS", 8)  # its layers do not fit, and what comes before them does
    source = tiny.write(tmp_path / "m.gguf")
    with pytest.raises(CannotWrite, match="disk is full"):
        pack(source, full_disk / "m.flash", "int8")
    assert list(full_disk.iterdir()) == []


def test_a_limit_on_file_size_is_said_and_the_old_file_stays(tmp_path: Path) -> None:
    source, out = tiny.write(tmp_path / "m.gguf"), tmp_path / "m.flash"
    out.write_bytes(MAGIC + b"old")
    # the kernel's signal would end the process before the error comes
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
    try:
        with pytest.raises(CannotWrite, match=r"m\.flash"):
            pack(source, out, "int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_bytes() == MAGIC + b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.flash", "m.gguf"]


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="No such file"):
        BundleWriter(tmp_path / "none" / "m.flash")


def test_a_failure_inside_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "m.flash"
    out.write_text("old")

    def broken() -> Iterator[bytes]:
        yield bytes(100)
        raise RuntimeError("the source went away")

    with pytest.raises(RuntimeError), BundleWriter(out) as writer:
        writer.add("part", broken())
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.flash"]


@pytest.mark.parametrize("seconds", [0.9, 1.6, 2.5])
def test_a_kill_leaves_the_old_bundle_or_the_new_one(tmp_path: Path, smollm: Path, seconds: float) -> None:
    out = tmp_path / "m.flash"
    pack(tiny.write(tmp_path / "old.gguf"), out, "int4")
    command = [sys.executable, "-m", "flashd", "pack", str(smollm), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.flash", "old.gguf"]
    with Bundle(out) as bundle:
        bundle.verify()
        assert bundle.header.model.name == "tiny llama"
