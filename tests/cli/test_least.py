"""The smallest memory that is named works, whoever names it: plan, ask's refusal, check-config."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle.rows.kinds import RowKind
from flashd.daemon.http.admission import CLIENTS
from flashd.pack.pack import pack
from flashd.system.memory import MIB
from tests import tiny
from tests.daemon.test_check_config import serves
from tests.goldens.models import GOLDENS

MODELS: tuple[tuple[str, RowKind], ...] = (
    ("llama3", "int8"), ("llama3", "f16"), ("qwen2-yarn", "int8"), ("gemma3", "f16"), ("gemma3", "int8"),
    ("opt", "int8"), ("mixtral", "f16"), ("mixtral", "int8"),
)  # fmt: skip
"""A model of int8 rows may stay whole, one of f16 rows pages."""


def flashd(*args: str | Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"FLASHD_SOCKET": "/nonexistent"}
    command = [sys.executable, "-m", "flashd", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def answers(bundle: Path, mebibytes: int) -> bool:
    """Asks with a budget, which must be enough. Whether the model stayed whole."""
    done = flashd(
        "ask", "--model", bundle, "--memory", f"{mebibytes}M", "--context", "64", "--max-tokens", "2",
        "--no-snapshots", "--json", "Hi",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["peak_bytes"] <= mebibytes * MIB, f"{told['peak_bytes'] / MIB:.1f} MiB of {mebibytes}"
    whole: bool = told["resident"]
    return whole


def refusal(bundle: Path) -> int:
    """MiB that ask names if it is given too few."""
    done = flashd("ask", "--model", bundle, "--memory", "20M", "--context", "64", "--no-snapshots", "Hi")
    assert done.returncode == os.EX_CONFIG
    (mebibytes,) = re.findall(r"the smallest that works is --memory (\d+)M$", done.stderr.strip())
    return int(mebibytes)


def check_what_is_named(bundle: Path, folder: Path) -> tuple[bool, bool | None]:
    """Whether the model was whole with the least memory, and with what plan says it is whole from."""
    plan = json.loads(flashd("plan", bundle, "--context", "64", "--json").stdout)
    least = plan["smallest"] // MIB
    named = refusal(bundle)
    assert abs(named - least) <= 1  # a start may take a little more than another
    at_least = answers(bundle, min(named, least))
    service = check_the_service(bundle, folder)
    assert service * MIB > plan["smallest"] + CLIENTS  # what its clients may make it hold is in its figure
    return at_least, None if plan["whole"] is None else answers(bundle, plan["whole"] // MIB)


def check_the_service(bundle: Path, folder: Path) -> int:
    """MiB that check-config names, with which the service has to start and check-config to be content."""
    config = folder / "flashd.yaml"
    text = f"model: {bundle}\nmemory: {{}}\ncontext: 64\nsnapshots: false\n"
    text += f"api: {{{{socket: {folder}/s}}}}\nspool: {{{{path: {folder}/spool.db}}}}\n"
    config.write_text(text.format("50M"))
    (named,) = re.findall(r"the smallest that works is (\d+)M$", flashd("check-config", config).stderr.strip())
    config.write_text(text.format(f"{named}M"))
    assert flashd("check-config", config).returncode == 0
    assert serves(config, folder)
    return int(named)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_the_least_memory_of_a_tiny_model(family: str, kind: RowKind, tmp_path: Path) -> None:
    pack(GOLDENS[family].write(tmp_path / "m.gguf"), tmp_path / "m.flash", kind)
    _, from_there = check_what_is_named(tmp_path / "m.flash", tmp_path)
    assert from_there is (None if kind == "f16" or "expert_count" in GOLDENS[family].keys else True)


SIZES = {
    "wide": {"HIDDEN": 1024, "HEADS": 16, "KV_HEADS": 4, "HEAD_DIM": 64, "NEURONS": 3072, "LAYERS": 2},
    "deep": {"HIDDEN": 256, "HEADS": 16, "KV_HEADS": 4, "NEURONS": 1024, "LAYERS": 24},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "f16"])
@pytest.mark.parametrize("size", SIZES)
def test_no_shape_takes_more_than_its_plan(
    size: str, kind: RowKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models whose weights are in different places, each large enough to show if one was not counted."""
    for name, value in SIZES[size].items():
        monkeypatch.setattr(tiny, name, value)
    bundle = tmp_path / "m.flash"
    pack(tiny.write(tmp_path / "m.gguf", kind=Kind.F16), bundle, kind)
    plan = json.loads(flashd("plan", bundle, "--context", "64", "--json").stdout)
    least, whole = plan["smallest"] // MIB, plan["whole"]
    answers(bundle, least)
    answers(bundle, least + 7)
    if whole is not None:
        assert answers(bundle, whole // MIB) and answers(bundle, whole // MIB + 40)


def test_the_least_memory_of_smollm2(packed: dict[str, Path], tmp_path: Path) -> None:
    words = flashd("plan", packed["int4"], "--context", "64").stdout
    (named,) = re.findall(r"the least that works +(\d+)\.0 MiB", words)
    answers(packed["int4"], int(named))
    assert check_what_is_named(packed["int4"], tmp_path) == (False, True)
