"""Sampling: the filters keep what they should, greedy is greedy, a seed repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.header import Drawing
from flashd.engine.decoding.sampling import Sampler, Sampling, greedy_unless, sampling_of
from flashd.errors import UsageError

LOGITS = st.lists(st.floats(-20, 20), min_size=2, max_size=50).map(lambda v: np.array(v, np.float32))


@given(LOGITS)
def test_temperature_zero_takes_the_likeliest(logits: npt.NDArray[Any]) -> None:
    assert Sampler(Sampling()).pick(logits, []) == int(logits.argmax())


@given(LOGITS, st.floats(0.1, 3), st.integers(0, 20), st.floats(0.05, 1), st.floats(0, 0.9))
def test_filters_keep_the_likeliest_and_sum_to_one(
    logits: npt.NDArray[Any],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    sampler = Sampler(Sampling(temperature, top_p, top_k, min_p, seed=1))
    ids, p = sampler.distribution(logits, [])
    full = np.exp(logits.astype(np.float64) - logits.max())
    full /= full.sum()
    assert p.sum() == pytest.approx(1)
    assert (np.diff(p) <= 1e-12).all()
    assert len(ids) <= (top_k or len(logits))
    assert ids[0] == logits.argmax() or logits[ids[0]] == logits.max()
    if top_k == 0:
        assert (full[ids] >= min_p * full.max() * (1 - 1e-6)).all()
        # without its last token the kept set has not reached top_p yet
        assert full[ids[:-1]].sum() < top_p + 1e-6
    assert sampler.pick(logits, []) in ids


TINY = st.sampled_from([5e-324, 1e-300, 1e-40, 1e-38, 0.5])


@given(LOGITS, TINY, TINY, TINY, st.one_of(TINY, st.just(1 - 2**-53)), st.sampled_from([0, 1, 10**30]))
def test_the_tiniest_values_that_are_allowed_draw_a_token(
    logits: npt.NDArray[Any], temperature: float, penalty: float, top_p: float, min_p: float, top_k: int
) -> None:
    sampler = Sampler(Sampling(temperature, top_p, top_k, min_p, penalty, 1, -2.0, logit_bias={0: 100.0, 1: -100.0}))
    for _ in range(3):
        ids, p = sampler.distribution(logits, [0, 1])
        assert p.sum() == pytest.approx(1) and sampler.pick(logits, [0, 1]) in ids


def test_the_last_bits_of_the_logits_change_hardly_any_draw() -> None:
    """They differ with what is in RAM; a text that begins anew is to say the same."""
    noise = np.random.default_rng(5)
    logits = noise.standard_normal(2000).astype(np.float32)
    others = logits + noise.normal(0, 1e-4, 2000).astype(np.float32)
    one, other = (Sampler(Sampling(1.5, seed=7)) for _ in range(2))
    same = sum(one.pick(logits, []) == other.pick(others, []) for _ in range(400))
    assert same >= 390


def test_draws_follow_the_distribution_and_a_seed_repeats() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    draws = [[Sampler(Sampling(1.0, seed=7)).pick(logits, [])] for _ in range(3)]
    assert draws[0] == draws[1] == draws[2]
    sampler = Sampler(Sampling(1.0, seed=3))
    counts = np.bincount([sampler.pick(logits, []) for _ in range(20_000)], minlength=3) / 20_000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.02


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    ids, p = Sampler(Sampling(1e-300, seed=1)).distribution(np.array([1.0, 30.0, 2.0], np.float32), [])
    assert ids[0] == 1 and p.tolist() == [1.0, 0.0, 0.0]


def test_the_penalty_is_for_recent_tokens_only_and_leaves_the_logits_alone() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(Sampling(repeat_penalty=1.5))
    assert sampler.pick(logits, [0]) == 1
    assert sampler.pick(logits, [0] + [2] * 64) == 0
    assert logits.tolist() == [2.0, np.float32(1.9), -1.0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"min_p": 1.0}, "--min-p"),
        ({"repeat_penalty": 0.0}, "--repeat-penalty"),
        ({"temperature": float("nan")}, "--temperature"),
    ],
)
def test_an_option_out_of_range_is_named_with_what_is_allowed(options: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=f"{named}.*allowed is"):
        Sampling(**options)  # type: ignore[arg-type]


def test_each_time_that_a_token_was_said_makes_it_less_likely() -> None:
    logits = np.array([3.0, 2.0, 0.5], np.float32)
    by_times, once = Sampler(Sampling(frequency_penalty=0.6)), Sampler(Sampling(presence_penalty=1.2))
    assert [by_times.pick(logits, [0] * 9) for _ in range(6)] == [0, 0, 1, 0, 1, 0]  # the prompt does not count
    assert [once.pick(logits, []) for _ in range(4)] == [0, 1, 0, 0]


def test_a_bias_is_for_the_tokens_it_names_and_the_logits_stay() -> None:
    logits = np.array([3.0, 2.0, 0.5], np.float32)
    sampler = Sampler(
        Sampling(logit_bias={2: 5.0, 0: -1.5, 9: 100.0}), scores=2
    )  # a draft knows the first tokens only
    assert sampler.pick(logits, []) == 2 and logits.tolist() == [3.0, 2.0, 0.5]
    assert sampler.score is not None and [token for token, _ in sampler.score.top] == [0, 1]
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    assert abs(np.exp(sampler.score.logprob) - p[2]) < 1e-6  # the model's own, before the bias


def test_a_twin_draws_the_same_and_leaves_the_scores_alone() -> None:
    rng = np.random.default_rng(5)
    steps = [rng.standard_normal(40).astype(np.float32) for _ in range(30)]
    sampler = Sampler(Sampling(temperature=1.0, frequency_penalty=1.0, logit_bias={3: 2.0}, seed=1), scores=0)
    for logits in steps[:10]:
        sampler.pick(logits, [])
    twin, score = sampler.twin(), sampler.score
    assert twin is not None
    ahead = [twin.pick(logits, []) for logits in steps[10:]]
    assert sampler.score is score and twin.score == score
    assert [sampler.pick(logits, []) for logits in steps[10:]] == ahead


@pytest.mark.parametrize(
    ("wished", "recommended", "drawn"),
    [
        # nobody says anything: what small models do not loop with
        (Drawing(), None, Sampling(0.3, 0.9, 0, 0.05, 1.1)),
        # the makers do: as they say, and nothing else
        (Drawing(), Drawing(temperature=0.7, top_k=20), Sampling(0.7, top_k=20)),
        (Drawing(), Drawing(repeat_penalty=1.3), Sampling(0.3, 0.9, 0, 0.05, 1.3)),
        # whoever asks or configures does: that wins
        (Drawing(temperature=1.0, top_k=5), Drawing(temperature=0.7, top_p=0.8, top_k=20), Sampling(1.0, 0.8, 5)),
        (Drawing(repeat_penalty=1.0), None, Sampling(0.3, 0.9, 0, 0.05, 1.0)),
        (Drawing(temperature=0), Drawing(temperature=0.7, repeat_penalty=1.2), Sampling()),
        (Drawing(temperature=0, repeat_penalty=1.2), None, Sampling(repeat_penalty=1.2)),
    ],
)
def test_who_says_how_an_answer_is_drawn(wished: Drawing, recommended: Drawing | None, drawn: Sampling) -> None:
    assert sampling_of(wished, recommended) == drawn


def test_a_decision_takes_the_likeliest_unless_somebody_wishes_otherwise() -> None:
    assert greedy_unless(Drawing(), 3) == Sampling(seed=3)
    assert greedy_unless(Drawing(temperature=0.5)) == Sampling(0.5)
