"""Granite, Falcon-H1 and Nemotron-H as they are found: what is understood of a file or a folder, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashd.bundle.layer_kinds import Mamba2
from flashd.bundle.reader import Bundle
from flashd.errors import DataError
from flashd.pack.lossy.narrow_search import check
from flashd.pack.original import Original
from flashd.pack.pack import pack
from tests.engine.test_paths import opened
from tests.goldens import folders
from tests.goldens.models import GATED, GOLDENS, KV_HEADS, LAYERS, Golden

HYBRID, MIXTURE, FALCON = (GOLDENS[name] for name in ("granitehybrid-dense", "granitehybrid", "falcon-h1"))
NEMOTRON = GOLDENS["nemotron_h"]


def keys(golden: Golden = HYBRID, **changed: Any) -> Golden:
    return replace(golden, keys=golden.keys | {key.replace("__", "."): value for key, value in changed.items()})


@pytest.mark.parametrize(
    ("golden", "match"),
    [
        (keys(ssm__conv_kernel=None), "'granitehybrid.ssm.conv_kernel' is missing"),
        (keys(ssm__conv_kernel=3), r"'blk.0.ssm_conv1d.weight' has the shape \(224, 4\), not \(224, 3\)"),
        (
            keys(ssm__time_step_rank=6),
            "2 groups, whose states are 24 wide, and 6 heads, 128 wide together, which make",
        ),
        (keys(ssm__group_count=3), "3 groups, whose states are 24 wide, and 8 heads, 128 wide together"),
        (keys(ssm__state_size=16), "'blk.0.ssm_in.weight' has 360 rows and should have 328"),
        (keys(ssm__time_step_rank=4), "'blk.0.ssm_in.weight' has 360 rows and should have 356"),
        (replace(HYBRID, kv_heads=[0, 0, 0, 0]), "which makes no model of 4 layers"),
        (replace(HYBRID, kv_heads=[0, KV_HEADS, KV_HEADS, 0]), "'blk.2.attn_q.weight' is missing"),
        (
            keys(MIXTURE, expert_shared_feed_forward_length=64),
            r"ffn_gate_shexp.weight' has the shape \(96, 64\)",
        ),
        (keys(FALCON, ssm__state_size=16), "'blk.0.ssm_in.weight' has 294 rows and should have 262"),
        (keys(NEMOTRON, feed_forward_length=[200] + [0] * 5), "layer 0 is an FFN that no layer is in front of"),
        (keys(NEMOTRON, feed_forward_length=[0, 200, 200, 0, 0, 0]), "layer 2 is an FFN that no layer is in front"),
        (keys(NEMOTRON, feed_forward_length=[0, 0, 0, 200, 0, 0]), "layer 3 is an FFN that no layer is in front of"),
        (
            keys(NEMOTRON, feed_forward_length=[0, 200]),
            r"feed_forward_length is \[0, 200\], which makes no model of 6",
        ),
        (keys(NEMOTRON, feed_forward_length=[0] * 6), "which makes no model of 6 layers"),
        (replace(HYBRID, layer=HYBRID.layer | {"ssm_in.bias": (360,)}), "tensor 'blk.0.ssm_in.bias' has no place"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, golden: Golden, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        weights = Original.open(golden.write(tmp_path / "m.gguf"), "f16").weights
        weights.layer_vectors(0)
    assert "\n" not in str(caught.value)


def test_a_file_says_whether_queries_and_keys_are_turned(tmp_path: Path) -> None:
    """Bamba's files say so, Granite 4's that they are not."""
    for stated, ropes in ((False, 0), (True, 1), (None, 1)):
        golden = keys(rope__scaling__finetuned=stated)
        model = Original.open(golden.write(tmp_path / f"{stated}.gguf"), "f16").model
        assert model.ropes == ropes
        assert model.recurrent == [Mamba2(taps=4, groups=2, heads=8, state=24, head_dim=16)]
        assert model.layer_kinds == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"layer_types": ["mamba", "attention", "mamba", "mamba"], "time_step_limit": None}, None),
        ({"layer_types": ["conv"] * 4}, "a layer of kind 'conv'; known are attention, full_attention, mamba"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias true is not supported"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias false is not supported"),
        ({"time_step_limit": [0.001, 0.1]}, r"bounds of time steps \(time_step_limit\) are not supported"),
        ({"position_embedding_type": "alibi"}, r"positions of kind 'alibi' \(position_embedding_type\)"),
        ({"mamba_n_heads": 6}, "and 6 heads, 128 wide together, which make no model"),
        ({"shared_intermediate_size": 1 << 50}, "an FFN of 1125899906842624 neurons makes no model"),
        ({"shared_intermediate_size": 192}, "'blk.0.ffn_gate.weight' has 400 rows where its heads make 384"),
    ],
)
def test_what_a_folder_may_say(tmp_path: Path, config: Any, match: str | None) -> None:
    folder = folders.write(tmp_path / "f", "granitehybrid-dense", HYBRID.write(tmp_path / "m.gguf"))
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    if match is None:
        assert Original.open(folder, "f16").model.layer_kinds == [1, 0, 1, 1]
        return
    with pytest.raises(DataError, match=match) as caught:
        Original.open(folder, "f16")
    assert "\n" not in str(caught.value)


def falcon(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    folder = folders.write(path / "f", "falcon-h1", FALCON.write(path / "m.gguf"))
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    return folder


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"mamba_rms_norm": True}, r"a norm in front of a mixer's gate \(mamba_norm_before_gate\)"),
        ({"mamba_rms_norm": True, "mamba_norm_before_gate": False}, None),
        ({"projectors_bias": True}, "projectors_bias true is not supported"),
        ({"mamba_d_ssm": 128}, "and 6 heads, 128 wide together, which make no model"),
        ({"mamba_n_groups": 3}, "'blk.0.ssm_in.weight' has 294 rows and should have 342"),
        ({"mamba_n_groups": 1 << 40}, "mixers of 1099511627776 groups of 24"),
        ({"ssm_multipliers": [1.0, 2.0]}, "makes no sense"),
        ({"value_multiplier": 2.0}, "flashd does not know what 'value_multiplier' means"),
    ],
)
def test_what_a_folder_of_falcon_may_say(tmp_path: Path, config: Any, match: str | None) -> None:
    folder = falcon(tmp_path, **config)
    if match is None:
        Original.open(folder, "f16")
        return
    with pytest.raises(DataError, match=match) as caught:
        Original.open(folder, "f16")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hybrid_override_pattern": "M-M*-M", "layers_block_type": None, "layer_types": None}, None),
        ({"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba"]}, None),
        ({"layers_block_type": ["mamba", "moe"]}, "a layer of kind 'moe'; known are M, linear_attention"),
        ({"use_bias": True}, "use_bias true is not supported"),
        ({"time_step_limit": [0.001, 0.1]}, "bounds of time steps"),
        ({"mlp_hidden_act": "mish"}, "activation 'mish'"),
    ],
)
def test_what_a_folder_of_nemotron_may_say(tmp_path: Path, config: Any, match: str | None) -> None:
    folder = folders.write(tmp_path / "f", "nemotron_h", NEMOTRON.write(tmp_path / "m.gguf"))
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    if match is None:
        model = Original.open(folder, "f16").model
        assert (model.layer_kinds, model.layer_groups) == ([1, 1, 0, 1], (7, 0, 7, 0))
        return
    with pytest.raises(DataError, match=match) as caught:
        Original.open(folder, "f16")
    assert "\n" not in str(caught.value)


def test_layers_without_an_ffn_do_not_hinder_drafts(tmp_path: Path) -> None:
    pack(NEMOTRON.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    for pinned in (0.5, 0.0):
        with opened(tmp_path / "m.flash", pinned, 64) as model:
            assert model.drafts == (pinned > 0)
    with pytest.raises(DataError, match="some layers have no FFN whose groups could have fewer bits"):
        check(Original.open(tmp_path / "m.gguf", "int4"))


def test_a_head_that_is_the_table_of_embeddings_has_a_number_of_its_own(tmp_path: Path) -> None:
    found = [
        Original.open(falcon(tmp_path / str(tied), tie_word_embeddings=tied), "f16").weights for tied in (False, True)
    ]
    apart, tied = (weights.model_vectors()["final_norm.weight"] for weights in found)
    assert [weights.tied for weights in found] == [False, True]
    # the table is multiplied by 8, and logits should be by 1 / 16
    assert np.array_equal(tied, apart / 128)


def test_a_folder_whose_layers_all_attend_is_a_plain_granite(tmp_path: Path) -> None:
    """Granite 4 Micro's: its type is the hybrids', and the FFN is called a shared expert."""
    layer = HYBRID.others[1] | GATED
    plain = replace(GOLDENS["granite"], layer=layer)
    model = plain.write(tmp_path / "m.gguf")
    folder = folders.write(tmp_path / "f", "granitehybrid-dense", HYBRID.write(tmp_path / "h.gguf"))
    stated = json.loads((folder / "config.json").read_text())
    attending = {"layer_types": ["attention"] * LAYERS, "position_embedding_type": "rope"}
    (folder / "config.json").write_text(json.dumps(stated | attending))
    find, tensors = folders.found("granitehybrid-dense", HYBRID), plain.tensors()
    names = [n for n in load_file(folder / "model.safetensors") if ".mamba." not in n and ".layers.1." not in n]
    names += [n.replace(".0.", f".{i}.") for i in range(LAYERS) for n in ATTENDING]
    save_file({n: np.ascontiguousarray(find(n, tensors)) for n in sorted(set(names))}, folder / "model.safetensors")
    for source in (model, folder):
        pack(source, tmp_path / f"{source.stem}.flash", "f16")
    with Bundle(tmp_path / "m.flash") as ours, Bundle(tmp_path / "f.flash") as theirs:
        assert theirs.header.model.recurrent == [] and theirs.header.model.ropes == 1
        assert all(ours.read(part.name) == theirs.read(part.name) for part in ours.header.sections)


ATTENDING = [
    f"model.layers.0.{part}.weight"
    for part in (
        *(f"self_attn.{each}_proj" for each in "qkvo"), "shared_mlp.input_linear", "shared_mlp.output_linear",
        "input_layernorm", "post_attention_layernorm",
    )
]  # fmt: skip
"""The tensors of a layer that attends, as a folder has them."""
