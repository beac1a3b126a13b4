"""Which units of a window are worth their place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


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
        return np.asarray(units[np.lexsort((units, -self._used_at[units]))[:count]])
