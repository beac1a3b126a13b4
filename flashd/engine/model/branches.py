"""How the tokens of a pass stand where they are not one line: behind several texts, and in trees of guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]
"""Where in the KV cache a text's tokens are, in the text's order."""


def behind(text: int) -> int:
    """The parent of a token that stands behind a text; tokens of the pass itself are counted from 0 on."""
    return ~text


@dataclass(frozen=True)
class Branches:
    """Texts that the KV cache holds, and of each token of a pass what it stands behind.

    A parent is an earlier token of the pass, or `behind` a text.
    """

    texts: Sequence[Slots]
    parents: Sequence[int]

    def sees(self, past: int) -> npt.NDArray[np.bool_]:
        """[T, past + T]: which of the `past` slots of the cache and of the pass's T tokens each looks at.

        They are those before it in its text and itself. Section 3 of SpecInfer (arXiv 2305.09781) calls this tree
        attention.
        """
        count = len(self.parents)
        sees = np.zeros((count, past + count), np.bool_)
        for token, parent in enumerate(self.parents):
            if parent < 0:
                sees[token, self.texts[~parent]] = True
            else:
                sees[token] = sees[parent]
            sees[token, past + token] = True
        return sees
