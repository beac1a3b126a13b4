"""A Hugging Face folder packs to the very bytes that the GGUF file of its weights packs to."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashd.bundle.reader import Bundle
from flashd.errors import DataError, InputMissing
from flashd.pack.pack import pack
from flashd.pack.sources.folder_config import FolderModel, folder_model, model_keys
from flashd.pack.sources.folder_rope import rope_divisors
from flashd.pack.sources.folder_tensors import Names, row_order
from flashd.pack.sources.safetensors import HfFolder
from tests import tiny, tiny_folder
from tests.goldens.models import EXPERTS, GOLDENS, LAYERS, USED, WINDOW


def sections(path: Path) -> dict[str, bytes]:
    with Bundle(path) as bundle:
        return {s.name: bundle.read(s.name) for s in bundle.header.sections}


@pytest.mark.parametrize(
    ("family", "tied", "shards"), [("llama", False, 1), ("llama", True, 3), ("qwen2", False, 2), ("qwen2", True, 1)]
)
def test_a_folder_packs_to_what_its_gguf_packs_to(tmp_path: Path, family: str, tied: bool, shards: int) -> None:
    model = tiny.write(tmp_path / "m.gguf", family, tied=tied)
    folder = tiny_folder.write(tmp_path / "folder", model, shards)
    theirs = pack(folder, tmp_path / "folder.flash", "int8")
    ours = pack(model, tmp_path / "gguf.flash", "int8")
    assert sections(tmp_path / "folder.flash") == sections(tmp_path / "gguf.flash")
    assert theirs.text == ours.text
    assert theirs.model.name == "folder" and theirs.formats == ours.formats
    assert theirs.source.nbytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_read_as_they_are(tmp_path: Path, dtype: Any) -> None:
    folder = HfFolder(tiny_folder.write(tmp_path / "f", tiny.write(tmp_path / "m.gguf"), dtype=dtype))
    whole = HfFolder(tiny_folder.write(tmp_path / "g", tmp_path / "m.gguf"))
    for name in sorted(folder.names):
        tensor, expected = folder.tensor(name), whole.tensor(name).rows()
        assert tensor.bits == 16 and (tensor.rows() == expected.astype(dtype).astype(np.float32)).all()
        which = np.array([5, 6, 7, 2, 31])
        if len(tensor.shape) == 2:
            assert (tensor.rows(which) == tensor.rows()[which]).all()
            assert (tensor.rows(slice(3, 9)) == tensor.rows()[3:9]).all()


def test_experts_are_one_stack(tmp_path: Path) -> None:
    folder = tiny_folder.write(
        tmp_path / "f", tiny.write(tmp_path / "m.gguf"), model_type="qwen3_moe", num_experts=11, head_dim=16
    )
    weights = load_file(folder / "model.safetensors")
    experts = np.random.default_rng(0).standard_normal((11, 24, 64)).astype(np.float32)
    weights |= {f"model.layers.1.mlp.experts.{i}.up_proj.weight": e for i, e in enumerate(experts)}
    save_file(weights, folder / "model.safetensors")
    stack = HfFolder(folder).tensor("blk.1.ffn_up_exps.weight")
    assert stack.shape == (11, 24, 64)
    assert (stack.rows(np.array([10, 2])) == experts[[10, 2]]).all()
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"ffn_up_exps.weight' is not there for every expert alike"):
        HfFolder(folder).tensor("blk.1.ffn_up_exps.weight")


SMALLTHINKER: dict[str, Any] = {
    "moe_num_primary_experts": EXPERTS, "moe_num_active_primary_experts": USED, "moe_ffn_hidden_size": 40,
    "rope_layout": [0, 1, 1, 1], "sliding_window_layout": [0, 1, 1, 1], "sliding_window_size": WINDOW,
    "moe_primary_router_apply_softmax": False, "intermediate_size": None, "hidden_act": None,
    "num_hidden_layers": LAYERS, "max_position_embeddings": 128,
}  # fmt: skip


def test_a_folder_of_experts_packs_to_what_its_gguf_packs_to(tmp_path: Path) -> None:
    """SmallThinker's, which transformers does not have; test_folders has the others."""
    model = GOLDENS["smallthinker"].write(tmp_path / "m.gguf")
    folder = tiny_folder.write(tmp_path / "folder", model, 2, model_type="smallthinker", **SMALLTHINKER)
    theirs = pack(folder, tmp_path / "folder.flash", "int8")
    ours = pack(model, tmp_path / "gguf.flash", "int8")
    assert sections(tmp_path / "folder.flash") == sections(tmp_path / "gguf.flash")
    assert theirs.model.experts == ours.model.experts and theirs.model.attention == ours.model.attention


def test_routers_weigh_as_their_folders_say() -> None:
    norm, scores = "expert_weights_norm", "expert_gating_func"
    assert parameters(model_type="qwen3_moe", norm_topk_prob=True)[norm] is True
    assert parameters(model_type="qwen3_moe")[norm] is parameters(model_type="olmoe")[norm] is False
    assert norm not in parameters(model_type="mixtral")
    assert parameters(model_type="smallthinker", moe_primary_router_apply_softmax=True)[scores] == 1
    assert parameters(model_type="smallthinker", moe_primary_router_apply_softmax=False)[scores] == 2
    assert "attention.sliding_window" not in parameters(model_type="smallthinker", sliding_window_layout=[0] * 4)
    for local, turned in (([0, 1, 1, 1], [1, 0, 1, 1]), ([0, 1, 1, 1], [1] * 4), ([0] * 4, [0] * 4)):
        with pytest.raises(DataError, match="rope_layout"):
            parameters(
                model_type="smallthinker", sliding_window_layout=local, sliding_window_size=9, rope_layout=turned
            )
    with pytest.raises(DataError, match="moe_enable_early_router"):
        parameters(model_type="smallthinker", moe_enable_early_router=False)


def test_queries_keys_and_values_of_groups_of_heads_are_taken_apart() -> None:
    heads = {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
    falcon = model_of(model_type="falcon", **heads, hidden_size=32)
    order = row_order(falcon, "blk.0.attn_qkv.weight", 64)
    with pytest.raises(DataError, match="has 63 rows where its heads make 64"):
        row_order(falcon, "blk.0.attn_qkv.weight", 63)
    assert order is not None
    assert (order.reshape(-1, 8)[:, 0] // 8).tolist() == [0, 1, 4, 5, 2, 6, 3, 7]


def test_norms_get_what_their_models_add(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "m.gguf")
    gemma = HfFolder(tiny_folder.write(tmp_path / "f", model, model_type="gemma"))
    llama = HfFolder(tiny_folder.write(tmp_path / "g", model))
    for name in ("blk.0.attn_norm.weight", "output_norm.weight"):
        assert (gemma.tensor(name).rows() == llama.tensor(name).rows() + 1).all()


def model_of(**config: Any) -> FolderModel:
    return folder_model({"hidden_size": 64, "num_hidden_layers": 4, **config}, Path("folder"))


def parameters(**config: Any) -> dict[str, Any]:
    return model_keys(model_of(**config))


def test_windows_are_those_of_the_layers_that_have_one() -> None:
    window, pattern = "attention.sliding_window", "attention.sliding_window_pattern"
    assert parameters(model_type="mistral", sliding_window=9)[window] == 9
    assert window not in parameters(model_type="mistral", sliding_window=None)
    qwen = {"model_type": "qwen2", "sliding_window": 9, "max_window_layers": 3}
    assert window not in parameters(**qwen)
    assert parameters(**qwen, use_sliding_window=True)[pattern] == [False, False, False, True]
    kinds = ["sliding_attention", "full_attention"] * 2
    assert parameters(model_type="gemma2", sliding_window=9, layer_types=kinds)[pattern] == [True, False, True, False]
    assert window not in parameters(model_type="qwen3", sliding_window=9, layer_types=["full_attention"] * 4)


def test_the_part_that_speaks_of_a_model_that_also_sees() -> None:
    inner = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 2, "sliding_window": 1024}
    config = {"model_type": "gemma3", "vision_config": {}, "text_config": inner}
    names = Names(model_of(**config))
    for before in ("language_model.model.", "model.language_model."):  # of earlier and of later releases
        assert names.find(f"{before}layers.1.pre_feedforward_layernorm.weight") == ("blk.1.ffn_norm.weight", None)
    assert names.find("vision_tower.x.weight") is None and names.find("language_model.lm_head.weight") is None
    assert parameters(**config)["attention.head_count"] == 8


def test_llama_3_s_divisors_are_those_of_transformers() -> None:
    # its LlamaRotaryEmbedding of release 5.23: frequencies without these parameters over those with them
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    divisors = rope_divisors({"rope_parameters": rope}, 16)["rope_freqs.weight"]
    assert divisors is not None
    assert np.allclose(divisors, [1, 1.293976, 7.667385, 8, 8, 8, 8, 8], rtol=1e-5)
    assert rope_divisors({"rope_theta": 10000.0}, 16) == {}


# --- folders that cannot be packed ------------------------------------------------------------------------


def refused(folder: Path, match: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error, match=match) as caught:
        pack(folder, folder.with_name("out.flash"), "int4")
    assert "\n" not in str(caught.value)
    assert not [p for p in os.listdir(folder.parent) if "out.flash" in p]  # noqa: PTH208


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder.write(tmp_path / "f", tiny.write(tmp_path / "m.gguf"), shards=2)


def change(folder: Path, **config: Any) -> None:
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    refused(tmp_path, r"no config\.json in it", InputMissing)


def test_an_unknown_type_is_named_with_those_that_are_known(folder: Path) -> None:
    change(folder, model_type="mamba")
    refused(folder, r"architecture 'mamba' is not supported; known are .*llama.*qwen2")


def test_quantised_weights_are_refused_by_name(folder: Path) -> None:
    change(folder, quantization_config={"quant_method": "fp8"})
    refused(folder, "weights quantised by 'fp8' are not read")
    change(folder, quantization_config={"quant_method": "gptq", "bits": 8})
    refused(folder, "weights of gptq with 8 bits are not read")
    change(folder, quantization_config={"quant_method": "awq", "bits": 4, "version": "gemv"})
    refused(folder, "version 'gemv'")


def test_a_shard_is_missing(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, r"model-00002-of-00002.safetensors: no such file", InputMissing)


@pytest.mark.parametrize("name", ["../model-00002-of-00002.safetensors", "/etc/passwd", "", "..", "a/b.safetensors"])
def test_an_index_names_what_is_not_beside_it(folder: Path, name: str) -> None:
    where = {"a": "model-00001-of-00002.safetensors", "b": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refused(folder, rf"index\.json: '{re.escape(name)}' is not the name of a file beside it")


def test_a_tensor_is_in_two_shards(folder: Path) -> None:
    shards = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weights = load_file(shards[0])
    save_file(load_file(shards[1]) | {name: weights[name] for name in sorted(weights)[:1]}, shards[1])
    refused(folder, r"model-00002-of-00002\.safetensors: another file has tensor '.*' too")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "model.safetensors.index.json",
    ],
)  # fmt: skip
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, rf"{re.escape(name)}: .*a pipe or a device")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_shard_is_cut_short(folder: Path, share: float) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[: int(share * shard.stat().st_size)])
    refused(folder, "not a whole safetensors file")


def test_a_tensor_is_missing_or_of_another_type(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    weights = load_file(shard)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({**weights, name: weights[name].astype(np.int8)}, shard)
    refused(folder, r"'blk.0.attn_k.weight' is of type I8, which is not read")
    save_file({n: w for n, w in weights.items() if n != name}, shard)
    refused(folder, r"'blk.0.attn_k.weight' is missing")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"model_type": "llama", "num_hidden_layers": "x"}', b"\xff"])
def test_a_config_that_makes_no_sense(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, "not JSON|not a JSON object|makes no sense")


@pytest.mark.parametrize("layers", [0, -1, 200_000_000])
def test_layers_that_no_bundle_has(folder: Path, layers: int) -> None:
    """Named before anything is made for each of them."""
    change(folder, num_hidden_layers=layers)
    refused(folder, rf"config\.json: {layers} layers; 1 to 1024 are possible")


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, r"tokenizer.json: no such file; make it with transformers", InputMissing)
