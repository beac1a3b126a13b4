"""The rate that a plan lets expect: what is in RAM at a measured rate, what is not at the card's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashd.bundle.reader import Bundle
from flashd.engine import expected
from flashd.engine.expected import tokens_per_second
from flashd.engine.paging.card_speed import CardSpeed, remember
from flashd.engine.planning.plan import WEIGHTS, make_plan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_twice_the_weights_take_twice_the_time(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "_multiplied_per_second", lambda bundle, plan: 1e9)
    with Bundle(tiny_bundle) as bundle:
        plan = make_plan(bundle.header, memory=1 << 30, context=64, threads=1, base=0)
        assert plan.resident and plan.parts[WEIGHTS] > 0
        assert tokens_per_second(bundle, plan) == pytest.approx(1e9 / plan.parts[WEIGHTS])


@pytest.mark.parametrize("resident", [True, False])
def test_the_rate_is_measured_in_the_arithmetic_of_the_plan(resident: bool, tiny_bundle: Path) -> None:
    with Bundle(tiny_bundle) as bundle:
        plan = make_plan(bundle.header, memory=1 << 30, context=64, threads=1, base=0)
        rate = tokens_per_second(bundle, replace(plan, resident=resident))
        assert rate is not None and 0 < rate < 1e7


def test_what_pages_is_as_fast_as_its_card_or_slower(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bundle(tiny_bundle) as bundle:
        whole = make_plan(bundle.header, memory=1 << 30, context=64, threads=1, base=0)
        plan = replace(whole, resident=False, card_bytes=90_000_000)
        monkeypatch.setattr(expected, "_multiplied_per_second", lambda bundle, plan: 1e9)
        assert tokens_per_second(bundle, plan) is None
        remember(tiny_bundle, CardSpeed(bandwidth=45e6, random_reads={4096: 100.0}, when=0.0))
        assert tokens_per_second(bundle, plan) == pytest.approx(0.5)
        monkeypatch.setattr(expected, "_multiplied_per_second", lambda bundle, _: plan.parts[WEIGHTS] / 4)
        assert tokens_per_second(bundle, plan) == pytest.approx(0.25)
