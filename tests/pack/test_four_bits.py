"""GPTQ's and AWQ's folders: levels, zeros and scales move over as they are where groups allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows.kinds import Bytes, Floats
from flashd.errors import DataError
from flashd.pack.pack import pack
from flashd.pack.sources.safetensors import HfFolder
from tests import tiny, tiny_folder

GROUP = 32
WAYS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    "act-order": {"quant_method": "gptq", "bits": 4, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
}


def write(folder: Path, model: Path, way: str) -> dict[str, Floats]:
    """The folder of a GGUF, its layers' matrices rounded; what they are then, by name."""
    tiny_folder.write(folder, model)
    tensors, kept = dict(load_file(folder / "model.safetensors")), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        values, at = tensors.pop(name), name.removesuffix("weight")
        if values.shape[1] % GROUP:  # down_proj: as a group that is not whole does not pack, the last is left out
            tensors[name] = values
            continue
        group = np.arange(values.shape[1]) // GROUP
        if way == "act-order":
            group = np.random.default_rng(0).permutation(group)
        q, zero, scale = rounded(values, group)
        kept[name] = ((q - zero[:, group]) * scale[:, group]).astype(np.float32)
        tensors |= {at + part: v for part, v in PACKERS[way](q.astype(np.uint32), zero.astype(np.uint32)).items()}
        tensors[f"{at}scales"] = np.ascontiguousarray(scale.T).astype(np.float16)
        if way != "awq":
            tensors[f"{at}g_idx"] = group.astype(np.int32)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": WAYS[way] | {"group_size": GROUP}})
    )
    return kept


def rounded(values: Floats, group: Any) -> tuple[Any, Any, Floats]:
    """(levels [N, K], zeros [N, G], scales [N, G]) with zeros that differ."""
    count = int(group.max()) + 1
    low = np.stack([values[:, group == g].min(1) for g in range(count)], 1)
    high = np.stack([values[:, group == g].max(1) for g in range(count)], 1)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 1, 15)
    return np.clip(np.rint(values / scale[:, group]) + zero[:, group], 0, 15), zero, scale


def eights(values: Bytes, order: Any = range(8)) -> Any:
    """Eight of the last axis in an int32, in an order."""
    parts = values.reshape(*values.shape[:-1], -1, 8)
    return (
        np.bitwise_or.reduce([parts[..., of] << 4 * i for i, of in enumerate(order)]).astype(np.uint32).view(np.int32)
    )


def gptq(q: Any, zero: Any, less: int = 1) -> dict[str, Any]:
    return {"qweight": eights(q).T, "qzeros": eights((zero - less).T.copy())}


def awq(q: Any, zero: Any) -> dict[str, Any]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": eights(q.T.copy(), order), "qzeros": eights(zero.T.copy(), order)}


PACKERS = {"gptq": gptq, "act-order": gptq, "gptq_v2": lambda q, zero: gptq(q, zero, 0), "awq": awq}


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_read_as_they_were_rounded(tmp_path: Path, way: str) -> None:
    kept = write(tmp_path / "f", tiny.write(tmp_path / "m.gguf", "qwen2"), way)
    folder = HfFolder(tmp_path / "f")
    for ours, theirs in (
        ("attn_q", "self_attn.q_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_up", "mlp.up_proj"),
    ):
        tensor, expected = folder.tensor(f"blk.1.{ours}.weight"), kept[f"model.layers.1.{theirs}.weight"]
        assert np.allclose(tensor.rows(), expected, atol=1e-6)
        which = np.array([3, 9, 4])
        assert np.allclose(tensor.rows(which), expected[which], atol=1e-6)
        assert (tensor.grid() is None) == (way == "act-order")


@pytest.mark.parametrize("way", ["gptq", "awq"])
def test_int4_rows_keep_the_source_s_own_steps(tmp_path: Path, way: str) -> None:
    kept = write(tmp_path / "f", tiny.write(tmp_path / "m.gguf", "llama"), way)  # whose rows are in another order
    pack(tmp_path / "f", tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle:
        rows = dequantise(bundle.rows("layer.2.output"), "int4")
        queries = dequantise(bundle.rows("layer.2.qkv"), "int4")[: tiny.HEADS * tiny.HEAD_DIM]
    for ours, part in ((rows, "o_proj"), (queries, "q_proj")):
        expected = kept[f"model.layers.2.self_attn.{part}.weight"]
        # only the codes of scales and centres are rounded
        assert np.linalg.norm(ours - expected) < 0.006 * np.linalg.norm(expected)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "f", tiny.write(tmp_path / "m.gguf", "qwen2"), "gptq")
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qzeros"] = tensors["model.layers.0.mlp.up_proj.qzeros"][:1].copy()
    save_file(tensors, tmp_path / "f" / "model.safetensors")
    with pytest.raises(DataError, match="do not fit together"):
        pack(tmp_path / "f", tmp_path / "m.flash", "int4")
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    save_file(tensors, tmp_path / "f" / "model.safetensors")
    with pytest.raises(DataError, match=r"no part '\.qzeros'"):
        pack(tmp_path / "f", tmp_path / "m.flash", "int4")
