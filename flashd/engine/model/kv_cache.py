"""The KV cache: bounded buffers of keys and values for each layer that attends.

In float32 a layer's graph reads and writes them in place. In 8 bits they are widened for the graph, for the layers of
one session at a time, and what it adds is kept in 8 bits afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from flashd.bundle.architecture import Architecture
from flashd.bundle.rows.kinds import Floats
from flashd.engine.model.branches import CacheSlots
from flashd.engine.model.kv_rows import Kept, empty, read, row_bytes, write
from flashd.engine.model.states import PassStates, State, States, lendable_states
from flashd.graphs.rounding import KvFormat
from flashd.system.freed_memory import PAGE, give_back

Lend = Callable[[int], None]
"""Called with how many bytes the cache lends from now on, in place of what it lent before. If that is less, the
borrower frees the difference before it returns."""


def keep(nbytes: int) -> None:
    """A Lend that borrows nothing."""


SPARE = 2
"""Slots behind the context."""


def cache_bytes(model: Architecture, context: int, kv: KvFormat = "float32") -> int:
    """Bytes of the keys and values of `context` tokens in all layers that keep them.

    With float16 the graph rounds its products too: the paged and the resident path then differ by 3e-3 of the
    logits, not 2e-4, and decoding is no faster.
    """
    kinds = model.keeping.values()
    each = [kind.kept * model.kv_heads_of(kind) * row_bytes(kv, model.head_dim_of(kind)) for kind in kinds]
    return context * sum(each)


def widened_bytes(model: Architecture, context: int, kv: KvFormat, layers: int) -> int:
    """Bytes of what the cache is widened to for a session of so many layers."""
    kind = model.attention[0]
    return 0 if kv == "float32" else kind.kept * layers * model.kv_width(kind) * context * 4


def lendable_bytes(model: Architecture, unused: int, kv: KvFormat = "float32") -> int:
    """Bytes that can be lent of the memory for `unused` tokens.

    Memory goes back in whole pages of the system. The pages at the two ends of each head's part stay, since they may
    hold something else too.
    """
    parts = sum(kind.kept * model.kv_heads_of(kind) for kind in model.keeping.values())
    return max(0, cache_bytes(model, unused, kv) - 2 * PAGE * parts)


@dataclass(frozen=True)
class Place:
    """How far a cache has come, to go back to: its tokens, and those that the states of each text took in."""

    length: int
    of_texts: tuple[int, ...]


class KvCache:
    """Keys and values of every layer that keeps them, a row for each kv head and token.

    The first `length` tokens are valid.

    A text that is shorter than the context does not need all of this memory. The rest is lent, see `hold`. If layers
    have a state in place of keys, it is here too, and a text cannot be cut anywhere, see `truncate`. Each of the
    texts that grow together has states of its own, and a number from 0 on. Memory for those of texts that are not
    there is lent too.

    Args:
        model: the model.
        context: the most tokens.
        lend: is told what is lent.
        kv: how rows are kept.
        together: of rows that are not float32, for how many layers they are widened at a time.
        texts: how many may grow together.
        beside: bytes that passes do not need for a token that is not there. They are lent with its keys and values.
    """

    def __init__(
        self, model: Architecture, context: int, lend: Lend = keep, kv: KvFormat = "float32", together: int = 1,
        texts: int = 1, beside: int = 0,
    ) -> None:  # fmt: skip
        self.context, self.kv = context, kv
        self._model, self._lend, self._beside = model, lend, beside
        self.length = 0
        self.token_bytes = cache_bytes(model, 1, kv)
        # of a single row, which is doubled, attention may read one row behind the last token, see Places
        shapes = [
            (model.kv_heads_of(kind), context + SPARE, model.head_dim_of(kind), kind.kept)
            for kind in model.keeping.values()
        ]
        self._arrays = [empty(kv, *shape) for shape in shapes]
        self._wide = self._arrays if kv == "float32" else [empty("float32", *shapes[0]) for _ in range(together)]
        # one row that stands for a key and a value is given as both
        values = [[ort.OrtValue.ortvalue_from_numpy(part[None]) for part in a] for a in self._wide]
        self._values = [parts * (2 // len(parts)) for parts in values]
        kept = {layer: i for i, layer in enumerate(model.keeping)}
        self._place = {layer: kept[model.lender(layer)] for layer in model.attending}
        self._states = States(model)  # of text 0
        self._of_texts = [self._states, *(States(model) for _ in range(texts - 1 if self._states else 0))]
        self._texts = 1  # whose states take memory: the first ones
        self._held = context + SPARE
        self.hold(0)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states behind one token, about. 0 if no layer has one: a text can then be cut anywhere."""
        return self._states.nbytes

    @property
    def stateful(self) -> int:
        """How many layers have a state."""
        return len(self._states)

    def layer(
        self, i: int, tokens: int, drafting: bool = False, text: int = 0, in_place: bool = True
    ) -> PassStates:  # fmt: skip
        """What a layer keeps, by the names of its graph's inputs and outputs, for a pass over `tokens` more.

        Keys and values are [1, kv heads, context, head dim], see `widen`. The graph writes them `in_place`, see
        `take_in`, or gives out those that are new, see `put`. A state is written beside the one before. `drafting`:
        all of it will be forgotten again. `text`: whose they all are.
        """
        state = self._of_texts[text].of_pass(i, tokens, drafting) if i in self._states else PassStates()
        if i not in self._place:
            return state
        values = self._values[self._place[i] % len(self._values)]
        kept = dict(zip(("key", "value"), values, strict=True))
        return PassStates(
            state.inputs | {f"past_{name}": value for name, value in kept.items()},
            state.outputs | {f"present_{name}": value for name, value in kept.items() if in_place},
            state.counts,
        )

    def widen(self, i: int, past: int) -> None:
        """Makes the first `past` keys and values of a layer ready for its graph."""
        if self._wide is not self._arrays and i in self._place:
            rows, wide = self._of(i)
            read(rows[:, :, :past], wide[:, :, :past])

    def take_in(self, i: int, past: int, tokens: int) -> None:
        """Keeps the keys and values that a layer's graph wrote behind the first `past`."""
        if self._wide is not self._arrays and i in self._place:
            rows, wide = self._of(i)
            write(wide[:, :, past : past + tokens], rows[:, :, past : past + tokens])

    def put(self, i: int, past: int, keys: Floats, values: Floats) -> None:
        """Keeps the keys and values [kv heads, n, D] of the tokens behind the first `past`. See `layer`."""
        kept, _ = self._of(i)
        for rows, new in zip(kept, (keys, values), strict=False):  # one row may stand for both
            at = rows[:, past : past + new.shape[1]]
            if self.kv == "float32":
                at[:] = new
            else:
                write(new, at)

    def _of(self, i: int) -> tuple[Kept, Floats]:
        """A layer's keys and values as they are kept, and where they are widened."""
        at = self._place[i]
        return self._arrays[at], np.asarray(self._wide[at % len(self._wide)], np.float32)

    def hold(self, length: int) -> None:
        """Holds memory for the first `length` tokens and lends the rest. `length` is not below `self.length`."""
        for array in self._arrays if length < self._held else ():
            for head in array.reshape(-1, *array.shape[2:]):  # [context, row]
                give_back(head[length:])
        self._held = min(length, self.context + SPARE)
        self._lend_rest()

    def _lend_rest(self) -> None:
        tokens = max(0, self.context - self._held)
        unused = lendable_bytes(self._model, self.context + SPARE - self._held, self.kv) + tokens * self._beside
        self._lend(unused + lendable_states(self._model, len(self._of_texts) - self._texts))

    def reserve(self, length: int) -> None:
        """Makes sure that memory for `length` tokens is held. Call this before they are written."""
        if length > self._held:
            self.hold(length)

    def parts(self, start: int, stop: int) -> Iterator[Kept]:
        """The memory of tokens `start` to `stop`: their rows [tokens, ...] for each head, contiguous.

        They come layer by layer, the keys of all heads before the values of all heads.
        """
        for array in self._arrays:
            for rows in array:  # [kv heads, context, row]
                yield from rows[:, start:stop]

    def advance(self, tokens: int, of_texts: Mapping[int, int] | None = None) -> None:
        """Counts `tokens` more tokens as valid. Call this when every layer has written them.

        `of_texts`: how many of them each text has; None: text 0 has all.
        """
        self.length += tokens
        for text, more in ({0: tokens} if of_texts is None or not self._states else of_texts).items():
            self._of_texts[text].advance(more)

    def longest(self, length: int, text: int = 0) -> int:
        """The most tokens, up to `length`, that a text can be cut to: all if no layer has a state."""
        return self._of_texts[text].longest(length) if self._states else length

    def mark(self, text: int = 0) -> None:
        """Keeps the states behind the last token of a text, so that it may later be cut here."""
        if self._states:
            self._of_texts[text].mark(beside=text > 0)

    def share(self, text: int, other: int, length: int) -> None:
        """Begins a text, as far as states go, with the first `length` tokens of another: a number `longest` gives.

        Memory for its states is held from now on.
        """
        if not self._states:
            return
        if text >= self._texts:
            self._texts = text + 1
            self._lend_rest()
        self._of_texts[text].resume(length, self._of_texts[other].at(length) if length else [])

    def states(self, length: int) -> list[State]:
        """The state of each layer that has one behind the first `length` tokens, a number that `longest` gives."""
        return self._states.at(length) if self._states else []

    def empty_states(self, pending: Sequence[int]) -> list[State]:
        """States like those of `states`, to be filled for `resume`; each has so many rows that its sum lacks."""
        return self._states.empty(pending)

    def states_bytes(self, pending: Sequence[int]) -> int:
        """Bytes of these."""
        return self._states.nbytes_of(pending) if pending else self.state_bytes

    def resume(self, length: int, states: Sequence[State]) -> None:
        """Counts `length` tokens as valid, whose keys and values are in `parts`. `states` are those behind them."""
        self._states.resume(length, states)
        self.length = length

    def keep(self, slots: CacheSlots, of_texts: Mapping[int, int] | None = None) -> None:
        """Forgets all tokens but those at `slots` [n], ascending. They move to slots 0 to n - 1 in the same order.

        `of_texts`: the length of each text that stays, by its number, ascending. They are numbered from 0 afterwards.
        None: text 0 stays, and has all these tokens.
        """
        count = len(slots)
        # those before the first gap stay in place
        first = int(np.count_nonzero(slots == np.arange(count)))
        if first < count:
            for array in self._arrays:
                array[:, :, first:count] = array[:, :, slots[first:]]  # [2, kv heads, n - first, row]
        self._check_kept(count)
        self.length = count
        if self._states:
            self._keep_states({0: count} if of_texts is None else of_texts)

    def _keep_states(self, of_texts: Mapping[int, int]) -> None:
        for text, length in of_texts.items():
            if self._of_texts[text].forget(length) != length:
                raise ValueError(f"the states behind {length} tokens are gone")
        stay = [self._of_texts[text] for text in of_texts]
        go = [states for states in self._of_texts if states not in stay]
        self._of_texts, self._states = [*stay, *go], stay[0]
        if len(stay) < self._texts:
            for states in go[: self._texts - len(stay)]:
                states.release()
            self._texts = len(stay)
            self._lend_rest()

    @property
    def place(self) -> Place:
        return Place(self.length, tuple(states.length for states in self._of_texts[: self._texts]))

    def go_back(self, place: Place) -> None:
        """Forgets the tokens of the last pass, or of those that drafted, in all texts. `place`: as it was before."""
        self.length = place.length
        for states, length in zip(self._of_texts, place.of_texts, strict=False):
            states.forget(length)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Raises ValueError if there are fewer.

        If layers have states that are not known there, more tokens are forgotten: `self.length` says what stays. The
        states before the last pass are known, those behind up to REWIND tokens before the last, and where `mark` was
        called.
        """
        self._check_kept(length)
        self.length = self._states.forget(length)

    def _check_kept(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} of {self.length} tokens")
