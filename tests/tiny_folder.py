"""Makes a Hugging Face folder of a tiny GGUF model: the same weights, as transformers would have saved them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from flashd.pack.sources.gguf import GgufModel
from tests import tiny

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.primary_router", "ffn_gate_exps": "block_sparse_moe.experts.{}.gate",
    "ffn_up_exps": "block_sparse_moe.experts.{}.up", "ffn_down_exps": "block_sparse_moe.experts.{}.down",
}  # fmt: skip
"""SmallThinker's."""


def write(folder: Path, model: Path, shards: int = 1, dtype: Any = np.float32, **config: Any) -> Path:
    """The folder of the GGUF file `model`, its weights of type `dtype` in so many files."""
    source = GgufModel(model)
    folder.mkdir()
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(source.names):
        values, theirs = _halves(source, name).astype(dtype), _name(name)
        many = {theirs.format(i): v for i, v in enumerate(values)} if "{}" in theirs else {theirs: values}
        tensors |= many
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {n: np.ascontiguousarray(t) for n, t in tensors.items() if where[n] == file}
        save_file(part, folder / ("model.safetensors" if shards == 1 else file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    stated = {
        "model_type": source.architecture, "hidden_size": tiny.HIDDEN, "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": tiny.HEADS, "num_key_value_heads": tiny.KV_HEADS, "intermediate_size": tiny.NEURONS,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in source.names,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stated | config))
    vocabulary = source.vocabulary()
    (folder / "tokenizer.json").write_bytes(vocabulary.tokenizer_json)
    special = {"eos_token": "<|end|>", "chat_template": vocabulary.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def _name(name: str) -> str:
    *layer, part, kind = name.split(".")
    return ".".join([*(["model.layers", layer[1]] if layer else []), (NAMES | EXPERTS)[part], kind])


def _halves(source: GgufModel, name: str) -> np.ndarray[Any, Any]:
    """A tensor with llama's rotary pairs as two halves again."""
    values = source.tensor(name).rows()
    heads = {"attn_q": tiny.HEADS, "attn_k": tiny.KV_HEADS}.get(name.split(".")[-2])
    if source.architecture != "llama" or heads is None:
        return values
    return values.reshape(heads, tiny.HEAD_DIM // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
