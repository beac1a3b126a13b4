"""A card for every test, behind each of the two layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.layers import Card, Seam, fuse


@pytest.fixture(params=[pytest.param("fuse", marks=pytest.mark.fuse), "seam"])
def card(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Card]:
    """The tiny bundle on a card whose faults the test decides."""
    if request.param == "seam":
        yield Card(Seam(tmp_path, monkeypatch), tiny_bundle)
    else:
        with fuse(tmp_path) as layer:
            yield Card(layer, tiny_bundle)
