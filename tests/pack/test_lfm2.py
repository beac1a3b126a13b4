"""LFM2 as it is found: what is understood of a file or a folder, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.errors import DataError
from flashd.pack.pack import pack
from tests.goldens import folders
from tests.goldens.models import GOLDENS, HIDDEN, KV_HEADS, NEURONS, TAPS, Golden

LFM2 = GOLDENS["lfm2"]


def refused(model: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        pack(model, model.with_suffix(".flash"), "f16")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("golden", "match"),
    [
        (replace(LFM2, kv_heads=[0, KV_HEADS, 0, 1]), r"head_count_kv is \[0, 2, 0, 1\], which makes no model of 4"),
        (replace(LFM2, kv_heads=[0, 0, 0, 0]), r"head_count_kv is \[0, 0, 0, 0\], which makes no model"),
        (replace(LFM2, kv_heads=[0, KV_HEADS, 0]), r"head_count_kv is \[0, 2, 0\], which makes no model of 4 layers"),
        (replace(LFM2, kv_heads=[KV_HEADS, 0, 0, 0]), "tensor 'blk.0.attn_q.weight' is missing"),
        (replace(LFM2, keys=LFM2.keys | {"shortconv.l_cache": 1}), "convolutions of 1 tokens; 2 to 64 are possible"),
        (replace(LFM2, keys=LFM2.keys | {"shortconv.l_cache": None}), "'lfm2.shortconv.l_cache' is missing"),
        (replace(LFM2, keys=LFM2.keys | {"shortconv.l_cache": 3}), r"shape \(64, 4\), not \(64, 3\)"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, golden: Golden, match: str) -> None:
    refused(golden.write(tmp_path / "m.gguf"), match)


def test_a_list_of_heads_is_for_families_that_convolve(tmp_path: Path) -> None:
    golden = replace(GOLDENS["qwen3"], kv_heads=[0, KV_HEADS, 0, 0])
    refused(golden.write(tmp_path / "m.gguf"), "differs from layer to layer, which is not supported")


def test_a_convolution_s_shape_is_checked(tmp_path: Path) -> None:
    layer = {**LFM2.others[0], "shortconv.in_proj.weight": (2 * HIDDEN, HIDDEN)}
    refused(replace(LFM2, others=dict.fromkeys((0, 2, 3), layer)).write(tmp_path / "m.gguf"), r"shape \(128, 64\)")


def folder(path: Path, remove: tuple[str, ...] = (), **config: Any) -> Path:
    model = folders.write(path / "f", "lfm2", LFM2.write(path / "m.gguf"))
    stated = json.loads((model / "config.json").read_text())
    kept = {key: value for key, value in stated.items() if key not in remove}
    (model / "config.json").write_text(json.dumps(kept | config))
    return model


def packed(model: Path) -> Header:
    return pack(model, model.with_suffix(".flash"), "f16")


@pytest.mark.parametrize(
    ("remove", "config"),
    [
        (("layer_types",), {"full_attn_idxs": [1]}),  # transformers 4
        (("intermediate_size", "tie_word_embeddings"), {"block_ff_dim": 300, "tie_embedding": True}),
        (("block_multiple_of",), {"block_auto_adjust_ff_dim": False, "intermediate_size": NEURONS}),
        (("conv_bias",), {"block_ffn_dim_multiplier": 0.5, "intermediate_size": 600}),
    ],
)
def test_a_folder_may_say_it_in_other_words(tmp_path: Path, remove: tuple[str, ...], config: dict[str, Any]) -> None:
    theirs, ours = packed(folder(tmp_path, remove, **config)), packed(tmp_path / "m.gguf")
    for name in ("neurons", "kv_heads", "layer_kinds", "attention", "recurrent", "vocabulary", "norms"):
        assert getattr(theirs.model, name) == getattr(ours.model, name), name
    assert theirs.embedding_table == ours.embedding_table == "head"


def test_the_part_that_speaks_of_a_model_that_also_sees(tmp_path: Path) -> None:
    model = folder(tmp_path)
    inner = json.loads((model / "config.json").read_text())
    seeing = {"model_type": "lfm2_vl", "text_config": inner, "vision_config": {}, "projector_hidden_size": 8}
    (model / "config.json").write_text(json.dumps(seeing))
    tensors = load_file(model / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    for name in ("model.vision_tower.embeddings.weight", "model.multi_modal_projector.linear_1.bias"):
        named[name] = np.zeros((4, 4), np.float32)
    save_file(named, model / "model.safetensors")
    assert packed(model).model.layer_kinds == [1, 0, 1, 1]
    with Bundle(model.with_suffix(".flash")) as theirs:
        packed(tmp_path / "m.gguf")
        with Bundle(tmp_path / "m.flash") as ours:
            for name in ("layer.0.in_proj", "layer.1.qkv", "layer.3.vectors", "head"):
                assert theirs.read(name) == ours.read(name)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"conv_bias": True}, r"convolutions with a bias \(conv_bias\) are not supported"),
        ({"layer_types": ["conv", "full_attention", "mamba", "conv"]}, "a layer of kind 'mamba'; known are full_att"),
        ({"conv_L_cache": 3}, r"shape \(64, 1, 4\), not \(64, 3\)"),
        ({"intermediate_size": 600}, "200 neurons, but the model needs 416"),
        ({"conv_rope": 2}, "flashd does not know what 'conv_rope' means"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    refused(folder(tmp_path, **config), match)


def test_a_layer_s_kind_and_sizes_are_in_the_header(tmp_path: Path) -> None:
    model = packed(LFM2.write(tmp_path / "m.gguf")).model
    assert model.attending == [1] and model.layer_kinds == [1, 0, 1, 1]
    assert [kind.taps for kind in model.recurrent] == [TAPS] and model.kv_heads == KV_HEADS
    assert [p.name for p in model.products(0)] == ["in_proj", "out_proj"]
    assert [p.name for p in model.products(1)] == ["qkv", "output"]
    assert "conv.3" in model.layer_vectors(0) and "query_norm.weight" not in model.layer_vectors(0)
    assert "query_norm.weight" in model.layer_vectors(1) and "conv.0" not in model.layer_vectors(1)
    assert np.prod(model.products(0)[0].parts) == 3 * HIDDEN
