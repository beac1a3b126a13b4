"""BitNet in the ways it is handed round: its ternary weights move over as they are, at two bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (by which safetensors gets to know bfloat16)
import numpy as np
import pytest
from safetensors.numpy import save_file

from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows.kinds import Floats
from flashd.pack.pack import pack
from flashd.pack.sources.gguf import GgufModel
from tests.engine.test_paths import all_logits, opened
from tests.goldens.models import GOLDENS, HEADS, HIDDEN, KV_HEADS, LAYERS, NEURONS, TOKENS
from tests.tiny_folder import NAMES

GOLDEN = GOLDENS["bitnet"]
THEIRS = NAMES | {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}


def write(folder: Path, how: dict[str, str]) -> Path:
    """The golden's folder, with its layers' matrices kept as transformers would keep them."""
    GOLDEN.write(folder / "m.gguf")
    source = GgufModel(folder / "m.gguf")
    tensors: dict[str, Any] = {}
    for name in source.names:
        *layer, part, kind = name.split(".")
        theirs = ".".join([*(["model.layers", layer[1]] if layer else []), THEIRS[part], kind])
        values = source.tensor(name).rows()
        if not layer or values.ndim == 1:
            tensors[theirs] = values
        elif how["quantization_mode"] == "online":
            tensors[theirs] = master(values)
        else:
            tensors[theirs], scale = packed(values)
            tensors[f"{theirs}_scale"] = np.array(
                [1 / scale if how["linear_class"] == "bitlinear" else scale], "bfloat16"
            )
    save_file(tensors, folder / "model.safetensors")
    stated = {
        "model_type": "bitnet", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "intermediate_size": NEURONS, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "hidden_act": "relu2", "rope_theta": 500000.0, "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "bitnet", **how},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "tokenizer.json").write_bytes(source.vocabulary().tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def packed(values: Floats) -> tuple[Any, float]:
    """Four quarters of the rows in the bit pairs of one matrix, -1 as 0, and the scale."""
    scale = float(np.abs(values).max())
    quarters = (values / scale + 1).astype(np.uint8).reshape(4, -1, values.shape[1])
    return np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None, None]), scale


def master(values: Floats) -> Floats:
    """Weights whose rounding gives `values`: nonzero ones lie about the mean size, whose mean is the scale."""
    random, scale = np.random.default_rng(1), np.abs(values).max()
    zero = values == 0
    noise = random.uniform(-0.3, 0.3, values.shape) * scale
    # |w| over all of them must be `scale` on average
    missing = (zero.sum() * scale - np.abs(noise[zero]).sum()) / (~zero).sum()
    return np.asarray(np.where(zero, noise, values + np.sign(values) * missing), np.float32)


@pytest.mark.parametrize(
    "how",
    [
        {"linear_class": "autobitlinear", "quantization_mode": "offline"},
        {"linear_class": "bitlinear", "quantization_mode": "offline"},
        {"linear_class": "autobitlinear", "quantization_mode": "online"},
    ],
)
def test_each_kind_of_folder_gives_the_weights_of_the_gguf(tmp_path: Path, how: dict[str, str]) -> None:
    (tmp_path / "hf").mkdir()
    folder = write(tmp_path / "hf", how)
    pack(folder, tmp_path / "hf.flash", "int4")
    pack(folder / "m.gguf", tmp_path / "gguf.flash", "int4")
    with Bundle(tmp_path / "hf.flash") as bundle, Bundle(tmp_path / "gguf.flash") as other:
        assert bundle.header.formats == other.header.formats and bundle.header.formats.ffn == "ternary"
        for part in ("qkv", "output"):
            ours, theirs = (dequantise(b.rows(f"layer.1.{part}"), "ternary") for b in (bundle, other))
            assert np.allclose(ours, theirs, rtol=1e-5, atol=0)
    logits = []
    for name in ("hf", "gguf"):
        with opened(tmp_path / f"{name}.flash", 0.5, 64) as model:
            logits.append(all_logits(model, TOKENS[:20].tolist(), 20))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.ptp(logits[1])


def test_ternary_layers_take_two_bits_a_weight(tmp_path: Path) -> None:
    pack(GOLDEN.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle:
        group = bundle.header.group
        n = group.neurons
        weights = 2 * n * (HIDDEN // 4 + 4) + HIDDEN * (n // 4 + 4) + 4 * n  # a scale a row, a norm
        assert weights <= group.nbytes < weights + 64
        output = GOLDEN.tensors()["blk.2.attn_output.weight"]
        assert (dequantise(bundle.rows("layer.2.output"), "ternary") == output).all()
