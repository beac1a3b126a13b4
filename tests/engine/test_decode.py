"""Drafts change what a pass looks at, never what is said; the cache holds what was said and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.reader import Bundle
from flashd.engine.card import READ_BYTES
from flashd.engine.decode import Conversation, Figures, Model
from flashd.engine.plan import BUFFERS, PREFILL_TOKENS
from flashd.engine.sample import Sampler, Sampling
from flashd.engine.speculate import BEAM, NODES, STEPS, Draft, Guesses, Pace, Tree, lookup
from flashd.errors import UsageError
from tests.engine.test_paths import opened, tokens_of
from tests.reference import relative


def said(
    model: Model, prompt: list[int], sampling: Sampling, drafts: bool, limit: int = 40
) -> tuple[list[int], Figures]:
    model.cache.truncate(0)
    figures = Figures()
    talk = Conversation(model)
    return list(
        talk.generate(prompt, Sampler(sampling), limit=limit, eos=(), figures=figures, drafts=drafts)
    ), figures


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.95, repeat_penalty=1.1, seed=5)])
def test_the_same_seed_says_the_same_with_drafts_and_without(
    packed: dict[str, Path], sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this file is read at memory's speed, at which a draft is worth nothing and none would be made
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes: steps < 3)
    question = "<|im_start|>user\nName the days of the week.<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokens_of(packed["int4"], question)
    with opened(packed["int4"], 0.5) as model:
        without, plain = said(model, prompt, sampling, drafts=False)
        withs, figures = said(model, prompt, sampling, drafts=True)
    assert withs == without
    assert plain.drafted == 0 and plain.passes == 39
    assert figures.drafted > 0 and figures.passes < 39
    assert figures.passes + figures.accepted == 39


def test_what_the_text_repeats_is_looked_up(packed: dict[str, Path]) -> None:
    """With nothing in RAM to draft with, the text itself is left."""
    lines = "".join(f"item {i}: apples, pears, plums\n" for i in range(4))
    prompt = tokens_of(packed["int4"], lines + "item 4: app")
    with opened(packed["int4"], 0.0) as model:
        assert model.pages and not model.drafts
        without, _ = said(model, prompt, Sampling(), drafts=False, limit=16)
        withs, figures = said(model, prompt, Sampling(), drafts=True, limit=16)
    assert withs == without
    assert figures.accepted >= 3 and figures.passes + figures.accepted == 15


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 6))
def test_a_lookup_is_what_followed_the_longest_end(tokens: list[int], most: int) -> None:
    found = lookup(tokens, most)
    assert len(found) <= most
    followed = [
        tokens[at + n : at + n + most]
        for n in (4, 3, 2)
        for at in range(len(tokens) - n - 1, -1, -1)
        if tokens[at : at + n] == tokens[-n:]
    ]
    assert found == (followed[0] if followed else [])


def test_a_tree_s_branches_are_worth_what_the_same_tokens_in_line_are(packed: dict[str, Path]) -> None:
    """Each node sees its ancestors alone, wherever the cache keeps it; one that is said moves into line."""
    prompt = list(range(100, 130))
    tree = Tree([7, 8, 9, 10, 11, 13, 12], [0, 0, 1, 2, 0, 1, 0], [1.0] * 7)
    line = [[7], [7, 8], [7, 8, 9], [7, 8, 9, 10], [7, 11], [7, 8, 13], [7, 12]]
    with opened(packed["int4"], 0.5) as model:
        model.forward(np.array(prompt), np.array([0]))
        wanted = np.arange(len(tree.tokens))
        checked = model.forward(np.array(tree.tokens), wanted, parents=tree.parents)
        for node, tokens in enumerate(line):
            model.cache.truncate(len(prompt))
            alone = model.forward(np.array(tokens), np.array([len(tokens) - 1]))[0]
            assert relative(checked[node], alone) < 1e-3, node
        model.cache.truncate(len(prompt))
        model.forward(np.array(tree.tokens), wanted, parents=tree.parents)
        model.cache.move(len(prompt) + 5, len(prompt) + 2)  # 13 behind 8
        model.cache.truncate(len(prompt) + 3)
        after = model.forward(np.array([20]), np.array([0]))[0]
        model.cache.truncate(len(prompt))
        model.forward(np.array([7, 8, 13]), np.array([0]))
        assert relative(after, model.forward(np.array([20]), np.array([0]))[0]) < 1e-3


GUESSES = st.lists(
    st.tuples(st.integers(0, 9), st.floats(0.001, 1)), min_size=1, max_size=4, unique_by=lambda g: g[0]
)


@given(st.lists(st.lists(GUESSES, min_size=BEAM, max_size=BEAM), max_size=6), st.lists(st.integers(0, 9), max_size=5),
       st.floats(0.1, 1), st.integers(1, NODES), st.integers(1, 5))  # fmt: skip
def test_a_draft_s_likeliest_nodes_are_a_tree(
    levels: list[list[list[tuple[int, float]]]], found: list[int], trust: float, most: int, deepest: int
) -> None:
    draft = Draft(99, trust)
    draft.follow(found[:deepest], 0.5)
    asked: list[int] = []
    for level in levels:
        nodes = draft.likeliest(BEAM, deepest)
        if not nodes:
            break
        tokens, parents = draft.asked(nodes)
        asked += tokens
        assert len(parents) == len(asked) and all(p < i for i, p in enumerate(parents[1:], 1))
        for guesses, node in zip(level, nodes, strict=False):
            total = sum(odds for _, odds in guesses)
            draft.grow([node], Guesses(np.array([[t for t, _ in guesses]]),
                                       np.array([[odds / total for _, odds in guesses]], np.float32)))  # fmt: skip
    tree = draft.tree(most)
    assert tree.tokens[0] == 99 and len(tree.tokens) <= most
    depths = [0]
    for node in range(1, len(tree.tokens)):
        parent = tree.parents[node]
        assert parent < node and tree.odds[node] <= tree.odds[node - 1] <= 1
        assert tree.child(parent, tree.tokens[node]) == node
        depths.append(depths[parent] + 1)
    assert max(depths) <= deepest
    assert sum(tree.odds) == pytest.approx(draft.expected(most))
    assert tree.child(0, 100) is None


def test_guesses_are_the_likeliest_with_their_odds() -> None:
    logits = np.array([[0, 3, 1, 2], [5, 0, 0, 5]], np.float32)
    guesses = Guesses.of(logits, 2)
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert guesses.tokens[0].tolist() == [1, 3] and sorted(guesses.tokens[1].tolist()) == [0, 3]
    assert np.allclose(guesses.odds, np.take_along_axis(odds, guesses.tokens, 1))
    assert Guesses.of(logits, 9).tokens.shape == (2, 4)


def test_guesses_behind_several_tokens_are_those_behind_each(packed: dict[str, Path]) -> None:
    """A tree that is drafted step by step: what came before is in the cache, branches do not see each other."""
    prompt, tokens, parents = list(range(100, 130)), [7, 8, 11, 9, 12], [0, 0, 0, 1, 2]
    with opened(packed["int4"], 0.5) as model:
        model.forward(np.array(prompt), np.array([0]))
        by_steps = [model.draft(np.array(tokens[a:b]), parents[:b]) for a, b in ((0, 1), (1, 3), (3, 5))]
        for line, guesses in (([7, 8, 9], 0), ([7, 11, 12], 1)):
            model.cache.truncate(len(prompt))
            alone = [model.draft(np.array([t]), [0, *range(i)]) for i, t in enumerate(line)]
            assert np.array_equal(by_steps[2].tokens[guesses][:4], alone[-1].tokens[0][:4])
            assert np.allclose(by_steps[2].odds[guesses], alone[-1].odds[0], rtol=1e-3, atol=1e-4)


def test_everything_pinned_drafts_nothing(packed: dict[str, Path]) -> None:
    with opened(packed["int4"], 1.0) as model:
        assert not model.drafts
        _, figures = said(model, [1, 2, 3], Sampling(), drafts=True, limit=5)
    assert figures.drafted == 0 and figures.decode_card_bytes == 0


@pytest.mark.parametrize("taken", [1, 2, 3, 7])
def test_an_answer_broken_off_leaves_the_cache_with_what_was_said(tiny_bundle: Path, taken: int) -> None:
    prompt = [10, 20, 30]
    with opened(tiny_bundle, 0.5, 64) as model:
        talk = Conversation(model)
        tokens = talk.generate(prompt, Sampler(Sampling()), limit=30, eos=(), figures=Figures())
        out = [next(tokens) for _ in range(taken)]
        tokens.close()
        # the last token said has not been through the model yet
        assert talk.tokens == (prompt + out)[:-1]
        assert model.cache.length == len(talk.tokens)
        figures = Figures()
        again = list(talk.generate(prompt + out, Sampler(Sampling()), limit=4, eos=(), figures=figures))
        assert figures.reused_tokens == len(prompt) + taken - 1
        assert again == said(model, prompt, Sampling(), False, taken + 4)[0][taken:]


def test_a_prompt_as_long_as_the_context_is_refused(tiny_bundle: Path) -> None:
    with opened(tiny_bundle, 0.5, 16) as model:
        with pytest.raises(UsageError, match="16 tokens and the context room for 15"):
            said(model, list(range(16)), Sampling(), False)
        with pytest.raises(UsageError, match="empty"):
            said(model, [], Sampling(), False)
        for drafts in (False, True):
            assert len(said(model, list(range(15)), Sampling(), drafts)[0]) == 1
            assert len(said(model, list(range(10)), Sampling(), drafts)[0]) == 6
            assert model.cache.length <= 16


def test_prefill_is_one_pass_for_a_chunk(packed: dict[str, Path]) -> None:
    with Bundle(packed["int4"]) as bundle:
        ffn = sum(s.length for s in bundle.header.sections if s.name.endswith(".ffn"))
    ahead = BUFFERS * READ_BYTES
    with opened(packed["int4"], 0.0) as model:
        for length, passes in ((2, 1), (PREFILL_TOKENS, 1), (PREFILL_TOKENS + 1, 2)):
            _, figures = said(model, list(range(100, 100 + length)), Sampling(), False, 1)
            assert abs(figures.prefill_card_bytes - passes * ffn) <= ahead


def test_eos_ends_the_answer(tiny_bundle: Path) -> None:
    with opened(tiny_bundle, 0.5, 64) as model:
        out, _ = said(model, [10, 20], Sampling(), True, 10)
        talk, figures = Conversation(model), Figures()
        model.cache.truncate(0)
        stopped = list(talk.generate([10, 20], Sampler(Sampling()), limit=10, eos=(out[3],), figures=figures))
    assert stopped == out[: out.index(out[3])] and figures.finish == "stop"


def grown(odds: float, trust: float = 1.0) -> tuple[Draft, list[int]]:
    """A draft after one step, and what would be drafted next."""
    draft = Draft(1, trust)
    draft.grow([0], Guesses(np.array([[2, 3, 4]]), np.array([[odds, (1 - odds) / 2, (1 - odds) / 2]], np.float32)))
    return draft, draft.likeliest(BEAM, 9)


def test_drafts_go_on_while_they_are_cheap_and_likely() -> None:
    draft, nodes = grown(0.8)
    pace = Pace()
    assert [pace.goes_on(draft, steps, nodes) for steps in (0, STEPS - 1, STEPS)] == [True, True, False]
    pace.measured_draft(0.2)
    pace.measured_pass(10.0)
    assert pace.goes_on(draft, 1, nodes)
    for _ in range(60):
        pace.measured_draft(20.0)
    assert not pace.goes_on(draft, 1, nodes)
    # once in a while it is tried whether it has become better
    assert 0 < sum(pace.goes_on(draft, 0, nodes) for _ in range(64)) < 8
    dear = Pace()
    dear.measured_draft(2.0)
    dear.measured_pass(10.0)
    assert dear.goes_on(*(grown(0.9)[0], 1, [1])) and not dear.goes_on(*(grown(0.02, 0.1)[0], 1, [1]))


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=80))
def test_trust_follows_what_was_promised(told: list[tuple[bool, float]]) -> None:
    pace = Pace()
    for right, promised in told:
        before = pace.trust
        pace.measured_guesses(right, promised)
        assert 0 < pace.trust <= 1
        assert (pace.trust >= before) if right else (pace.trust <= before)
