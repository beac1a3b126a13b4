"""Variants of one tiny model, `data/base.gguf`: its keys, tensors and parts changed, or as a Hugging Face folder.

Its weights are random. `data/make_perplexities.py` measures what other programs make of the variants.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from flashd.pack.sources.gguf import GgufModel
from tests import tiny
from tests.goldens.folders import halves
from tests.tiny_folder import NAMES

DATA = Path(__file__).parent / "data"
BASE, TEXT = DATA / "base.gguf", DATA / "perplexity.txt"

Floats = npt.NDArray[np.float32]
Keys = Mapping[str, Any]
Arrays = dict[str, npt.NDArray[Any]]

YARN = {
    "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 128,
}  # fmt: skip
GGUF: dict[str, Keys] = {
    "base": {},
    "scale_linear": {"llama.rope.scale_linear": 4.0},
    "factor_without_a_type": {"llama.rope.scaling.factor": 4.0},
    "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    "none": {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
    "yarn": YARN,
    "yarn_attn_factor_1": {**YARN, "llama.rope.scaling.attn_factor": 1.0},
    "yarn_attn_factor": {**YARN, "llama.rope.scaling.attn_factor": 1.25},
    "yarn_betas": {**YARN, "llama.rope.scaling.yarn_beta_fast": 4.0, "llama.rope.scaling.yarn_beta_slow": 0.25},
    "kv_array": {"llama.attention.head_count_kv": [2, 2]},
    "heads_array": {"llama.attention.head_count": [4, 4], "llama.feed_forward_length": [128, 128]},
    "no_pre": {"tokenizer.ggml.pre": None},
}
"""Files: keys that are added, changed, or left out if None."""

ROPE = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FOLDERS: dict[str, Keys] = {
    "plain": {},
    "yarn_mscale": {"rope_parameters": {**ROPE, "mscale": 0.8, "mscale_all_dim": 0.5}},
    "yarn_attention_factor": {"rope_parameters": {**ROPE, "attention_factor": 1.25}},
    "yarn_betas": {"rope_parameters": {**ROPE, "beta_fast": 4, "beta_slow": 0.25}},
    "yarn_truncate": {"rope_parameters": {**ROPE, "truncate": False}},
    "linear": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "llama3_of_transformers_4": {
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}, "rope_theta": 10000.0,
        "rope_parameters": None,
    },
    "no_eps": {"rms_norm_eps": None, "max_position_embeddings": None},
}  # fmt: skip
"""Folders: what config.json says beside `CONFIG`, or leaves out if None."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
    "vocab_size": 262, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "eos_token_id": 261, "bos_token_id": None,
}  # fmt: skip


@cache
def _base() -> tuple[list[tuple[str, Any, Any, Any]], Arrays]:
    """The base's keys with their values and types, and its tensors. To read it takes longer than to write it."""
    reader = gguf.GGUFReader(BASE)
    keys = [
        (field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.") and field.name != "general.architecture"
    ]
    return keys, {t.name: np.array(t.data) for t in reader.tensors}


def arrays(change: Callable[[Arrays], None] = lambda tensors: None) -> Arrays:
    """Copies of the model's tensors, changed in place."""
    tensors = {name: values.copy() for name, values in _base()[1].items()}
    change(tensors)
    return tensors


def write(
    path: Path, changes: Keys, tensors: Arrays | None = None, order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    parts: int = 0,
) -> Path:  # fmt: skip
    """A file like the base with some keys changed, its tensors in so many parts; the first part's path."""
    tensors = arrays() if tensors is None else tensors
    w = gguf.GGUFWriter(
        path, "llama", endianess=order, split_max_tensors=-(-len(tensors) // parts) if parts else 0
    )  # fmt: skip
    for name, *value in _base()[0]:
        if name not in changes:
            w.add_key_value(name, *value)
    for key, value in changes.items():
        tiny.add_key(w, key, value)
    for name, values in tensors.items():
        w.add_tensor(name, values if order == gguf.GGUFEndian.LITTLE else values.byteswap())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf") if parts else path


def retyped(source: Path, path: Path, kind: Callable[[str, tuple[int, ...]], Kind | None]) -> Path:
    """A GGUF file like another, its tensors, which are not rounded, in other types.

    `kind` gives the type by name and shape; None: as it is.
    """
    reader = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            w.add_key_value(
                field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        as_kind = kind(tensor.name, tuple(tensor.data.shape))
        data = tensor.data if as_kind is None else gguf.quantize(tensor.data.astype(np.float32), as_kind)
        w.add_tensor(tensor.name, data, raw_dtype=as_kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def mixed(name: str, shape: tuple[int, ...]) -> Kind | None:
    """As in llama.cpp's files of mixed types: some layers' values and downs have more bits than the others."""
    if len(shape) == 1:
        return None
    finer = {
        "token_embd": Kind.Q8_0, "blk.0.attn_v": Kind.Q8_0, "blk.0.ffn_down": Kind.Q5_1, "blk.1.ffn_up": Kind.Q5_0,
        "blk.1.attn_output": Kind.Q5_0, "blk.1.attn_q": Kind.Q4_1,
    }  # fmt: skip
    return finer.get(name.removesuffix(".weight"), Kind.Q4_0)


def write_folder(path: Path, changes: Keys) -> Path:
    """The model as a folder, its config.json changed."""
    tensors = arrays()
    ours = {_theirs(name): name for name in tensors}
    find = halves(lambda name, tensors: tensors[ours[name]])
    path.mkdir()
    save_file({n: np.ascontiguousarray(find(n, tensors), np.float32) for n in ours}, path / "model.safetensors")
    config = {key: value for key, value in (CONFIG | dict(changes)).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_bytes(GgufModel(BASE).vocabulary().tokenizer_json)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


def _theirs(name: str) -> str:
    *layer, part, kind = name.split(".")
    return ".".join([*(["model.layers", layer[1]] if layer else []), NAMES[part], kind])
