"""Qwen3.5 as it is found: what is understood of a file or a folder, what is left out, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashd.bundle.reader import Bundle
from flashd.errors import DataError
from flashd.pack.original import Original
from flashd.pack.pack import pack
from tests.goldens import folders
from tests.goldens.models import GATED, GOLDENS, HIDDEN, LAYERS, Golden, gated_attention

QWEN, MOE, NEXT = (GOLDENS[name] for name in ("qwen35", "qwen35moe", "qwen3next"))


def keys(golden: Golden = QWEN, **changed: Any) -> Golden:
    return replace(golden, keys=golden.keys | {key.replace("__", "."): value for key, value in changed.items()})


@pytest.mark.parametrize(
    ("golden", "match"),
    [
        (keys(ssm__conv_kernel=None), "'qwen35.ssm.conv_kernel' is missing"),
        (keys(ssm__conv_kernel=1), "convolutions of 1 tokens; 2 to 64 are possible"),
        (keys(ssm__conv_kernel=3), r"'blk.0.ssm_conv1d.weight' has the shape \(160, 4\), not \(160, 3\)"),
        (
            keys(ssm__time_step_rank=5),
            "2 heads of keys, 16 wide, and 5 of values, 96 wide together, which make no model",
        ),
        (keys(ssm__group_count=1), r"'blk.0.attn_qkv.weight' has the shape \(160, 64\), but .* \(128, 64\)"),
        (keys(ssm__state_size=8), r"'blk.0.attn_qkv.weight' has the shape \(160, 64\), but .* \(128, 64\)"),
        (keys(full_attention_interval=2), "'blk.1.attn_qkv.weight' has 160 rows and should have 256"),
        (keys(full_attention_interval=9), "of 4 layers each 9th attends"),
        (keys(attention__recurrent_layers=[True, True]), "which makes no model of 4 layers"),
        (keys(MOE, expert_shared_feed_forward_length=None), "expert_shared_feed_forward_length' is missing"),
        (keys(MOE, expert_shared_feed_forward_length=90), "with 90 neurons, no multiple of 32"),
        (keys(MOE, expert_shared_feed_forward_length=64), r"ffn_gate_shexp.weight' has the shape \(96, 64\), but"),
        (keys(NEXT, ssm__time_step_rank=4), "'blk.0.ssm_ba.weight' has 12 rows and should have 8"),
        (keys(nextn_predict_layers=4), "0 layers; 1 to 1024 are possible"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, golden: Golden, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        pack(golden.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "f16")
    assert "\n" not in str(caught.value)


def folder(path: Path, remove: tuple[str, ...] = (), name: str = "qwen35", **config: Any) -> Path:
    model = folders.write(path / "f", name, GOLDENS[name].write(path / "m.gguf"))
    stated = json.loads((model / "config.json").read_text())
    kept = {key: value for key, value in stated.items() if key not in remove}
    (model / "config.json").write_text(json.dumps(kept | config))
    return model


def same_sections(a: Path, b: Path) -> bool:
    with Bundle(a) as one, Bundle(b) as other:
        names = [section.name for section in one.header.sections if not section.name.endswith("vectors")]
        return all(one.read(name) == other.read(name) for name in names)


def test_what_sees_and_what_guesses_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = folder(tmp_path)
    inner = json.loads((model / "config.json").read_text()) | {"mtp_num_hidden_layers": 1, "attn_output_gate": True}
    inner["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    seeing = {"model_type": "qwen3_5", "text_config": inner, "vision_config": {}, "image_token_id": 7}
    (model / "config.json").write_text(json.dumps(seeing))
    tensors = load_file(model / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    for name in ("model.visual.blocks.0.norm1.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.fc.weight"):
        named[name] = np.zeros((4, 4), np.float32)
    save_file(named, model / "model.safetensors")
    # a GGUF file has the layers that guess behind the others
    layer = gated_attention() | GATED | {"attn_norm.weight": (HIDDEN,), "nextn.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
    guessing = replace(
        keys(nextn_predict_layers=1, block_count=LAYERS + 1),
        model=QWEN.model | {f"blk.{LAYERS}.{name}": shape for name, shape in layer.items()},
    )
    for source in (model, guessing.write(tmp_path / "g.gguf"), tmp_path / "m.gguf"):
        with caplog.at_level(logging.WARNING):
            pack(source, tmp_path / f"{source.stem}.flash", "f16")
    said = [record.getMessage().split(": ", 1) for record in caplog.records]
    assert said == [
        [str(model), "the part that sees is left out: flashd packs what speaks"],
        [str(model), "what guesses further tokens (MTP) is left out: flashd packs what speaks"],
        [str(tmp_path / "g.gguf"), "what guesses further tokens (MTP) is left out: flashd packs what speaks"],
    ]
    assert same_sections(tmp_path / "f.flash", tmp_path / "m.flash")
    assert same_sections(tmp_path / "g.flash", tmp_path / "m.flash")


def test_experts_may_be_stacks_of_gate_and_up_together(tmp_path: Path) -> None:
    """As Qwen publishes them, while transformers saves each by itself."""
    model = folders.write(tmp_path / "f", "qwen35moe", MOE.write(tmp_path / "m.gguf"))
    stacks = MOE.tensors()
    kept = {n: v for n, v in load_file(model / "model.safetensors").items() if ".experts." not in n}
    for i in range(LAYERS):
        gate, up, down = (stacks[f"blk.{i}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        at = f"model.layers.{i}.mlp.experts."
        kept |= {f"{at}gate_up_proj": np.concatenate([gate, up], axis=1), f"{at}down_proj": down}
    save_file(kept, model / "model.safetensors")
    for source in (model, tmp_path / "m.gguf"):
        pack(source, tmp_path / f"{source.stem}.flash", "f16")
    assert same_sections(tmp_path / "f.flash", tmp_path / "m.flash")


@pytest.mark.parametrize(
    ("remove", "config", "match"),
    [
        ((), {"attn_output_gate": False}, r"without a gate \(attn_output_gate\) is not supported"),
        ((), {"attention_bias": True}, r"with biases \(attention_bias\) is not supported"),
        ((), {"layer_types": ["conv"] * 4}, "a layer of kind 'conv'; known are full_attention, linear_attention"),
        ((), {"linear_num_value_heads": 5}, "makes no sense: .*5 of values"),
        ((), {"linear_num_key_heads": 3}, "'blk.0.attn_qkv.weight' has 160 rows where its heads make 192"),
        (("layer_types",), {}, "'blk.2.attn_gate.weight' is missing"),
        (("layer_types",), {"full_attention_interval": 3}, None),
        (
            (),
            {"name": "qwen3next", "mlp_only_layers": [0]},
            r"without a mixture \(mlp_only_layers, decoder_sparse_step\)",
        ),
        (
            (),
            {"name": "qwen3next", "linear_num_key_heads": 3},
            "'blk.0.attn_gate.weight' has 256 rows where its heads make 288",
        ),
    ],
)
def test_what_a_folder_may_say(tmp_path: Path, remove: tuple[str, ...], config: Any, match: str | None) -> None:
    model = folder(tmp_path, remove, **config)
    if match is None:
        assert Original.open(model, "f16").model.layer_kinds == [1, 1, 0, 1]
        return
    with pytest.raises(DataError, match=match) as caught:
        Original.open(model, "f16")
    assert "\n" not in str(caught.value)
