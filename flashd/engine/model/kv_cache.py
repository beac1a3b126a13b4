"""The KV cache: one bounded buffer a layer, written in place by the attention graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime as ort

from flashd.bundle.architecture import Architecture
from flashd.bundle.row_kinds import Floats
from flashd.engine.model.branches import Slots
from flashd.system.freed_memory import PAGE, give_back

Lend = Callable[[int], None]
"""Called with the bytes that the cache does not need for now. Before it returns, what it lent before and does not
lend now is free again."""


def keep(nbytes: int) -> None:
    """A Lend that leaves it all to the cache."""


SPARE = 2
"""Slots behind the context."""


def cache_bytes(model: Architecture, context: int) -> int:
    """Bytes of keys and values of `context` tokens in all layers.

    float32: in float16, whose products the graph rounds too, the paged and the resident path drift to 3e-3
    of the logits (2e-4 so), and decoding is no faster.
    """
    return 2 * model.layers * model.kv_width * context * 4


def lendable_bytes(model: Architecture, unused: int) -> int:
    """Bytes of `unused` tokens that can be lent: of each head's part, pages at its ends that others share stay."""
    return max(0, cache_bytes(model, unused) - 2 * PAGE * 2 * model.layers * model.kv_heads)


class KvCache:
    """Keys and values [1, kv heads, context, head dim] of every layer; the first `length` tokens are valid.

    What a text shorter than the context does not need of it is lent, see `hold`.
    """

    def __init__(self, model: Architecture, context: int, lend: Lend = keep) -> None:
        self.context = context
        self._model, self._lend = model, lend
        self.length = 0
        self.token_bytes = cache_bytes(model, 1)
        # behind the last token goes what attention writes for the rows that nothing looks at, see graphs.constant
        shape = (1, model.kv_heads, context + SPARE, model.head_dim)
        self._arrays = [np.zeros(shape, np.float32) for _ in range(2 * model.layers)]
        self._values = [ort.OrtValue.ortvalue_from_numpy(a) for a in self._arrays]
        self._held = context + SPARE
        self.hold(0)

    def layer(self, i: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """(keys, values) of a layer."""
        return self._values[2 * i], self._values[2 * i + 1]

    def hold(self, length: int) -> None:
        """Holds memory for `length` tokens, the valid ones among them, and lends the rest."""
        for array in self._arrays if length < self._held else ():
            for head in array[0]:
                give_back(head[length:])
        self._held = min(length, self.context + SPARE)
        self._lend(lendable_bytes(self._model, self.context + SPARE - self._held))

    def reserve(self, length: int) -> None:
        """Makes sure of memory for `length` tokens. Call it before they are written."""
        if length > self._held:
            self.hold(length)

    def parts(self, start: int, stop: int) -> Iterator[Floats]:
        """Where tokens `start` to `stop` are kept, [tokens, head dim] in one piece for each head.

        Layer by layer, keys before values.
        """
        for array in self._arrays:
            yield from array[0, :, start:stop]

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more as valid: every layer has written them."""
        self.length += tokens

    def keep(self, slots: Slots) -> None:
        """Forgets all tokens but those at `slots`, ascending, which then follow one another in the same order."""
        count = len(slots)
        # those before the first gap stay where they are
        first = int(np.count_nonzero(slots == np.arange(count)))
        if first < count:
            for array in self._arrays:
                array[0, :, first:count] = array[0][:, slots[first:]]
        self.truncate(count)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Raises ValueError where there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} of {self.length} tokens")
        self.length = length
