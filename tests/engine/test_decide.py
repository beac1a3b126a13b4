"""Decisions and schemas: whatever the model would say, the answer is one that was allowed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.decoding.decisions import decide
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.decoding.schemas import Schemas
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Answer, Budget, Engine, Prompts
from flashd.errors import UsageError

END = 0
TOKENS = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


def logits(said: Sequence[int]) -> Floats:
    """Some model: its logits depend on all that was said."""
    return np.random.default_rng([len(said), *said]).standard_normal(8).astype(np.float32)


def by_hand(choices: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Each choice's probability by walking its tokens one by one with the others as the only competition."""
    out = {}
    ends = {name: (*tokens, END) for name, tokens in choices.items()}
    for name in choices:
        p = 1.0
        for depth, token in enumerate(ends[name]):
            said = ends[name][:depth]
            rivals = sorted({t[depth] for t in ends.values() if t[:depth] == said})
            weights = np.exp(logits(said)[rivals].astype(np.float64))
            p *= weights[rivals.index(token)] / weights.sum()
        out[name] = p
    return out


def test_choices_that_differ_late_need_no_depth() -> None:
    same = (1,) * 5000
    decision = decide(logits, {"a": (*same, 2), "b": (*same, 3)}, END, 0.0, None)
    assert decision.text in ("a", "b") and abs(sum(decision.probabilities.values()) - 1) < 1e-9


@given(st.lists(TOKENS, min_size=2, max_size=8, unique=True), st.integers(0, 9))
def test_probabilities_are_those_of_the_forks(lists: list[tuple[int, ...]], seed: int) -> None:
    choices = {str(i): tokens for i, tokens in enumerate(lists)}
    passes = []

    def counted(said: Sequence[int]) -> Floats:
        passes.append(tuple(said))
        return logits(said)

    decision = decide(counted, choices, END, 1.0, seed)
    wanted = by_hand(choices)
    assert decision.text in choices and abs(sum(decision.probabilities.values()) - 1) < 1e-9
    assert all(abs(decision.probabilities[name] - p) < 1e-9 for name, p in wanted.items())
    assert len(passes) == len(set(passes)) <= len(choices) - 1
    assert decide(logits, choices, END, 0, None).text == max(wanted, key=lambda name: wanted[name])


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_the_tiniest_temperature_takes_the_likeliest(temperature: float) -> None:
    choices = {"a": (1,), "b": (2,), "c": (3, 4)}
    for seed in range(5):
        assert decide(logits, choices, END, temperature, seed).text == decide(logits, choices, END, 0, None).text


def test_two_choices_that_differ_at_once_need_one_pass() -> None:
    passes: list[tuple[int, ...]] = []

    def counted(said: Sequence[int]) -> Floats:
        passes.append(tuple(said))
        return logits(said)

    decide(counted, {"a": (1, 2, 3), "b": (4, 5)}, END, 0, None)
    assert passes == [()]


def test_what_cannot_be_chosen_from() -> None:
    for choices in ({}, {"a": (1,)}, {"a": (1,), "b": (1,)}, {str(i): (i,) for i in range(65)}):
        with pytest.raises(UsageError):
            decide(logits, choices, END, 0, None)


@pytest.fixture(scope="module")
def engine(packed: dict[str, Path]) -> Iterator[tuple[Engine, Prompts]]:
    with Bundle(packed["int4"]) as bundle:
        prompts = Prompts(bundle)
        with Engine(bundle, Budget(None, 256, 2)) as engine:
            yield engine, prompts


def test_a_thousand_decisions_are_valid_and_as_likely_as_said(tiny_bundle: Path) -> None:
    with Bundle(tiny_bundle) as bundle:
        prompts = Prompts(bundle)
        tokens = prompts.tokens([Message("user", "The soil is dry. Should I water, wait, or wait longer?")])
        choices = prompts.choices(["water", "wait", "wait longer"])
        drawn: Counter[str] = Counter()
        probabilities: dict[str, float] = {}
        with Engine(bundle, Budget(None, 256, 2)) as engine:
            for seed in range(1000):
                decision = engine.choose(tokens, choices, Sampling(temperature=1.0, seed=seed), Answer())
                drawn[decision.text] += 1
                probabilities = decision.probabilities
    assert set(drawn) <= set(choices) and sum(drawn.values()) == 1000
    for name, p in probabilities.items():
        # five standard deviations of a count of a thousand
        assert abs(drawn[name] - 1000 * p) <= 5 * (1000 * p * (1 - p)) ** 0.5 + 1


def test_answers_follow_a_schema(engine: tuple[Engine, Prompts]) -> None:
    pytest.importorskip("llguidance")
    answerer, prompts = engine
    schemas = Schemas(answerer.bundle)
    schema = {
        "type": "object",
        "properties": {"level": {"type": "integer", "minimum": 0, "maximum": 9}, "pump": {"enum": ["on", "off"]}},
        "required": ["level", "pump"], "additionalProperties": False,
    }  # fmt: skip
    tokens = prompts.tokens([Message("user", "Set the pump.")])
    for seed in range(20):
        answer, sampling = Answer(), Sampling(temperature=3.0, seed=seed)
        speech = answerer.begin(tokens, sampling, answer, limit=60, constraint=schemas.compile(schema))
        list(answerer.pieces(speech))
        found = json.loads(answer.text)
        assert set(found) == {"level", "pump"} and 0 <= found["level"] <= 9 and found["pump"] in ("on", "off")
    for bad in ({"type": "nonsense"}, {"$ref": "https://example.org/x"}, {"enum": ["x" * 20_000]}):
        with pytest.raises(UsageError, match="schema"):
            schemas.compile(bad)
