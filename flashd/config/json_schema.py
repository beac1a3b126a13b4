"""The JSON schema of flashd.yaml, with which editors complete and check it: made of the typed settings.

python -m flashd.config.json_schema deploy/flashd.schema.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from flashd.config.fields import WRITTEN
from flashd.config.settings import Settings


def schema_text() -> str:
    """The schema as the file has it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "flashd.yaml",
        **_as_written(msgspec.json.schema(Settings)),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _as_written(node: Any) -> Any:
    """The schema for what people write, which is more than what is made of it."""
    if isinstance(node, list):
        return [_as_written(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: _as_written(value) for key, value in node.items()}
    if WRITTEN in made:
        made["type"] = made.pop(WRITTEN)
    if isinstance(made.get("pattern"), str):
        made["pattern"] = made["pattern"].replace("\\Z", "$")  # JavaScript's end of a text
    return made


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), "utf-8")
