"""Reads the files of JSON in a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashd.errors import DataError

Json = dict[str, Any]


def read_object(path: Path) -> Json:
    """An object of JSON, empty where there is no such file. Raises DataError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: no JSON object")
    return value
