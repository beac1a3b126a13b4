"""LFM2: most layers have a gated short convolution in place of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder

KINDS = {"full_attention": True, "conv": False}
"""config.json's names of the kinds of layers, and whether they attend."""


def adapt(config: Config, path: Path) -> Config:
    """The configuration with a number of heads of keys for each layer, as GGUF has it, and the FFN's own width."""
    full: dict[str, Any] = dict(config)
    layers, attending = full.get("num_hidden_layers", 0), full.pop("full_attn_idxs", None)
    kinds = full.pop("layer_types", None)
    if kinds is None:
        attends = [attending is None or i in attending for i in range(layers)]
    elif unknown := set(map(str, kinds)) - set(KINDS):
        raise DataError(f"{path}: a layer of kind {min(unknown)!r}; known are {', '.join(KINDS)}")
    else:
        attends = [KINDS[kind] for kind in kinds]
    if full.pop("conv_bias", False):
        raise DataError(f"{path}: convolutions with a bias (conv_bias) are not supported")
    full["num_key_value_heads"] = [full.get("num_key_value_heads", 8) if has else 0 for has in attends]
    full["intermediate_size"] = _neurons(full)
    full["tie_word_embeddings"] = full.pop("tie_embedding", full.get("tie_word_embeddings", True))
    return full


def _neurons(config: dict[str, Any]) -> int:
    """What transformers makes of the width of an FFN (Lfm2MLP): two thirds, times a factor, up to whole blocks."""
    width = int(config.pop("block_ff_dim", config.get("intermediate_size", 12288)))
    adjusted, factor = config.pop("block_auto_adjust_ff_dim", True), config.pop("block_ffn_dim_multiplier", 1.0)
    every = config.pop("block_multiple_of", 256)
    return -(-int(factor * int(2 * width / 3)) // every) * every if adjusted else width


FAMILIES = (
    Family(
        "lfm2", "LFM2, LFM2.5", "tiny",
        convolves=True, norms=("attention", "query", "key", "ffn", "final"), names={"final_norm": "token_embd_norm"},
        folders=(
            Folder(
                "lfm2", seeing=("lfm2_vl",), adapt=adapt,
                keys={"shortconv.l_cache": "conv_L_cache", "attention.layer_norm_rms_epsilon": "norm_eps"},
                tensors={
                    f"model.layers.{{bid}}.conv.{part}": f"blk.{{bid}}.shortconv.{part}"
                    for part in ("conv", "in_proj", "out_proj")
                },
                defaults={
                    "max_position_embeddings": 128000, "norm_eps": 1e-5, "rope_theta": 1e6, "conv_L_cache": 3,
                },
            ),
        ),
    ),
)  # fmt: skip
