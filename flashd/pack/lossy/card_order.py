"""Where a layer's neurons lie on the card: those that are read together next to each other.

The hottest come first, which windows hold anyway; behind them a path from each neuron to the one that most often
fires beside it, as in RIPPLE (arXiv 2410.19274).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

HOT = 4
"""The hottest one in so many neurons is laid out by its rate alone."""

TOKENS = 8192
"""Tokens in which neurons are counted together: the counts are as large as neurons are squared, whatever this is."""


def card_order(fired: Mask) -> Numbers:
    """The numbers [F] of neurons in the order of the card, from which of them fired in each token [N, F]."""
    by_rate = np.argsort(-fired.mean(0), kind="stable")
    hot = len(by_rate) // HOT
    return np.concatenate([by_rate[:hot], coactivation_path(fired[-TOKENS:], by_rate[hot:])])


def filled(order: Numbers, neurons: int) -> Numbers:
    """The order of an FFN's neurons with those behind them, so many in all, that only fill its last block."""
    return np.concatenate([order, np.arange(len(order), neurons)])


def coactivation_path(fired: Mask, neurons: Numbers) -> Numbers:
    """`neurons` on a path that begins with the first and goes on to that which fired most often with the last.

    Often is by Jaccard's measure, tokens with both in parts of tokens with either: a neuron that always fires is
    nobody's neighbour.
    """
    seen = fired[:, neurons].astype(np.float32)
    both = seen.T @ seen
    alone = np.diagonal(both)
    close = both / np.maximum(alone[:, None] + alone[None, :] - both, 1)
    path = np.empty(len(neurons), np.int64)
    left = np.ones(len(neurons), np.bool_)
    at = 0
    for i in range(len(path)):
        path[i], left[at] = at, False
        if i + 1 < len(path):
            at = int(np.where(left, close[at], -1).argmax())
    return neurons[path]
