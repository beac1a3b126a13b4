"""Ministral 3, and Mistral Small 3 as newer files name it: YaRN, and queries that grow with the length of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.pack.families.family import Config, Family, Folder

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


def adapt(config: Config, path: Path) -> Config:  # noqa: ARG001
    """The temperature of queries, which is among the rotary parameters, beside them."""
    full: dict[str, Any] = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := full.get(key), dict):
            full["llama_4_scaling_beta"] = rope.get("llama_4_scaling_beta", full.get("llama_4_scaling_beta"))
            left_out = ("llama_4_scaling_beta", "max_position_embeddings")
            full[key] = {name: value for name, value in rope.items() if name not in left_out}
    return full


FAMILIES = (
    Family(
        "mistral3", "Ministral 3", "tiny",
        permuted=True, may_have=("output",),
        reads=("rope.scaling.yarn_log_multiplier", "attention.temperature_scale"),
        folders=(
            Folder(
                "ministral3", seeing=("mistral3",), permuted=True, adapt=adapt, defaults=DEFAULTS,
                keys={"attention.temperature_scale": "llama_4_scaling_beta"},
            ),
        ),
    ),
)  # fmt: skip
