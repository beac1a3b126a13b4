"""Reads the files of JSON in a Hugging Face folder."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from flashd.errors import DataError

Json = dict[str, Any]


MOST_OBJECT = 16 << 20
"""Bytes of a file of JSON beside the tokenizer; an index of 100,000 tensors takes 9 MB."""


def read_file(path: Path, most: int = MOST_OBJECT) -> bytes:
    """A file of at most so many bytes. Raises OSError, DataError."""
    # a pipe would be waited for without end
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError(f"{path}: not a file but a folder, a pipe or a device")
        data = file.read(most + 1)
    if len(data) > most:
        raise DataError(f"{path}: more than {most} bytes")
    return data


def read_object(path: Path) -> Json:
    """An object of JSON, empty if there is no such file. Raises DataError."""
    try:
        value = json.loads(read_file(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value
