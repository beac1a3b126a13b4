"""What layers keep in place of keys and values: a state that is as large for a long text as for a short one.

A KV cache is cut anywhere. A state is not: it has taken in all tokens up to the last. So the state of a pass is
written beside the one before it, and a few more are kept where a text is likely to be cut. A state can also forget
its last tokens, since it has the last rows that went into it, see graphs.kinds.recurrent. A short convolution is
nothing but these rows. The sum of a gated delta net or of a Mamba-2 mixer cannot take a token out again. But the
sum before the last pass is still there, and what went in since is put in anew. Passes that draft leave the sum
alone, so all that they did is undone.

Texts that grow together have States of their own. A layer takes in the tokens of one text after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import Recurrent
from flashd.bundle.rows.kinds import Floats
from flashd.graphs.kinds.recurrent import REWIND, Shape, rows_shape, sums_shape
from flashd.system.freed_memory import PAGE, give_back

MARKS, MARKS_OF_SUMS = 3, 2
"""The most places of a text whose states are kept beside those at its end; of sums, which are large, fewer.

One is behind the prompt, and one where it parted from an earlier prompt.
"""

MARKS_BESIDE = 1
"""Of a text that joined others: the one behind its prompt."""


def states_bytes(model: Architecture, beside: bool = False) -> int:
    """Bytes of the float32 states of all layers: before and behind a pass, and those that are marked.

    Those of one text. `beside`: of one that joins others.
    """
    kinds = list(_kinds(model).values())
    sums = [_size(shape) for kind in kinds if (shape := sums_shape(kind))]
    rows = sum(2 * _size(rows_shape(model, kind)) for kind in kinds)
    least = sum((kind.taps - 1) * kind.row_width(model.hidden) for kind in kinds)
    if not sums:
        return 4 * (rows + (MARKS_BESIDE if beside else MARKS) * least)
    # what a pass writes that nothing reads, and the rows that a marked sum lacks
    marked = (MARKS_BESIDE if beside else MARKS_OF_SUMS) * (rows // 2 + sum(sums))
    return 4 * (rows + 2 * sum(sums) + max(sums) + marked)


def lendable_states(model: Architecture, texts: int) -> int:
    """Bytes that can be lent of the memory for the states of `texts` texts that join others, while they are unused.

    Pages at the two ends of each array stay, as those of keys do.
    """
    arrays = sum(4 if kind.sums else 2 for kind in _kinds(model).values()) + 1
    return texts * max(0, states_bytes(model, beside=True) - 2 * PAGE * arrays)


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _kinds(model: Architecture) -> dict[int, Recurrent]:
    """The kinds of the layers that have a state, by the layers' numbers."""
    kinds = {i: model.state_kind(i) for i in range(model.layers)}
    return {i: kind for i, kind in kinds.items() if kind}


@dataclass(frozen=True)
class PassStates:
    """What a layer's graph reads, what it writes, and what it has to know, by the names of graphs.kinds.recurrent."""

    inputs: dict[str, ort.OrtValue] = field(default_factory=dict)
    outputs: dict[str, ort.OrtValue] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)  # [1] each


@dataclass(frozen=True)
class State:
    """The state of a layer behind some tokens, contiguous, as it is kept elsewhere."""

    rows: Floats  # [taps - 1 + pending, W]
    sums: Floats  # [heads, key dim, value dim], or [0]
    pending: int  # the last so many rows are not in the sum

    @property
    def parts(self) -> list[Floats]:
        return [self.rows, self.sums] if self.sums.size else [self.rows]


class _Buffers:
    """Two of the same arrays: `now` has what a pass reads, `other` gets what it writes."""

    def __init__(self, shape: Shape) -> None:
        self.arrays = [np.zeros(shape, np.float32) for _ in range(2)]
        self._values = [ort.OrtValue.ortvalue_from_numpy(a) for a in self.arrays]

    def swap(self) -> None:
        self.arrays.reverse()
        self._values.reverse()

    def give_back(self) -> None:
        """What the arrays hold is lost."""
        for array in self.arrays:
            give_back(array)

    @property
    def now(self) -> Floats:
        return self.arrays[0]

    def value(self, other: bool) -> ort.OrtValue:
        return self._values[other]


class _Layer:
    """The state of one layer."""

    def __init__(self, model: Architecture, kind: Recurrent) -> None:
        shape = sums_shape(kind)
        self.before = kind.taps - 1
        self.rows = _Buffers(rows_shape(model, kind))
        self.sums = _Buffers(shape) if shape else None
        self.pending = 0  # rows that the sum lacks
        self.later = 0  # and behind the pass that is going on

    def rewind(self, tokens: int) -> None:
        """Forgets the last rows."""
        rows = self.rows.now
        if tokens:
            rows[:, tokens:] = rows[:, :-tokens].copy()
            rows[:, :tokens] = 0

    def copy(self, back: int, pending: int, sums: int) -> State:
        """The state `back` tokens ago, whose sum is that of the buffer number `sums` and lacks `pending` rows."""
        rows = self.rows.now[0]
        end = len(rows) - back
        kept = self.sums.arrays[sums][0].copy() if self.sums else np.zeros(0, np.float32)
        return State(rows[end - self.before - pending : end].copy(), kept, pending)

    def empty(self, pending: int) -> State:
        rows = np.empty((self.before + pending, self.rows.now.shape[2]), np.float32)
        return State(rows, np.empty(self.sums.now.shape[1:] if self.sums else 0, np.float32), pending)

    def set(self, state: State | None) -> None:
        """Takes a state; None: of no tokens, all zeros."""
        rows = self.rows.now
        rows[:] = 0
        if self.sums:
            self.sums.now[:] = 0 if state is None else state.sums
        if state is not None:
            rows[0, rows.shape[1] - len(state.rows) :] = state.rows
        self.pending = 0 if state is None else state.pending


class States:
    """The states of the layers that have one, behind the tokens of one text."""

    def __init__(self, model: Architecture) -> None:
        self._layers = {i: _Layer(model, kind) for i, kind in _kinds(model).items()}
        with_sums = [layer.sums for layer in self._layers.values() if layer.sums]
        self._sums = bool(with_sums)
        self._unread = _Buffers(with_sums[0].now.shape) if with_sums else None
        self._length = 0
        self._spare = 0  # tokens that can be forgotten by their rows
        self._last = 0  # tokens of the last pass, if the sums before it can take them in anew
        self._before: int | None = None  # tokens behind which are the states that the next pass writes over
        self._written: set[int] = set()  # layers whose states behind this pass are written
        self._drafting = False
        self._marks: dict[int, list[State]] = {}  # by length
        self.nbytes = self.nbytes_of([0] * len(self._layers))
        """Bytes of the states behind one token, as `at` gives them, if no sum lacks a row."""

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def length(self) -> int:
        """Tokens of the text that were taken in."""
        return self._length

    def __contains__(self, layer: int) -> bool:
        return layer in self._layers

    @property
    def _pending(self) -> int:
        """Rows that every sum lacks."""
        return min((layer.pending for layer in self._layers.values() if layer.sums), default=0)

    def nbytes_of(self, pending: Sequence[int]) -> int:
        """Bytes of the states behind one token, as `at` gives them, whose sums lack so many rows."""
        return sum(part.nbytes for state in self.empty(pending) for part in state.parts)

    def of_pass(self, layer: int, tokens: int, drafting: bool) -> PassStates:
        """What the graph of a layer reads and writes that takes in `tokens` more, which it may do part by part.

        What it writes counts when `advance` says that every layer has written.
        """
        state, again = self._layers[layer], layer in self._written
        self._written.add(layer)
        self._before, self._drafting = None, drafting
        rows = {"past_rows": state.rows.value(again)}, {"present_rows": state.rows.value(True)}
        if state.sums is None:
            return PassStates(*rows)
        pending = state.later if again else state.pending
        folded = max(0, pending + tokens - REWIND) if drafting else pending
        # only the first part of a pass finds rows to be folded: the sum that it reads is then written over
        now = state.sums.value(again and not drafting)
        assert self._unread is not None
        inputs = rows[0] | {"past_sums": now}
        outputs = rows[1] | {
            "folded_sums": now,  # as it is, if nothing is folded
            "present_sums": self._unread.value(False) if drafting else state.sums.value(True),
        }
        if folded:
            state.pending, self._last, self._spare = pending - folded, 0, 0  # until the pass is done
        state.later = pending - folded + tokens if drafting else 0
        counts = {"pending": np.array([pending], np.int64), "folded": np.array([folded], np.int64)}
        return PassStates(inputs, outputs, counts)

    def advance(self, tokens: int) -> None:
        """Says that all layers have taken in `tokens` more."""
        length, last = self._length, self._last
        for layer in self._layers.values():
            layer.rows.swap()
            if layer.sums and not self._drafting:
                layer.sums.swap()
            layer.pending = layer.later
        self._length = length + tokens
        self._written.clear()
        if not self._sums:
            self._before, self._spare = length, min(REWIND, self._spare + tokens)
            return
        if not self._drafting:
            self._before, self._last = length, tokens if tokens <= REWIND else 0
            self._spare = self._last
            return
        # the rows of the last pass, unless drafts pushed some out
        self._last = last if self._pending + last <= REWIND else 0
        self._spare = self._pending + self._last

    def longest(self, length: int) -> int:
        """The most tokens, up to `length` of those that were taken in, behind which the states are known."""
        if not self or length >= self._length - self._spare:
            return length
        known = [0, *self._marks, *([] if self._before is None else [self._before])]
        return max(at for at in known if at <= length)

    def forget(self, length: int) -> int:
        """Forgets all but the first `length` tokens, or more, see `longest`. Returns how many stay."""
        if self._written:  # a pass broke off
            self._last, self._spare = 0, 0 if self._sums else self._spare
        self._written.clear()
        stays = self.longest(length)
        if not self:
            return stays
        back = self._length - stays
        if back <= self._spare:
            self._rewind(back)
        elif self._before == stays:
            self._go_back()
        else:
            self._set(stays, self._marks.get(stays))
        # the text may go on with other tokens
        self._marks = {at: state for at, state in self._marks.items() if at <= stays}
        return stays

    def mark(self, beside: bool = False) -> None:
        """Keeps the states as they are now, for as long as the text begins with these tokens.

        `beside`: the text joined others, and has fewer marks.
        """
        if not self or not self._length:
            return
        state = self._marks.pop(self._length, None) or self.at(self._length)
        self._marks[self._length] = state
        most = MARKS_OF_SUMS if self._sums else MARKS
        for at in list(self._marks)[: -(MARKS_BESIDE if beside else most)]:
            del self._marks[at]

    def at(self, length: int) -> list[State]:
        """The state of each layer behind `length` tokens, which must be known, see `longest`."""
        if length in self._marks:
            return self._marks[length]
        back, layers = self._length - length, self._layers.values()
        if back > self._spare:
            return self._states_before()
        if not self._sums:
            return [layer.copy(back, 0, 0) for layer in layers]
        if back <= self._pending:
            return [layer.copy(back, layer.pending - back, 0) for layer in layers]
        return [layer.copy(back, self._last - (back - layer.pending), 1) for layer in layers]

    def empty(self, pending: Sequence[int]) -> list[State]:
        """States like those of `at`, to be filled and given to `resume`; so many rows are not in each sum."""
        return [layer.empty(n) for layer, n in zip(self._layers.values(), pending, strict=True)]

    def resume(self, length: int, states: Sequence[State]) -> None:
        """Takes the states behind `length` tokens, as `at` gave them, in place of what is here.

        `states` may be empty if `length` is 0.
        """
        self._written.clear()
        self._marks.clear()
        self._set(length, states)

    def release(self) -> None:
        """Forgets all tokens and gives the memory back until `resume` is called."""
        self._written.clear()
        self._marks.clear()
        self._length, self._spare, self._last, self._before = 0, 0, 0, None
        for layer in self._layers.values():
            for buffers in (layer.rows, layer.sums):
                if buffers:
                    buffers.give_back()
        if self._unread:
            self._unread.give_back()

    def _rewind(self, tokens: int) -> None:
        """Forgets the last `tokens`, whose rows are the last ones of the states."""
        before = self._sums and tokens > self._pending
        for layer in self._layers.values():
            layer.rewind(tokens)
            if before and layer.sums:
                layer.sums.swap()
                layer.pending += self._last
            if layer.sums:
                layer.pending -= tokens
        if before:  # the sums before the last pass are those of now
            self._last, self._before = 0, None
        self._length -= tokens
        self._spare -= tokens

    def _go_back(self) -> None:
        """Takes the states from before the last pass."""
        assert self._before is not None
        for layer in self._layers.values():
            layer.rows.swap()
            if layer.sums:
                layer.sums.swap()
        self._length, self._before, self._spare, self._last = self._before, None, 0, 0

    def _states_before(self) -> list[State]:
        self._swap_rows()
        try:
            return [layer.copy(0, 0, 1) for layer in self._layers.values()]
        finally:
            self._swap_rows()

    def _swap_rows(self) -> None:
        for layer in self._layers.values():
            layer.rows.swap()

    def _set(self, length: int, states: Sequence[State] | None) -> None:
        """The states behind `length` tokens; None: of no tokens, all zeros."""
        for i, layer in enumerate(self._layers.values()):
            layer.set(states[i] if states else None)
        self._length, self._spare, self._last, self._before = length, 0, 0, None
