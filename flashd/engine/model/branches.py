"""What each token of a pass follows, if the tokens are not one line but follow several texts or form trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

CacheSlots = npt.NDArray[np.int64]
"""[n] int64: where in the KV cache the n tokens of a text are, in the text's order."""


def behind(text: int) -> int:
    """The number that stands for text number `text` as a parent. It is negative: tokens of the pass count from 0."""
    return ~text


def texts_of(parents: Sequence[int]) -> list[int]:
    """The text that each token is behind."""
    texts: list[int] = []
    for parent in parents:
        texts.append(texts[parent] if parent >= 0 else ~parent)
    return texts


@dataclass(frozen=True)
class Branches:
    """The texts that the KV cache holds, and the parent of each token of a pass.

    A token follows its parent, which is an earlier token of the pass (its number) or a text (`behind` its number).
    """

    texts: Sequence[CacheSlots]
    parents: Sequence[int]  # one for each of the T tokens
    numbers: Sequence[int] | None = None  # of each text: the cache's for its states; None: from 0 on

    def runs(self, first: int = 0) -> list[tuple[int, int]]:
        """(number of a text's states, how many tokens) of those, from number `first` on, that follow one another."""
        numbers = range(len(self.texts)) if self.numbers is None else self.numbers
        of_tokens = [numbers[text] for text in texts_of(self.parents)]
        return [(text, len(list(run))) for text, run in groupby(of_tokens[first:])]

    def places(self, past: int) -> CacheSlots:
        """[past]: where in its texts the token in each of the cache's first slots stands; 0 if it is in none."""
        places = np.zeros(past, np.int64)
        for text in self.texts:  # what texts share begins all of them
            places[text] = np.arange(len(text))
        return places

    def sees(self, past: int) -> npt.NDArray[np.bool_]:
        """[T, past + T] bool: whether each token attends to each of the cache's `past` slots and of the T tokens.

        A token attends to itself and to those before it in its text. SpecInfer (arXiv 2305.09781, section 3) calls
        this tree attention.
        """
        count = len(self.parents)  # T
        sees = np.zeros((count, past + count), np.bool_)
        for token, parent in enumerate(self.parents):
            if parent < 0:
                sees[token, self.texts[~parent]] = True
            else:
                sees[token] = sees[parent]
            sees[token, past + token] = True
        return sees
