"""Figures that are measured once and then remembered: a JSON file for each kind of them in the cache folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from flashd.errors import NOT_JSON, CannotWrite
from flashd.system.new_file import NewFile
from flashd.system.paths import cache_folder, make_folder
from flashd.system.plain_file import read_plain

log = logging.getLogger(__name__)

LONGEST = 1 << 20
"""Bytes of such a file."""

T = TypeVar("T")


@dataclass(frozen=True)
class Remembered(Generic[T]):
    """Figures by what they are of."""

    name: str  # of the file
    kind: type[T]
    again: str  # the command that measures them again

    def get(self, key: str) -> T | None:
        """The figures of `key`. None if they were not measured, or the file cannot be read."""
        return self._all().get(key)

    def put(self, key: str, figures: T) -> None:
        """Keeps the figures of `key`. Raises CannotWrite."""
        data = msgspec.json.encode(self._all() | {key: figures})
        try:
            make_folder(cache_folder())
        except OSError as error:
            raise CannotWrite(f"{cache_folder()}: {error.strerror}") from error
        with NewFile(self._file) as new:
            new.write(data, 0)
            new.publish()

    @property
    def _file(self) -> Path:
        return cache_folder() / self.name

    def _all(self) -> dict[str, T]:
        try:
            known: dict[str, T] = msgspec.json.decode(read_plain(self._file, LONGEST), type=dict[str, self.kind])  # type: ignore[name-defined]
        except FileNotFoundError:
            return {}
        except (OSError, *NOT_JSON) as error:
            log.warning("%s: %s; measure again with: %s", self._file, error, self.again)
            return {}
        return known
