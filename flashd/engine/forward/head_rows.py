"""The products of the head's rows: constants of sessions, or bytes that are unpacked just before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from flashd.bundle.arrays import Rows
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.forward.kept import KeptRows, Shelf
from flashd.engine.forward.unpacked import Multiplier
from flashd.engine.planning.unpacked import head_parts


class HeadRows(Protocol):
    """One of the two ways."""

    def kept(self, rows: Rows) -> list[Any]:
        """Rows, in parts that stay in RAM."""

    def products(self, h: Floats, parts: Iterable[Any], drafting: bool = False) -> Iterator[Floats]:
        """h [R, H] -> logits [R, n] of each part in turn. `drafting`: they need not be exact."""

    def row(self, parts: Sequence[Any], number: int) -> Rows | None:
        """Row `number` of the parts, arrays [1, m]; None if it cannot be got."""


class ConstantRows:
    """Rows that are the constants of sessions."""

    def __init__(self, constants: Constants, hidden: int, doubled: bool) -> None:
        self._constants, self._hidden, self._doubled = constants, hidden, doubled

    def kept(self, rows: Rows) -> list[Any]:
        return [self._constants.rows(rows, self._hidden)]

    def products(self, h: Floats, parts: Iterable[Any], drafting: bool = False) -> Iterator[Floats]:  # noqa: ARG002
        for session in parts:
            yield multiplied(session, self._doubled, x=h)

    def row(self, parts: Sequence[Any], number: int) -> Rows | None:
        """onnxruntime has them in a form of its own."""


class UnpackedRows:
    """Rows as the card has them. Those that stream past are multiplied as those in RAM are.

    Args:
        multiply: multiplies exactly.
        guess: multiplies for drafts.
        in_turn: what calls give, in their order.
    """

    def __init__(
        self, form: RowFormat, multiply: Multiplier, guess: Multiplier,
        in_turn: Callable[[Iterable[Callable[[], Floats]]], Iterator[Floats]],
    ) -> None:  # fmt: skip
        self.form, self._multiply, self._guess, self._in_turn = form, multiply, guess, in_turn
        self._shelf = Shelf()

    def kept(self, rows: Rows, shelf: Shelf | None = None) -> list[KeptRows]:
        """Rows, in parts. `shelf`: has memory for those that stream past."""
        _, each = head_parts(len(rows))  # parts of one size take each other's memory
        for n in {each, len(rows) % each} - {0}:
            self._multiply.add_rows(self.form, n)
            if shelf is None:  # guesses are made of what is in RAM
                self._guess.add_rows(self.form, n)
        starts = range(0, len(rows), each)
        return [(shelf or self._shelf).keep_rows(self.form, rows[at : at + each]) for at in starts]

    def products(self, h: Floats, parts: Iterable[KeptRows], drafting: bool = False) -> Iterator[Floats]:
        multiply = self._guess if drafting else self._multiply
        entering = multiply.entering(self.form, h)
        return self._in_turn(partial(multiply.rows, part, entering) for part in parts)

    def row(self, parts: Sequence[KeptRows], number: int) -> Rows | None:
        for part in parts:
            if number < (count := part.rows.arrays()[0].shape[1]):
                return part.row(number)
            number -= count
        return None
