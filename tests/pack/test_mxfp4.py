"""Experts that are MXFP4 stay so: 4.25 bits a weight on the card, and every weight as the file has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashd.bundle.arrays import Groups
from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import Constants, multiplied
from flashd.errors import DataError
from flashd.pack.pack import pack
from tests.engine.test_paths import all_logits, opened
from tests.goldens import folders
from tests.goldens.models import EXPERTS, GOLDENS, HIDDEN, TOKENS, Golden, as_mxfp4, biased_mixture
from tests.reference import relative

NEURONS = 64


def golden() -> Golden:
    small = GOLDENS["gpt-oss"]
    keys = small.keys | {"expert_feed_forward_length": NEURONS}
    return replace(small, keys=keys, layer=small.layer | biased_mixture(NEURONS), mxfp4=True)


def experts(path: Path) -> tuple[Bundle, Groups]:
    with Bundle(path) as bundle:
        return bundle, bundle.all_groups(1)


def weights(groups: Groups, kind: str) -> list[Floats]:
    return [dequantise(rows.joined(), kind) for rows in (groups.inputs, groups.down)]  # type: ignore[arg-type]


def test_experts_that_are_mxfp4_keep_every_weight_and_their_bits(tmp_path: Path) -> None:
    model = golden().write(tmp_path / "m.gguf")
    exact = pack(model, tmp_path / "f16.flash", "f16")
    kept = pack(model, tmp_path / "m.flash", "int8")
    assert (exact.formats.ffn, kept.formats.ffn, kept.formats.attention) == ("f16", "mxfp4", "int8")
    assert kept.group.row.nbytes * 8 / HIDDEN == 4.25
    (bundle, theirs), (other, ours) = experts(tmp_path / "f16.flash"), experts(tmp_path / "m.flash")
    for a, b in zip(weights(theirs, "f16"), weights(ours, "mxfp4"), strict=True):
        assert np.array_equal(a, b)
    h = np.random.default_rng(0).standard_normal((3, HIDDEN)).astype(np.float32)
    said = [
        multiplied(Constants(b.header).groups(groups), h=h, before=np.zeros((3, HIDDEN), np.float32))
        for b, groups in ((bundle, theirs), (other, ours))
    ]
    assert relative(*said) < 1e-5
    found = []
    for pinned, chunk in ((0.0, 20), (0.5, 48), (1.0, 1)):
        with opened(tmp_path / "m.flash", pinned, 64) as engine:
            found.append(all_logits(engine, TOKENS.tolist(), chunk))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    with opened(tmp_path / "f16.flash", 0.5, 64) as engine:
        plain = all_logits(engine, TOKENS.tolist(), 20)
    # only attention and head are rounded, to 8 bits
    assert np.median([relative(a, b) for a, b in zip(plain, found[0], strict=True)]) < 0.02


def as_blocks(stack: Floats) -> tuple[np.ndarray, np.ndarray]:
    """(blocks [E, R, K / 32, 16], scales [E, R, K / 32]) as OpenAI's files have them."""
    raw, _ = as_mxfp4(stack)
    parts = raw.reshape(*stack.shape[:2], -1, 17)
    low, high = parts[..., 1:] & 15, parts[..., 1:] >> 4  # GGUF has the first 16 weights in the low bits
    codes = np.concatenate([low, high], -1)
    return codes[..., ::2] | codes[..., 1::2] << 4, parts[..., 0]


def test_a_folder_of_blocks_and_scales_packs_to_what_its_gguf_packs_to(tmp_path: Path) -> None:
    model, tensors = golden().write(tmp_path / "m.gguf"), golden().tensors()
    folder = folders.write(tmp_path / "m", "gpt-oss", model)
    file, kept = folder / "model.safetensors", {}
    for name, values in load_file(file).items():
        if not name.endswith(("_proj", "_proj_bias")) or ".experts." not in name:
            kept[name] = values
            continue
        at, kind = f"blk.{name.split('.')[2]}.ffn_", "bias" if name.endswith("_bias") else "weight"
        parts = [tensors[f"{at}{part}_exps.{kind}"] for part in (("gate", "up") if "gate_up" in name else ("down",))]
        turns = np.stack(parts, 2).reshape(EXPERTS, -1, *parts[0].shape[2:])
        if kind == "bias":
            kept[name] = turns
        else:
            kept[f"{name}_blocks"], kept[f"{name}_scales"] = map(np.ascontiguousarray, as_blocks(turns))
    save_file(kept, file)
    config = json.loads((folder / "config.json").read_text()) | {
        "intermediate_size": NEURONS, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = (pack(path, tmp_path / f"{path.name}.flash", "int4") for path in (model, folder))
    assert ours.formats == theirs.formats and theirs.formats.ffn == "mxfp4"
    with Bundle(tmp_path / "m.gguf.flash") as a, Bundle(tmp_path / "m.flash") as b:
        for section in a.header.sections:
            if ".ffn" in section.name or ".experts" in section.name:
                assert a.read(section.name) == b.read(section.name), section.name
    scales = next(name for name in kept if name.endswith("_scales"))
    kept[scales] = np.full_like(kept[scales], 255)
    save_file(kept, file)
    with pytest.raises(DataError, match="not finite"):
        pack(folder, tmp_path / "n.flash", "int4")
