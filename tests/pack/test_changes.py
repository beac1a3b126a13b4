"""Model files that shrink or change while they are packed: one line each, and no half bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.goldens import folders
from tests.goldens.models import GOLDENS

PACK = """
import os, sys
from pathlib import Path
from flashd.errors import DataError
from flashd.pack.pack import pack

how, model, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

def meddle(done, total):
    with file.open("r+b") as opened:
        if how == "shrinks":
            opened.truncate(4096)
        else:
            opened.seek(-1, os.SEEK_END)
            opened.write(b"x")

try:
    pack(model, model.with_name("out.flash"), "int8", meddle)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["shrinks", "is written to"])
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_that_changes_while_it_is_packed(tmp_path: Path, kind: str, how: str) -> None:
    """In a process of its own: what is mapped and shrinks kills a process without a word."""
    model = file = GOLDENS["llama3"].write(tmp_path / "m.gguf")
    if kind == "safetensors":
        model = folders.write(tmp_path / "m", "llama3", model)
        file = model / "model.safetensors"
    ran = subprocess.run(
        [sys.executable, "-c", PACK, how, str(model), str(file)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-1000:]
    (line,) = ran.stdout.splitlines()
    assert line.startswith(f"{file}: changed while it was read, from ") and "pack it again" in line
    assert not list(tmp_path.glob("*.flash*")) and not list(tmp_path.glob(".*"))
