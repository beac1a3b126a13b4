"""Which units a full window keeps. The candidates are the units in the window and those that a token just used.

Frequency keeps those used most often, LeastRecentlyUsed those used last. The paper's window keeps the neurons of the
last tokens ("LLM in a flash", section 3.1).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import Floats

Mask = npt.NDArray[np.bool_]

Numbers = npt.NDArray[np.int64]
"""Numbers of units, or of experts, in any shape."""

FREQUENCY_DECAY = 0.98
"""The part of a frequency that stays from one token to the next.

Of the values from 0.9 to 0.995, 0.95 and 0.98 read fewest bytes on the trace of tests/lab, within 3 % of each other.
To keep the neurons of the last tokens, as the paper does, reads 1 to 20 % more.
"""


class Policy(Protocol):
    """The scores of one layer's units. A window keeps the units with the highest."""

    scores: Floats  # [units]

    def used(self, chosen: Mask) -> None:
        """Is told that a token needed the units that `chosen` [units] marks."""


class Frequency:
    """The Policy that keeps the units used most often. A use counts for less the longer ago it was.

    `rates` [units] is how often each unit was used on sample text. The scores start as if that had gone on for ever.
    """

    def __init__(self, rates: Floats) -> None:
        self.scores: Floats = rates / np.float32(1 - FREQUENCY_DECAY)  # [units]

    def used(self, chosen: Mask) -> None:
        self.scores *= np.float32(FREQUENCY_DECAY)
        self.scores[chosen] += 1


class LeastRecentlyUsed:
    """Keeps the units that were used last. Of those never used it prefers the first, which are the hottest."""

    def __init__(self, units: int) -> None:
        self._used_at: Numbers = -np.arange(units)  # [units]
        self._now = 0

    def use(self, units: Numbers) -> None:
        """Is told that T tokens, one after the other, used `units` [T, K]."""
        for of_token in units:
            self._now += 1
            self._used_at[of_token] = self._now

    def worth(self, units: Numbers, count: int) -> Numbers:
        """[count]: those of `units` [n] that should stay. Of units that were used at the same time, the hotter."""
        return _highest(self._used_at, np.sort(units), count)


def kept(policy: Policy, candidates: Mask, capacity: int) -> Mask:
    """[units] bool: the `capacity` candidates with the highest scores. Of equals the first stay."""
    units = np.flatnonzero(candidates)
    if len(units) > capacity:
        units = _highest(policy.scores, units, capacity)
    out = np.zeros(len(candidates), np.bool_)
    out[units] = True
    return out


def _highest(scores: Floats | Numbers, units: Numbers, count: int) -> Numbers:
    """The `count` of `units` [n], ascending, with the highest scores [all units]. Of equals the first come first."""
    return np.asarray(units[np.argsort(-scores[units], kind="stable")[:count]])


def shares(rates: Floats, slots: int) -> list[int]:
    """How many of `slots` slots each of the L layers gets, so that the fewest misses are to be expected.

    rates: [L, units], how often each unit is used. The `slots` units with the highest rates get a slot each.
    """
    hottest = np.argsort(-rates.reshape(-1), kind="stable")[:slots]
    return [int(n) for n in np.bincount(hottest // rates.shape[1], minlength=len(rates))]
