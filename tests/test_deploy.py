"""The programs in deploy/: what they say if something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documents import ROOT

DEPLOY = ROOT / "deploy"


def run(program: str, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEPLOY / program, *words], capture_output=True, text=True, check=False, env=os.environ | more
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fetch-wheels", "usage: deploy/fetch-wheels ARCHITECTURE PYTHON\n"),
        ("fetch-wheels aarch64", "usage: deploy/fetch-wheels ARCHITECTURE PYTHON\n"),
        ("fetch-wheels arm64 3.11", "deploy/fetch-wheels: arm64 is not known; there are aarch64 and x86_64\n"),
        ("fetch-wheels aarch64 2.7", "deploy/fetch-wheels: Python 2.7 is not known; there are 3.11, 3.12, 3.13"),
        ("install --kisok", "deploy/install: --kisok is not known\nusage: sudo deploy/install"),
    ],
)
def test_what_is_typed_wrongly_is_refused_with_what_is_right(words: str, says: str) -> None:
    done = run(*words.split())
    assert done.returncode == os.EX_USAGE and done.stdout == "" and done.stderr.startswith(says), done
    assert run(words.split()[0], "--help").returncode == 0 or words.startswith("install")


def test_the_installer_names_all_missing_packages_at_once(tmp_path: Path) -> None:
    """In a PATH with nothing but a few programs, and a Python that has neither venv nor systemd."""
    for name in ("dirname", "tr", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    for name, body in {"id": "echo 0", "python3": "case $2 in *version*) exit 0 ;; esac; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    installer = (DEPLOY / "install").read_text().replace("/usr/lib/python3/dist-packages", str(tmp_path))
    (tmp_path / "install").write_text(installer)
    done = subprocess.run(
        ["/bin/sh", tmp_path / "install", "--kiosk"], capture_output=True, text=True, check=False,
        env={"PATH": str(tmp_path)},
    )  # fmt: skip
    missing = "python3-venv python3-systemd cage chromium"
    assert done.stderr == f"deploy/install: packages are missing; install them first: apt install {missing}\n"
    assert done.returncode == os.EX_UNAVAILABLE
