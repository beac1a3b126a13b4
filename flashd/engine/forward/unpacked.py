"""Products with rows that are unpacked just before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

import numpy as np
import onnxruntime as ort

from flashd.bundle.header import Header
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import at_least_two
from flashd.engine.forward.kept import Array, Kept, KeptRows, Scratch, ScratchOfThread, Unpacker
from flashd.engine.model.sizes import FEW_UNPACKED, TOKENS_UNPACKED
from flashd.graphs import unpacked
from flashd.graphs.constant import Arithmetic
from flashd.system.onnx_session import open_session

Entering = dict[str, Array]
"""What goes into all groups of a layer, or all rows of the head, [T, ...] each, see graphs.unpacked.entering."""

R = TypeVar("R")


class Multiplier:
    """Multiplies what is kept. Several threads may use it; each has room of its own to unpack into.

    `scratch`: room that another Multiplier unpacks into too. None: its own.
    """

    def __init__(self, header: Header, arithmetic: Arithmetic, scratch: Scratch | None = None) -> None:
        self._arithmetic = arithmetic
        self._entering: dict[RowFormat, ort.InferenceSession] = {}
        self._of_groups: dict[tuple[GroupFormat, bool], ort.InferenceSession] = {}
        self._of_rows: dict[tuple[RowFormat, int, bool], ort.InferenceSession] = {}
        for form in {header.group_of(layer) for layer in header.model.paged_layers}:
            self._entering[form.row] = open_session(unpacked.entering(form.row, arithmetic))
            for many in (False, True):
                self._of_groups[form, many] = open_session(unpacked.group(header.model, form, arithmetic, many))
        self._unpacked = Unpacker(arithmetic, scratch or ScratchOfThread())

    def add_rows(self, form: RowFormat, n: int) -> None:
        """Has it multiply n rows of this form too."""
        if form not in self._entering:
            self._entering[form] = open_session(unpacked.entering(form, self._arithmetic))
        for many in (False, True):
            if (form, n, many) not in self._of_rows:
                self._of_rows[form, n, many] = open_session(unpacked.rows(form, n, self._arithmetic, many))

    def entering(self, form: RowFormat, h: Floats) -> Entering:
        """h [T, K] as products with rows of a form take it. If there are bounds behind an FFN's input, they too."""
        session = self._entering[form]
        arrays = session.run(None, {"h": np.ascontiguousarray(h[:, : form.width])})
        made = {output.name: array for output, array in zip(session.get_outputs(), arrays, strict=True)}
        return made | ({"bounds": h[:, form.width :]} if h.shape[1] > form.width else {})

    def __call__(self, group: Kept, entering: Entering) -> Floats:
        """[T, W]: the group's share in an FFN of what is `entering`, of T tokens."""
        form = group.form
        feed = self._unpacked("inputs", form.row, group.inputs) | self._unpacked("down", form.column, group.down)
        exact = not (unpacked.rounds(form.row, self._arithmetic) and unpacked.rounds(form.column, self._arithmetic))
        sessions = self._of_groups[form, False], self._of_groups[form, True]
        return self._in_parts(sessions, entering, feed | group.vectors, exact)

    def rows(self, kept: KeptRows, entering: Entering) -> Floats:
        """[T, n]: the products of what is `entering` with n rows. See add_rows."""
        n = kept.rows.arrays()[0].shape[-1]
        exact = not unpacked.rounds(kept.form, self._arithmetic)
        sessions = self._of_rows[kept.form, n, False], self._of_rows[kept.form, n, True]
        return self._in_parts(sessions, entering, self._unpacked("rows", kept.form, kept.rows, "inputs"), exact)

    def _in_parts(
        self, sessions: tuple[ort.InferenceSession, ort.InferenceSession], entering: Entering, feed: Entering,
        exact: bool,
    ) -> Floats:  # fmt: skip
        """What the session for few tokens, or that for many, gives of all T, TOKENS_UNPACKED at a time."""
        parts, count = [], len(next(iter(entering.values())))
        together = FEW_UNPACKED if count <= 2 * FEW_UNPACKED else TOKENS_UNPACKED
        for at in range(0, count, together):
            part = min(together, count - at)
            given = {name: x[at : at + part] for name, x in entering.items()}
            if exact:
                given = {name: at_least_two(x) for name, x in given.items()}
            parts.append(sessions[part > FEW_UNPACKED].run(None, feed | given)[0][:part])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def in_turn(workers: Executor, calls: Iterable[Callable[[], R]], most: int) -> Generator[R]:
    """What each of `calls` gives, in their order. Up to `most` of them are under way, or done and not taken yet.

    If whoever takes them breaks off, none is under way any more.
    """
    under_way: deque[Future[R]] = deque()
    try:
        for call in calls:
            if len(under_way) == most:
                yield under_way.popleft().result()
            under_way.append(workers.submit(call))
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()
        wait(under_way)
