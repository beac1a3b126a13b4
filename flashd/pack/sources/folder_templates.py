"""The chat template of a Hugging Face folder, wherever it is kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashd.errors import DataError
from flashd.pack.sources.json_file import read_file, read_object

log = logging.getLogger(__name__)

DEFAULT = "default"


def folder_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template; of several, the one called default. Says so if there is none of that name. Raises DataError.

    transformers 4 keeps it in tokenizer_config.json, or for models that also see in chat_template.json.
    transformers 5 keeps it in chat_template.jinja, and others in the folder additional_chat_templates.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (own := folder / "chat_template.jinja").is_file():
        files[DEFAULT] = own
    found: dict[str, str] = {name: _text(path) for name, path in files.items()}
    if DEFAULT not in found:
        found |= _named(tokenizer_config.get("chat_template"), folder / "tokenizer_config.json")
    if DEFAULT not in found:
        path = folder / "chat_template.json"
        found |= _named(read_object(path).get("chat_template"), path)
    if found and DEFAULT not in found:
        log.warning(
            "%s: none of its chat templates (%s) is called %s, so that none is taken; name the right one"
            " chat_template.jinja",
            folder, ", ".join(sorted(found)), DEFAULT,
        )  # fmt: skip
    return found.get(DEFAULT)


def _text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _named(stated: Any, path: Path) -> dict[str, str]:
    """Templates by name, out of one text, a list of names and texts, or a table of them."""
    match stated:
        case None:
            return {}
        case str():
            return {DEFAULT: stated}
        case list() if all(isinstance(part, dict) for part in stated):
            stated = {part.get("name"): part.get("template") for part in stated}
    if isinstance(stated, dict) and all(isinstance(part, str) for part in (*stated, *stated.values())):
        return stated
    raise DataError(f"{path}: its chat_template is neither a text nor a list of names and templates")
