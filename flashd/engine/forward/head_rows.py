"""The products of the head's rows: constants of sessions, or bytes that are unpacked just before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import Any, Protocol

from flashd.bundle.arrays import Rows
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.forward.kept import KeptRows, Shelf
from flashd.engine.forward.unpacked import Multiplier, in_turn
from flashd.engine.model.sizes import HEAD_ROWS_UNPACKED


class HeadRows(Protocol):
    """One of the two ways."""

    def kept(self, rows: Rows) -> list[Any]:
        """Rows, in parts that stay in RAM."""

    def products(self, h: Floats, parts: Iterable[Any]) -> Iterator[Floats]:
        """h [R, H] -> logits [R, n] of each part in turn."""


class ConstantRows:
    """Rows that are the constants of sessions."""

    def __init__(self, constants: Constants, hidden: int, doubled: bool) -> None:
        self._constants, self._hidden, self._doubled = constants, hidden, doubled

    def kept(self, rows: Rows) -> list[Any]:
        return [self._constants.rows(rows, self._hidden)]

    def products(self, h: Floats, parts: Iterable[Any]) -> Iterator[Floats]:
        for session in parts:
            yield multiplied(session, self._doubled, x=h)


class UnpackedRows:
    """Rows as the card has them. Those that stream past are multiplied as those in RAM are."""

    def __init__(self, form: RowFormat, shelf: Shelf, multiply: Multiplier, workers: Executor, most: int) -> None:
        self.form, self._shelf, self._multiply, self._workers, self._most = form, shelf, multiply, workers, most

    def kept(self, rows: Rows) -> list[KeptRows]:
        each = -(-len(rows) // -(-len(rows) // HEAD_ROWS_UNPACKED))  # parts of one size take each other's memory
        for n in {each, len(rows) % each} - {0}:
            self._multiply.add_rows(self.form, n)
        starts = range(0, len(rows), each)
        return [self._shelf.keep_rows(self.form, rows[at : at + each]) for at in starts]

    def products(self, h: Floats, parts: Iterable[KeptRows]) -> Iterator[Floats]:
        entering = self._multiply.entering(self.form, h)
        calls = (partial(self._multiply.rows, part, entering) for part in parts)
        return in_turn(self._workers, calls, self._most)
