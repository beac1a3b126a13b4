"""What layers keep in place of keys and values: a state that is as large for a long text as for a short one.

A KV cache is cut anywhere. A state is not: it has taken in all tokens up to the last. So the state of a pass is
written beside the one before it, and a few more are kept where a text is likely to be cut. A short convolution can
also forget its last tokens, since its state is its last inputs and some more of them are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from flashd.bundle.architecture import Architecture, ShortConvolution
from flashd.bundle.rows.kinds import Floats
from flashd.graphs.stages import REWIND, state_shape

MARKS = 3
"""The most places of a text whose states are kept beside those at its end."""


def states_bytes(model: Architecture) -> int:
    """Bytes of the float32 states of all layers: before and behind a pass, and those that are marked."""
    inputs = [2 * state_shape(model, kind)[1] + MARKS * (kind.taps - 1) for kind in _kinds(model).values()]
    return 4 * model.hidden * sum(inputs)


def _kinds(model: Architecture) -> dict[int, ShortConvolution]:
    """The kinds of the layers that have a state, by the layers' numbers."""
    kinds = {i: model.kind(i) for i in range(model.layers)}
    return {i: kind for i, kind in kinds.items() if isinstance(kind, ShortConvolution)}


@dataclass
class _Point:
    """The states of all layers behind `length` tokens. They can forget the last `spare` of these."""

    arrays: dict[int, Floats]  # by layer, [1, inputs, H]
    values: dict[int, ort.OrtValue]
    length: int = 0
    spare: int = 0
    valid: bool = False

    @classmethod
    def of(cls, model: Architecture, kinds: dict[int, ShortConvolution]) -> _Point:
        arrays = {i: np.zeros(state_shape(model, kind), np.float32) for i, kind in kinds.items()}
        return cls(arrays, {i: ort.OrtValue.ortvalue_from_numpy(a) for i, a in arrays.items()})


class States:
    """The states of the layers that have one, behind the tokens of one text."""

    def __init__(self, model: Architecture) -> None:
        self._kinds = _kinds(model)
        self._now, self._other = (_Point.of(model, self._kinds) for _ in range(2))
        self._written: set[int] = set()  # layers whose states behind this pass are in `_other`
        self._marks: dict[int, list[Floats]] = {}  # by length: of each layer the inputs [taps - 1, H] that it needs
        self.nbytes = sum(4 * model.hidden * (kind.taps - 1) for kind in self._kinds.values())
        """Bytes of the states behind one token, as `at` gives them."""

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._kinds)

    def of_pass(self, layer: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """(the state that a layer goes on from, where it writes that behind the tokens): the same if it wrote before.

        They count when `advance` says that every layer has written.
        """
        before = self._other if layer in self._written else self._now
        self._written.add(layer)
        self._other.valid = False
        return before.values[layer], self._other.values[layer]

    def advance(self, tokens: int) -> None:
        """Says that all layers have taken in `tokens` more."""
        now = self._now
        self._written.clear()
        self._now, self._other = self._other, now
        self._now.length, self._now.spare = now.length + tokens, min(REWIND, now.spare + tokens)
        now.valid = True

    def longest(self, length: int) -> int:
        """The most tokens, up to `length` of those that were taken in, behind which the states are known."""
        now, other = self._now, self._other
        if not self or length >= now.length - now.spare:
            return length
        known = [0, *self._marks, *([other.length] if other.valid else [])]
        return max(at for at in known if at <= length)

    def forget(self, length: int) -> int:
        """Forgets all but the first `length` tokens, or more, see `longest`. Returns how many stay."""
        self._written.clear()
        stays = self.longest(length)
        if not self:
            return stays
        if self._now.length - stays <= self._now.spare:
            self._rewind(self._now.length - stays)
        elif self._other.valid and self._other.length == stays:
            self._now, self._other = self._other, self._now
            self._other.valid = False
        else:
            self._set(stays, self._marks.get(stays))
        # the text may go on with other tokens
        self._marks = {at: state for at, state in self._marks.items() if at <= stays}
        return stays

    def mark(self) -> None:
        """Keeps the states as they are now, for as long as the text begins with these tokens."""
        now = self._now
        if not self or not now.length:
            return
        state = self._marks.pop(now.length, None) or self.at(now.length)
        self._marks[now.length] = state
        for at in list(self._marks)[:-MARKS]:
            del self._marks[at]

    def at(self, length: int) -> list[Floats]:
        """Of each layer [taps - 1, H]: the states behind `length` tokens, which must be known, see `longest`."""
        now = self._now
        if length in self._marks:
            return self._marks[length]
        point, back = (now, now.length - length) if now.length - length <= now.spare else (self._other, 0)
        ends = [(kind, array, array.shape[1] - back) for kind, array in self._each(point)]
        return [array[0, end - kind.taps + 1 : end].copy() for kind, array, end in ends]

    def empty(self) -> list[Floats]:
        """Arrays like those of `at`, to be filled and given to `resume`."""
        return [np.empty((k.taps - 1, a.shape[2]), np.float32) for k, a in self._each(self._now)]

    def resume(self, length: int, state: Sequence[Floats]) -> None:
        """Takes the states behind `length` tokens, as `at` gave them, in place of what is here."""
        self._written.clear()
        self._marks.clear()
        self._set(length, state)
        self._other.valid = False

    def _each(self, point: _Point) -> list[tuple[ShortConvolution, Floats]]:
        return list(zip(self._kinds.values(), point.arrays.values(), strict=True))

    def _rewind(self, tokens: int) -> None:
        """Forgets the last `tokens`, whose inputs are the last ones of the states."""
        for array in self._now.arrays.values() if tokens else ():
            array[:, tokens:] = array[:, :-tokens].copy()
            array[:, :tokens] = 0
        self._now.length -= tokens
        self._now.spare -= tokens

    def _set(self, length: int, state: Sequence[Floats] | None) -> None:
        """The states behind `length` tokens; None: of no tokens, all zeros."""
        for i, (kind, array) in enumerate(self._each(self._now)):
            array[:] = 0
            if state is not None:
                array[0, array.shape[1] - kind.taps + 1 :] = state[i]
        self._now.length, self._now.spare = length, 0
