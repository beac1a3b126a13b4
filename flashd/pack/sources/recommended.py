"""How a model's makers recommend that its answers are drawn, as its files say it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flashd.bundle.header import Drawing
from flashd.errors import DataError
from flashd.pack.sources.json_file import read_object

log = logging.getLogger(__name__)

FOLDERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""What generation_config.json calls each part of a Drawing."""

GGUF = "general.sampling."
GGUFS = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "penalty_repeat": "repeat_penalty",
}  # fmt: skip
"""What GGUF calls them, behind general.sampling."""

PASSED_OVER = ("sequence", "penalty_last_n")
"""Keys of GGUF that flashd has a fixed answer to: the order of the filters, and how far back the penalty looks."""

INERT = (None, 0, 1)
"""Values with which no way of drawing does anything."""


def of_folder(folder: Path) -> Drawing | None:
    """What generation_config.json recommends. Raises DataError for a value that makes no sense."""
    path = folder / "generation_config.json"
    stated = read_object(path)
    found = {ours: stated.get(theirs) for theirs, ours in FOLDERS.items()}
    if stated.get("do_sample") is False:
        # transformers then takes the likeliest token, and passes over all but the penalty
        found = {"repeat_penalty": found["repeat_penalty"]}
    elif stated.get("do_sample") and found["temperature"] is None:
        found["temperature"] = 1.0  # transformers' default
    return _drawing(found, path)


def of_gguf(keys: Iterable[str], metadata: Callable[[str], Any], path: Path) -> Drawing | None:
    """What a GGUF file recommends. Raises DataError for a value that makes no sense."""
    found: dict[str, Any] = {}
    for key in sorted(k for k in keys if k.startswith(GGUF)):
        name, value = key.removeprefix(GGUF), metadata(key)
        if name in GGUFS:
            found[GGUFS[name]] = value
        elif name not in PASSED_OVER and value not in INERT:
            log.warning("%s: its makers recommend %s %s, which flashd does not do", path, name, value)
    return _drawing(found, path)


def _drawing(found: Mapping[str, Any], path: Path) -> Drawing | None:
    """What was found, or None if that is nothing."""
    off = {"top_k": 0} if found.get("top_k") == -1 else {}  # as llama.cpp and vLLM write it
    try:
        drawing = msgspec.convert({**found, **off}, Drawing)
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: how it says that answers are drawn makes no sense: {error}") from error
    return drawing if drawing != Drawing() else None
