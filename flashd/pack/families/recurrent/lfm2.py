"""LFM2, dense and as a mixture: most layers have a gated short convolution in place of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.bundle.architecture import Place
from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder, Mixture

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
    if full.get("model_type") != "lfm2_moe":
        full["intermediate_size"] = _neurons(full)
    full["tie_word_embeddings"] = full.pop("tie_embedding", full.get("tie_word_embeddings", True))
    return full


def _neurons(config: dict[str, Any]) -> int:
    """What transformers makes of the width of an FFN (Lfm2MLP): two thirds, times a factor, up to whole blocks."""
    width = int(config.pop("block_ff_dim", config.get("intermediate_size", 12288)))
    adjusted, factor = config.pop("block_auto_adjust_ff_dim", True), config.pop("block_ffn_dim_multiplier", 1.0)
    every = config.pop("block_multiple_of", 256)
    return -(-int(factor * int(2 * width / 3)) // every) * every if adjusted else width


NORMS: tuple[Place, ...] = ("attention", "query", "key", "ffn", "final")
NAMES = {"final_norm": "token_embd_norm"}
KEYS = {"shortconv.l_cache": "conv_L_cache", "attention.layer_norm_rms_epsilon": "norm_eps"}
TENSORS = {
    f"model.layers.{{bid}}.conv.{part}": f"blk.{{bid}}.shortconv.{part}" for part in ("conv", "in_proj", "out_proj")
}  # fmt: skip
DEFAULTS = {"max_position_embeddings": 128000, "norm_eps": 1e-5, "rope_theta": 1e6, "conv_L_cache": 3}
SIGMOID = 2
"""Of the gguf package's ExpertGatingFuncType."""


def adapt_mixture(config: Config, path: Path) -> Config:
    """The same for a mixture, whose router has no choice of scores."""
    return {**adapt(config, path), "expert_gating_func": SIGMOID}


FAMILIES = (
    Family(
        "lfm2", "LFM2, LFM2.5", "tiny",
        convolves=True, norms=NORMS, names=NAMES,
        folders=(Folder("lfm2", seeing=("lfm2_vl",), adapt=adapt, keys=KEYS, tensors=TENSORS, defaults=DEFAULTS),),
    ),
    Family(
        "lfm2moe", "LFM2-8B-A1B", "tiny",
        convolves=True, norms=NORMS, names=NAMES, mixture=Mixture(leaned=True, leading=True),
        folders=(
            Folder(
                "lfm2_moe", adapt=adapt_mixture,
                keys=KEYS | {
                    "leading_dense_block_count": "num_dense_layers", "expert_gating_func": "expert_gating_func",
                    "expert_weights_scale": "routed_scaling_factor",
                },
                tensors=TENSORS | {
                    "model.layers.{bid}.feed_forward.expert_bias": "blk.{bid}.exp_probs_b.bias",
                    "model.layers.{bid}.feed_forward.experts.w1": "blk.{bid}.ffn_gate_exps",
                    "model.layers.{bid}.feed_forward.experts.w2": "blk.{bid}.ffn_down_exps",
                    "model.layers.{bid}.feed_forward.experts.w3": "blk.{bid}.ffn_up_exps",
                },
                defaults=DEFAULTS | {
                    "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True,
                    "intermediate_size": 7168, "moe_intermediate_size": 1792,
                },
            ),
        ),
    ),
)  # fmt: skip
