"""Runs the flashd command as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FLASHD = [sys.executable, "-m", "flashd"]


def run(*args: str | Path, stdin: bytes = b"", home: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | ({"XDG_CACHE_HOME": str(home)} if home else {})
    return subprocess.run([*FLASHD, *map(str, args)], input=stdin, capture_output=True, check=False, env=env)


def refused(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """One line on standard error, naming what is wrong, and nothing on standard output."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert done.stdout == b""
    assert text.startswith("flashd: ") and text.count("\n") == 1 and "Traceback" not in text
    assert all(word in text for word in words), text
