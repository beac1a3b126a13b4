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
from flashd.engine.speculate import MOST, DraftLength, Tree, lookup
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
    monkeypatch.setattr(DraftLength, "choose", lambda self: 3)
    question = "<|im_start|>user\nName the days of the week.<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokens_of(packed["int4"], question)
    with opened(packed["int4"], 0.5) as model:
        without, plain = said(model, prompt, sampling, drafts=False)
        withs, figures = said(model, prompt, sampling, drafts=True)
    assert withs == without
    assert plain.drafted == 0 and plain.passes == 39
    assert figures.drafted > 0 and figures.passes < 39
    assert figures.passes + figures.accepted == 39


def test_what_the_text_repeats_is_looked_up(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing in RAM to draft with, the text itself is left."""
    monkeypatch.setattr(DraftLength, "choose", lambda self: 4)
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
    tree = Tree.grown(7, [[8, 11, 12], [9, 13], [10]])
    assert tree.tokens == [7, 8, 9, 10, 11, 13, 12] and tree.parents == [0, 0, 1, 2, 0, 1, 0] and tree.links == 3
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


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True), max_size=5), st.integers(1, 20))
def test_a_tree_is_a_chain_with_branches(places: list[list[int]], most: int) -> None:
    tree = Tree.grown(99, places, most)
    assert len(tree.tokens) == max(len(places) + 1, min(most, 1 + sum(map(len, places))))
    assert tree.tokens[: tree.links + 1] == [99, *(guesses[0] for guesses in places)]
    for node in range(1, len(tree.tokens)):
        assert tree.parents[node] < node and tree.tokens[node] in places[tree.parents[node]]
        assert tree.child(tree.parents[node], tree.tokens[node]) == node
    assert tree.child(0, 100) is None and not tree.is_guessed(tree.links)


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


@given(st.floats(0.001, 10), st.floats(0.001, 10), st.lists(st.booleans(), max_size=40))
def test_draft_length_is_bounded_and_follows_acceptance(draft: float, full: float, right: list[bool]) -> None:
    length = DraftLength()
    length.measured_draft(1, draft)
    length.measured_pass(full)
    for r in right:
        length.measured_token(r)
        assert 0 <= length.choose() <= MOST


def test_draft_length_grows_when_drafts_are_right_and_cheap() -> None:
    length = DraftLength()
    length.measured_draft(2, 0.02)
    length.measured_pass(10.0)
    for _ in range(30):
        length.measured_token(True)
    assert length.choose() == MOST
    for _ in range(120):
        length.measured_token(False)
    assert np.mean([length.choose() for _ in range(32)]) < 1
