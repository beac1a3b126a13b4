"""SmolLM3: each fourth layer does not turn queries and keys."""

from __future__ import annotations

from pathlib import Path

from flashd.errors import DataError
from flashd.pack.families.family import Config, Family, Folder

EVERY = 4


def adapt(config: Config, path: Path) -> Config:
    """The configuration without its list of turned layers, which must be the one that is supported."""
    turned = [int((i + 1) % EVERY != 0) for i in range(config.get("num_hidden_layers", 0))]
    if config.get("no_rope_layers", turned) != turned:
        raise DataError(f"{path}: layers without rotary embedding (no_rope_layers) other than each fourth")
    return {key: value for key, value in config.items() if key not in ("no_rope_layers", "no_rope_layer_interval")}


FAMILIES = (
    Family(
        "smollm3", "SmolLM3", "tiny",
        permuted=True, unturned_every=EVERY,
        folders=(
            Folder(
                "smollm3", permuted=True, adapt=adapt,
                defaults={
                    "use_sliding_window": False, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
                    "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
                },
            ),
        ),
    ),
)  # fmt: skip
