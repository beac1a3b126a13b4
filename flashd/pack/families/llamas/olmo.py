"""OLMo 2 and 3: norms behind attention and FFN. OLMo 3's windows are not stretched when its other layers are."""

from __future__ import annotations

from flashd.pack.families.family import Family, Folder

OLMO_2 = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
OLMO_3 = {**OLMO_2, "rope_theta": 500000.0, "sliding_window": 4096, "sliding_window_pattern": 4}

FAMILIES = (
    Family(
        "olmo2", "OLMo 2, OLMo 3", "tiny",
        norms=("query", "key", "attention_branch", "ffn_branch", "final"), global_every=4, local_unscaled=True,
        folders=(Folder("olmo2", defaults=OLMO_2), Folder("olmo3", defaults=OLMO_3)),
    ),
)  # fmt: skip
