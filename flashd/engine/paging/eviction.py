"""What a full window keeps: of what was just used and what was there, that of the highest score or the latest use."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashd.bundle.row_kinds import Floats

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

MEMORY = 0.98
"""How much of a frequency stays from one token to the next.

On the trace of tests/lab, of 0.9 to 0.995, 0.95 and 0.98 read least, within 3 % of each other. Keeping the neurons
of the last tokens, as many as fit, as the paper does, reads 1 to 20 % more.
"""


class Policy(Protocol):
    """The scores [units] of one layer's units. The higher, the longer one is kept."""

    scores: Floats

    def used(self, chosen: Mask) -> None:
        """A token needed the units that `chosen` [units] names."""


class Frequency:
    """Keeps what was used most often, the further back the less it counts."""

    def __init__(self, rates: Floats) -> None:
        self.scores: Floats = rates / np.float32(1 - MEMORY)  # as if it had always gone so

    def used(self, chosen: Mask) -> None:
        self.scores *= np.float32(MEMORY)
        self.scores[chosen] += 1


class LeastRecentlyUsed:
    """Keeps those that were used last; of those that never were, the first ones, which are the hottest."""

    def __init__(self, units: int) -> None:
        self._used_at: Numbers = -np.arange(units)
        self._now = 0

    def use(self, units: Numbers) -> None:
        """Each of T tokens, one after the other, used `units` [T, K]."""
        for of_token in units:
            self._now += 1
            self._used_at[of_token] = self._now

    def worth(self, units: Numbers, count: int) -> Numbers:
        """The `count` of `units` that should stay when there is no room for all; a tie is the hotter one's."""
        return _highest(self._used_at, np.sort(units), count)


def kept(policy: Policy, candidates: Mask, capacity: int) -> Mask:
    """[units]: the `capacity` candidates of the highest scores, the first of equals."""
    units = np.flatnonzero(candidates)
    if len(units) > capacity:
        units = _highest(policy.scores, units, capacity)
    out = np.zeros(len(candidates), np.bool_)
    out[units] = True
    return out


def _highest(scores: Floats | Numbers, units: Numbers, count: int) -> Numbers:
    """The `count` of `units`, ascending, of the highest scores, the first of equals first."""
    return np.asarray(units[np.argsort(-scores[units], kind="stable")[:count]])


def shares(rates: Floats, slots: int) -> list[int]:
    """How many of `slots` each layer gets, so that as few misses as possible are to be expected.

    rates: [L, units], how often each unit is used. Each slot goes to the unit of the highest rate of all layers.
    """
    hottest = np.argsort(-rates.reshape(-1), kind="stable")[:slots]
    return [int(n) for n in np.bincount(hottest // rates.shape[1], minlength=len(rates))]
