"""The rate to expect of a plan, by what the machine multiplies and opens in a second, and what its card reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import flashd
from flashd.bundle.reader import Bundle
from flashd.engine import expected as measuring
from flashd.engine.engine import rate_of
from flashd.engine.expected import measure
from flashd.engine.paging.card_speed import CardSpeed, remember
from flashd.engine.planning.held import WEIGHTS
from flashd.engine.planning.plan import Plan, make_plan
from flashd.engine.planning.rates import ASSUMED, BETWEEN, CARD, Rates, expected, remembered_rates

FAST = Rates(streamed=1e12, multiplied=1e12, guessed=1e12, checked=1e12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def whole(tiny_bundle: Path) -> Plan:
    with Bundle(tiny_bundle) as bundle:
        return make_plan(bundle.header, memory=1 << 30, context=64, threads=1, base=0)


@pytest.fixture
def paged(whole: Plan) -> Plan:
    """A pass reads 90 MB, and 30 less while a text is short. A quarter of the groups is in RAM then."""
    return replace(
        whole, resident=False, parts={"attention": 10_000_000, "pinned neurons": 10_000_000},
        group_bytes=(5_000_000, 5_000_000), pinned=(1, 1), groups=(8, 8), lent_groups=2, card_bytes=90_000_000,
        lent_card_bytes=30_000_000,
    )  # fmt: skip


def test_twice_the_weights_take_twice_the_time(whole: Plan) -> None:
    between = BETWEEN * len(whole.groups)
    for rate in (1e6, 2e6):
        seconds = 1 / expected(whole, replace_rate(FAST, multiplied=rate), None) - between
        assert seconds == pytest.approx(whole.parts[WEIGHTS] / rate)


def replace_rate(rates: Rates, **changed: float) -> Rates:
    return Rates(**({name: getattr(rates, name) for name in Rates.__struct_fields__} | changed))


def test_the_slower_of_card_and_processor_counts(paged: Plan) -> None:
    guessed = 5 * 4 / 16
    tokens = 1 + guessed * 15 / 16  # after four steps
    assert expected(paged, FAST, 60e6) == pytest.approx(tokens, 1e-3)
    assert expected(paged, FAST, None) == expected(paged, FAST, CARD)
    assert expected(paged, replace_rate(FAST, streamed=60e6), 60e6) == pytest.approx(tokens, 1e-3)
    assert expected(paged, replace_rate(FAST, streamed=30e6), 60e6) == pytest.approx(tokens / 2, 1e-3)
    # the 30 MB in RAM and the 60 MB that stream past are multiplied with all tokens of the pass
    assert expected(paged, replace_rate(FAST, checked=30e6), 60e6) == pytest.approx(tokens / 3, 1e-3)
    rates = [(1 + guessed * (1 - 0.5**steps)) / (1 + steps / 2) for steps in range(1, 5)]
    assert expected(paged, replace_rate(FAST, guessed=60e6), 60e6) == pytest.approx(max(rates), 1e-3)
    # guesses that cost more than they give are not made
    assert expected(paged, replace_rate(FAST, guessed=1e6), 60e6) == pytest.approx(60 / 90, 1e-3)


def test_of_experts_and_of_neurons_that_are_selected_no_guesses_are_expected(paged: Plan) -> None:
    for plan in (replace(paged, used=0.25), replace(paged, slots=(10, 10))):
        assert expected(plan, FAST, 45e6) == pytest.approx(0.5, 1e-3)


@pytest.mark.parametrize("resident", [True, False])
def test_a_machine_is_measured_once_in_the_arithmetic_of_the_plan(
    resident: bool, tiny_bundle: Path, whole: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(whole, resident=resident)
    with Bundle(tiny_bundle) as bundle:
        assert remembered_rates(bundle.header, plan) is None
        assert rate_of(bundle, plan) == expected(plan, ASSUMED, None)
        measure(bundle, plan)
        rates = remembered_rates(bundle.header, plan)
        assert rates is not None and all(0 < getattr(rates, name) < 1e12 for name in Rates.__struct_fields__)
        assert remembered_rates(bundle.header, replace(plan, resident=not resident)) is None
        assert remembered_rates(bundle.header, replace(plan, threads=2)) is None
        monkeypatch.setattr(measuring, "_measured", None)
        measure(bundle, plan)
        remember(tiny_bundle, CardSpeed(bandwidth=90e6, random_reads={4096: 100.0}, when=0.0))
        assert rate_of(bundle, plan) == expected(plan, rates, 90e6)
        monkeypatch.setattr(flashd, "__version__", "99.0")  # another one may be faster
        assert remembered_rates(bundle.header, plan) is None
