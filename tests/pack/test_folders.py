"""A Hugging Face folder of every family, as transformers saves it, packs to what its GGUF packs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.pack.families.registry import FAMILIES
from flashd.pack.pack import pack
from tests.goldens import folders
from tests.goldens.models import GOLDENS, HERE

SAVED = [name for name in GOLDENS if (HERE / f"{name}.json").is_file()]
ELSEWHERE = {"smallthinker"}  # which transformers does not have: see test_safetensors


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_packs_to_what_its_gguf_packs_to(tmp_path: Path, name: str) -> None:
    model = GOLDENS[name].write(tmp_path / "m.gguf")
    saved, context = folders.write(tmp_path / "m", name, model), GOLDENS[name].context
    theirs = pack(saved, tmp_path / "folder.flash", "f16", context=context).model
    ours = pack(model, tmp_path / "gguf.flash", "f16", context=context).model
    assert (theirs.activation, theirs.threshold) == (ours.activation, ours.threshold)
    assert (theirs.attention, theirs.layer_kinds) == (ours.attention, ours.layer_kinds)
    assert (theirs.experts, theirs.context) == (ours.experts, ours.context)
    with Bundle(tmp_path / "folder.flash") as folder, Bundle(tmp_path / "gguf.flash") as gguf:
        for section in gguf.header.sections:
            read = folder.read(section.name), gguf.read(section.name)
            # the one is float32 arithmetic of weights less one, or of rotary parameters, the other of both
            if section.name == "rope" or section.name.endswith("vectors"):
                a, b = (np.frombuffer(part, np.float32) for part in read)
                assert a.shape == b.shape and close(a, b)
            else:
                assert read[0] == read[1], section.name


def close(a: Floats, b: Floats) -> bool:
    return bool(np.abs(a - b).max(initial=0) <= 1e-6 * np.abs(b).max(initial=1e-9))


def test_every_family_has_a_folder() -> None:
    assert {GOLDENS[name].architecture for name in SAVED} | ELSEWHERE == set(FAMILIES)
    assert all(path.stat().st_size < 200_000 for path in HERE.iterdir() if path.is_file())
