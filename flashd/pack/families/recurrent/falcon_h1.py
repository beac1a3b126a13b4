"""Falcon-H1: every layer has attention and a Mamba-2 mixer side by side.

A folder states numbers that what comes out of a product is multiplied by. GGUF files have them in the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flashd.bundle.rows.kinds import Floats
from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder
from flashd.pack.families.recurrent import granite_hybrid
from flashd.pack.families.recurrent.qwen35 import less_than_zero

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "num_key_value_heads": 8, "mamba_d_ssm": 1024,
    "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_norm_before_gate": True, "mamba_rms_norm": False,
    "mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5,
}  # fmt: skip
REFUSED = {
    "mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True, "mlp_bias": True,
    "projectors_bias": True,
}  # fmt: skip
MOST_ROWS = 1 << 24
KEYS = {key: name for key, name in granite_hybrid.KEYS.items() if key.startswith("ssm.")}


def adapt(config: Config, path: Path) -> Config:
    """The configuration with what each part's numbers are multiplied by, in place of what products are."""
    full: dict[str, Any] = dict(config)
    granite_hybrid.refuse(full, REFUSED, path)
    if full.pop("mamba_norm_before_gate") and full.pop("mamba_rms_norm"):
        raise DataError(f"{path}: a norm in front of a mixer's gate (mamba_norm_before_gate) is not supported")
    full["mamba_inner_size"] = full["mamba_d_ssm"] or full["mamba_expand"] * full.get("hidden_size", 0)
    named = {name: full.pop(f"{name}_multiplier", None) or 1.0 for name in MULTIPLIERS}
    (gate, down), rates = full.pop("mlp_multipliers"), full.pop("ssm_multipliers")
    groups, state, heads = (full[f"mamba_{name}"] for name in ("n_groups", "d_state", "n_heads"))
    widths = [full["mamba_inner_size"]] * 2 + [groups * state] * 2 + [heads]
    if not all(1 <= width <= MOST_ROWS for width in widths):
        raise DataError(f"{path}: mixers of {groups} groups of {state} and {heads} heads, which make no model")
    into = named["attention_in"]
    full["weighed"] = {
        "attn_q": into, "attn_k": into * named["key"], "attn_v": into, "attn_output": named["attention_out"],
        "ffn_gate": gate, "ffn_down": down, "ssm_out": named["ssm_out"], "token_embd.weight": named["embedding"],
        "ssm_in": named["ssm_in"] * np.repeat(rates, widths),
        "output.weight": named["lm_head"],
    }  # fmt: skip
    if full.get("tie_word_embeddings"):
        # the head is the table of embeddings, which has their number
        full["divisor"] = named["embedding"] / named["lm_head"]
    return full


MULTIPLIERS = ("attention_in", "attention_out", "key", "ssm_in", "ssm_out", "embedding", "lm_head")


def weighed(config: Config, part: str) -> Floats | None:
    """What the numbers of a part are multiplied by, see Folder."""
    factor = config["weighed"].get(part)
    return None if factor is None else np.asarray(factor, np.float32).reshape(-1, 1)


FAMILIES = (
    Family(
        "falcon-h1", "Falcon-H1", "tiny",
        mamba="beside", reads=(*granite_hybrid.SSM, "logit_scale"),
        folders=(
            Folder(
                "falcon_h1", adapt=adapt, weighed=weighed, keys=KEYS | {"logit_scale": "divisor"},
                changed={"ssm_a": less_than_zero}, tensors=granite_hybrid.TENSORS, defaults=DEFAULTS,
            ),
        ),
    ),
)  # fmt: skip
