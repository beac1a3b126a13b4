"""How many guesses a pass checks does not depend on this machine's speed here: tests count passes."""

from __future__ import annotations

import pytest

from flashd.engine.decoding.drafting.drafts import Draft
from flashd.engine.decoding.drafting.pace import Pace


@pytest.fixture(autouse=True)
def all_guesses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are made are checked, but in tests of the pace itself."""

    def count(_pace: Pace, draft: Draft, _least: int, most: int, _steps: int, _ahead: bool) -> int:
        return min(most, len(draft))

    if "as_pay" not in request.node.name:
        monkeypatch.setattr(Pace, "count", count)
