"""EXAONE 4: norms behind attention and FFN. If layers see a window, those that see all turn nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashd.pack.families.family import Config, Family, Folder

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_key_value_heads": 32, "sliding_window_pattern": 4,
    "sliding_window": 4096,
}  # fmt: skip


def adapt(config: Config, path: Path) -> Config:  # noqa: ARG001
    """A pattern of letters, L for layers that see a window, as the list of all layers."""
    full: dict[str, Any] = dict(config)
    pattern = full.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and "layer_types" not in full:
        letters = [pattern[i % len(pattern)] for i in range(full.get("num_hidden_layers", 0))]
        full["layer_types"] = ["sliding_attention" if letter == "L" else "full_attention" for letter in letters]
    return full


FAMILIES = (
    Family(
        "exaone4", "EXAONE 4", "tiny",
        norms=("query", "key", "attention_branch", "ffn_branch", "final"), global_every=4, global_unturned=True,
        folders=(Folder("exaone4", adapt=adapt, defaults=DEFAULTS),),
    ),
)  # fmt: skip
