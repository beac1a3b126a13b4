"""What people call a model."""

from __future__ import annotations

import re

from flashd.pack.open_model import OpenModel

PART = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")
WEIGHTS = re.compile(r"[-._](?:I?Q[0-9]|TQ[0-9]|MXFP4|BF16|FP?16|FP?32)(?:[-_][A-Z0-9]+)*$", re.IGNORECASE)
"""How a file's name says which type its weights have, such as -Q4_K_M."""


def name_of(model: OpenModel) -> str:
    """What people call a model: its file's name if that tells the base model and the size, else general.name.

    Tools make general.name of the folder that the model was trained in, such as "Smollm2 135M 8k Lc100K Mix1 Ep2".
    """
    stem = PART.sub("", model.path.stem)
    told = [model.metadata(f"general.{key}") for key in ("basename", "size_label")]
    if all(isinstance(part, str) and _plain(part) and _plain(part) in _plain(stem) for part in told):
        return WEIGHTS.sub("", stem)
    return model.text("general.name") if model.has("general.name") else stem


def _plain(text: str) -> str:
    """Small letters and digits alone: people write hyphens, spaces and capitals as they like."""
    return "".join(c for c in text.lower() if c.isalnum())
