"""The KV cache: one bounded buffer a layer, written in place by the attention graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime as ort

from flashd.bundle.layout import Model
from flashd.bundle.rows import Floats


def cache_bytes(model: Model, context: int) -> int:
    """Bytes of keys and values of `context` tokens in all layers.

    float32: in float16, whose products the graph rounds too, the paged and the resident path drift to 3e-3
    of the logits (2e-4 so), and decoding is no faster.
    """
    return 2 * model.layers * model.kv_width * context * 4


class KvCache:
    """Keys and values [1, kv heads, context, head dim] of every layer; the first `length` tokens are valid."""

    def __init__(self, model: Model, context: int) -> None:
        self.context = context
        self.length = 0
        self.token_bytes = cache_bytes(model, 1)
        shape = (1, model.kv_heads, context, model.head_dim)
        self._arrays = [np.zeros(shape, np.float32) for _ in range(2 * model.layers)]
        self._values = [ort.OrtValue.ortvalue_from_numpy(a) for a in self._arrays]

    def layer(self, i: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """(keys, values) of a layer."""
        return self._values[2 * i], self._values[2 * i + 1]

    def parts(self, start: int, stop: int) -> Iterator[Floats]:
        """Where tokens `start` to `stop` are kept, [tokens, head dim] in one piece for each head.

        Layer by layer, keys before values.
        """
        for array in self._arrays:
            yield from array[0, :, start:stop]

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more as valid: every layer has written them."""
        self.length += tokens

    def move(self, source: int, target: int) -> None:
        """Puts the keys and values of the token at `source` in the place of those at `target`."""
        for array in self._arrays:
            array[0, :, target] = array[0, :, source]

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Raises ValueError where there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} of {self.length} tokens")
        self.length = length
