"""What passes found likely behind tokens is tried again, in trees that are wider than the rows of logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafting.drafts import Draft
from flashd.engine.decoding.drafting.followers import FOLLOWERS, MOST_KNOWN, STEP, Followers
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.line import Figures
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.branches import Branches, behind
from flashd.engine.model.contract import Tokens
from flashd.engine.model.sizes import LOGIT_ROWS, NODES, TREE_NODES
from flashd.engine.planning.parts import LIKELY, most_nodes
from tests.engine.one_text import generate
from tests.engine.test_decode import said
from tests.engine.test_paths import plan, tokens_of

PROMPT = "<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n"


def known(*follow: tuple[int, list[int]]) -> Followers:
    """Tokens, and the likeliest behind each."""
    followers = Followers()
    for token, likeliest in follow:
        logits = np.zeros((1, 20), np.float32)
        logits[0, likeliest] = np.arange(len(likeliest), 0, -1)
        followers.learn([token], logits)
    return followers


def test_the_likeliest_are_kept_in_order_and_the_oldest_go() -> None:
    followers = known((7, [3, 1, 2, 5]), (8, [9, 4, 6, 10]))
    assert list(followers.of(7)) == [3, 1, 2, 5] and list(followers.of(9)) == []
    followers.learn([7], np.array([[0.0, 2.0, 1.0]], np.float32))  # of three tokens there are no four
    assert list(followers.of(7)) == [1, 2, 0, 3, 5]
    followers = known((7, [3, 1, 2, 5]), (7, [6, 3, 8, 9]), (7, [10, 11, 12, 13]))
    assert list(followers.of(7)) == [10, 11, 12, 13, 6, 3, 8, 9]
    few = np.zeros((MOST_KNOWN, 9), np.float32)
    followers.learn(range(100, 99 + MOST_KNOWN), few[1:])
    assert followers.of(7)
    followers.learn([100, 1, 2], few[:3])  # those seen again stay
    assert not followers.of(7) and not followers.of(101) and followers.of(100) and followers.of(102)


def test_a_rank_is_trusted_as_often_as_it_is_right() -> None:
    followers = Followers()
    followers.measured({0: 5, 2: 9}, 9)
    assert followers.rates[0] == FOLLOWERS[0] * (1 - STEP) and followers.rates[1] == FOLLOWERS[1]
    assert followers.rates[2] == FOLLOWERS[2] + STEP * (1 - FOLLOWERS[2])
    for _ in range(200):
        followers.measured({0: 5}, 5)
    assert 0.99 < followers.rates[0] <= 1


def test_other_guesses_come_first() -> None:
    draft = Draft([1], [9], 1.0)
    draft.follow(0, [4], 0.75)
    draft.recycle(known((1, [4, 6, 2, 3]), (4, [1, 5, 7, 8])), 16)
    trees = draft.trees(16)
    right, missed = trees.child(0, 4), trees.child(0, 6)
    assert right is not None and missed is not None
    # the first of the followers was guessed already; the others have what is left of the odds
    assert trees.ranks[right] is None and trees.odds[right] == 0.75
    assert trees.ranks[missed] == 1 and trees.odds[missed] == 0.25 * FOLLOWERS[1]
    assert trees.promised(0) == 0.75 and trees.recycled(0)[1] == 6
    # and behind a guess there are followers too
    again = trees.child(right, 1)
    assert again is not None and trees.ranks[again] == 0 and trees.odds[again] == 0.75 * FOLLOWERS[0]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), min_size=8, max_size=8)), max_size=6),
    st.lists(st.integers(0, 5), max_size=3), st.integers(0, 4), st.integers(1, TREE_NODES),
)  # fmt: skip
def test_trees_stay_trees(follow: list[tuple[int, list[int]]], found: list[int], room: int, most: int) -> None:
    followers = Followers()
    for token, order in follow:
        followers.learn([token], np.array([order], np.float32))
    draft = Draft([0, 1], [room, 1], 1.0)
    draft.follow(0, found[:room], 0.6)
    draft.recycle(followers, most)
    trees = draft.trees(most)
    depths: list[int] = []
    for node, parent in enumerate(trees.parents):
        assert parent < node
        depths.append(0 if parent < 0 else depths[parent] + 1)
        children = [i for i, of in enumerate(trees.parents) if of == node]
        assert sum(trees.odds[i] for i in children) <= trees.odds[node] + 1e-9
        assert len({trees.tokens[i] for i in children}) == len(children)
    assert max(depths) <= max(room, 1) and len(trees.tokens) <= most
    if most >= 2:
        for text in (0, 1):
            whole = trees.of_text(text)
            assert len(whole) == trees.guesses(text) + 1 and whole == sorted(whole)


@pytest.mark.parametrize(
    ("vocabulary", "head", "nodes"),
    [(151936, LIKELY, 31), (262144, LIKELY, 32), (49152, LIKELY, 16), (49152, 640, 32)],
)
def test_more_nodes_take_no_more_ram_than_rows_of_logits(
    tiny_bundle: Path, vocabulary: int, head: int, nodes: int
) -> None:
    with Bundle(tiny_bundle) as bundle:
        model = msgspec.structs.replace(bundle.header.model, vocabulary=vocabulary)
    assert most_nodes(model, head) == nodes
    if nodes > NODES:
        assert LOGIT_ROWS * vocabulary + nodes * head <= (NODES + 1) * vocabulary


@pytest.mark.parametrize("head_rows", [64, None])
def test_only_the_rows_that_are_wanted_are_finished(tiny_bundle: Path, head_rows: int | None) -> None:
    with Bundle(tiny_bundle) as bundle:
        rows = head_rows or bundle.header.model.vocabulary
        running = PagedModel(bundle, dataclasses.replace(plan(bundle, 0.5, 64), head_rows=rows))
        try:
            tokens, parents = np.arange(6), [behind(0), 0, 0, 1, 2, 2]
            running.forward(np.arange(9), np.array([8]))
            branches = Branches([np.arange(9)], parents)
            every = running.forward(tokens, np.arange(6), branches=branches)
            running.cache.truncate(9)
            asked: list[Floats] = []

            def finish(likely: Floats) -> Tokens:
                asked.append(likely)
                return np.array([0, 2, 5])

            some = running.forward(tokens, np.arange(6), branches=branches, finish=finish)
        finally:
            running.close()
    assert np.array_equal(some, every[[0, 2, 5]])
    assert len(asked) == 1 and np.array_equal(asked[0], every[:, :rows])


def test_what_was_likely_before_saves_passes_and_changes_no_word(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 2)
    monkeypatch.setattr(Pace, "count", lambda self, draft, least, most, steps, ahead: min(most, len(draft)))
    prompt, forward, sizes = tokens_of(packed["int4"], PROMPT), PagedModel.forward, []

    def counted(self: PagedModel, tokens: Tokens, *args: object) -> Floats:
        sizes.append(len(tokens))
        return forward(self, tokens, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PagedModel, "forward", counted)
    with Bundle(packed["int4"]) as bundle:
        running = PagedModel(bundle, dataclasses.replace(plan(bundle, 0.3, 128), head_rows=8192))
        try:
            assert running.nodes > NODES
            without, _ = said(running, prompt, Sampling(), drafts=False, limit=16)
            running.cache.truncate(0)
            talk, answers = Conversation(running), [Figures(), Figures()]
            texts = [
                list(generate(talk, prompt, Sampler(Sampling()), limit=16, eos=(), figures=figures))
                for figures in answers
            ]
        finally:
            running.close()
    assert texts == [without, without] and max(sizes[16:]) > NODES
    assert answers[1].passes < answers[0].passes
