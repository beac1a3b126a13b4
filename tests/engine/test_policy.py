"""What stays in a window when there is no room for all."""

from __future__ import annotations

import numpy as np

from flashd.engine.paging.eviction import LeastRecentlyUsed


def test_before_any_use_the_first_are_worth_most() -> None:
    assert LeastRecentlyUsed(6).worth(np.array([4, 0, 5, 2]), 2).tolist() == [0, 2]


def test_what_was_used_last_stays_and_of_equals_the_hotter() -> None:
    recent = LeastRecentlyUsed(6)
    recent.use(np.array([[5, 3], [4, 3], [1, 5]]))
    assert recent.worth(np.arange(6), 6).tolist() == [1, 5, 3, 4, 0, 2]
    recent.use(np.array([[2, 4]]))
    assert recent.worth(np.array([0, 1, 3, 4]), 2).tolist() == [4, 1]
    assert recent.worth(np.array([3]), 0).tolist() == []
