"""Falcon with rotary embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder


def adapt(config: Config, path: Path) -> Config:
    """The numbers of heads and neurons, which the earlier models leave to a flag."""
    if config.get("alibi"):
        raise DataError(f"{path}: attention biased by distance (alibi) is not supported")
    full: dict[str, Any] = {key: value for key, value in config.items() if key != "alibi"}
    full.setdefault("ffn_hidden_size", 4 * int(full.get("hidden_size", 0)))
    if not full.get("new_decoder_architecture"):
        full["num_key_value_heads"] = 1 if full.get("multi_query", True) else full.get("num_attention_heads")
    else:
        full.setdefault("num_key_value_heads", full.get("num_kv_heads"))
    return full


FOLDER = Folder(
    "falcon", fused=True, adapt=adapt,
    keys={"block_count": "n_layer", "feed_forward_length": "ffn_hidden_size", "attention.head_count": "n_head"},
    defaults={
        "max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "activation": "gelu",
        "tie_word_embeddings": True,
    },
)  # fmt: skip

TWO_NORMS = Family(
    "falcon", "Falcon", "tiny",
    block="parallel", norm="layer", gated=False, activation="gelu",
    names={"attention_norm": "attn_norm_2", "ffn_norm": "attn_norm"},
)  # fmt: skip

FAMILIES = (
    Family(
        "falcon", "Falcon", "tiny",
        block="parallel", norm="layer", norms=("attention", "final"), gated=False, activation="gelu",
        variant=("blk.0.attn_norm_2.weight", TWO_NORMS), folders=(FOLDER,),
    ),
)  # fmt: skip
