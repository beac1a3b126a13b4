"""The order of a layer's neurons on the card, if neurons are selected. Those that are read together are neighbours.

The hottest neurons come first: windows hold them anyway. Behind them comes a path that leads from each neuron to the
one that most often fires in the same tokens, as in RIPPLE (arXiv 2410.19274).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

HOT = 4
"""One neuron in so many, the hottest, is ordered by its rate alone."""

TOKENS = 8192
"""The most tokens in which pairs of neurons are counted."""


def card_order(fired: Mask) -> Numbers:
    """[F]: the neurons in the order of the card. fired: [N, F], which neurons fired in each token."""
    by_rate = np.argsort(-fired.mean(0), kind="stable")
    hot = len(by_rate) // HOT
    return np.concatenate([by_rate[:hot], coactivation_path(fired[-TOKENS:], by_rate[hot:])])


def filled(order: Numbers, neurons: int) -> Numbers:
    """[neurons]: the order [F] of an FFN's own neurons, and behind them those that only fill its last block."""
    return np.concatenate([order, np.arange(len(order), neurons)])


def coactivation_path(fired: Mask, neurons: Numbers) -> Numbers:
    """[n]: `neurons` [n] in the order of a path. It begins with the first and goes on to the closest neuron left.

    How close two neurons are is Jaccard's measure: the number of tokens in which both fired, divided by the number in
    which either did. So a neuron that always fires is close to none. fired: [N, F].
    """
    seen = fired[:, neurons].astype(np.float32)  # [N, n]
    both = seen.T @ seen  # [n, n]
    alone = np.diagonal(both)  # [n]
    close = both / np.maximum(alone[:, None] + alone[None, :] - both, 1)  # [n, n]
    path = np.empty(len(neurons), np.int64)
    left = np.ones(len(neurons), np.bool_)
    at = 0
    for i in range(len(path)):
        path[i], left[at] = at, False
        if i + 1 < len(path):
            at = int(np.where(left, close[at], -1).argmax())
    return neurons[path]
