"""Drafts change what a pass looks at, never what is said; the cache holds what was said and no more."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafting.drafts import BEAM, Draft, lookup
from flashd.engine.decoding.drafting.pace import STEPS, Pace
from flashd.engine.decoding.line import Figures, Line
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.forward import attention_weights
from flashd.engine.forward.ffn import streamed
from flashd.engine.model.branches import Branches, behind
from flashd.engine.model.contract import Guesses, Model, Tokens
from flashd.engine.model.sizes import MOST_TEXTS, NODES
from flashd.engine.paging.card import READ_BYTES
from flashd.engine.planning.parts import BUFFERS, PREFILL_TOKENS
from flashd.errors import UsageError
from tests.engine.one_text import generate
from tests.engine.test_paths import opened, tokens_of
from tests.reference import relative


def said(
    model: Model, prompt: list[int], sampling: Sampling, drafts: bool, limit: int = 40
) -> tuple[list[int], Figures]:
    model.cache.truncate(0)
    figures = Figures()
    talk = Conversation(model)
    return list(
        generate(talk, prompt, Sampler(sampling), limit=limit, eos=(), figures=figures, drafts=drafts)
    ), figures


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.95, repeat_penalty=1.1, seed=5)])
def test_the_same_seed_says_the_same_with_drafts_and_without(
    packed: dict[str, Path], sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this file is read at memory's speed, at which a draft is worth nothing and none would be made
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 3)
    question = "<|im_start|>user\nName the days of the week.<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokens_of(packed["int4"], question)
    with opened(packed["int4"], 0.5) as model:
        without, plain = said(model, prompt, sampling, drafts=False, limit=14)
        withs, figures = said(model, prompt, sampling, drafts=True, limit=14)
    assert withs == without
    assert plain.drafted == 0 and plain.passes == 13
    assert figures.drafted > 0 and figures.passes < 13
    assert figures.passes + figures.accepted == 13


PROMPTS = (
    "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nName the days of the week.<|im_end|>\n",
    "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nWhat is rain?<|im_end|>\n",
    "Once upon a time there was",
)
DRAWN = (Sampling(), Sampling(0.8, top_p=0.95, repeat_penalty=1.1, seed=5), Sampling(0.5, seed=9))


def begun(talk: Conversation, prompt: list[int], sampling: Sampling, limit: int, drafts: bool = True) -> Line:
    return talk.begin(prompt, Sampler(sampling), limit=limit, eos=(), figures=Figures(), drafts=drafts)


@pytest.mark.parametrize("joins", [(0, 1), (1, 3)])
@pytest.mark.parametrize("drafts", [True, False])
def test_texts_that_grow_together_say_what_each_says_alone(
    short: Path, monkeypatch: pytest.MonkeyPatch, drafts: bool, joins: tuple[int, int]
) -> None:
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 3)
    prompts = [tokens_of(short, text) for text in PROMPTS]
    with opened(short, 0.5, 256) as model:
        alone = [said(model, p, s, drafts, 12) for p, s in zip(prompts, DRAWN, strict=True)]
        model.cache.truncate(0)
        talk, out = Conversation(model), [[], [], []]  # type: tuple[Conversation, list[list[int]]]
        lines = [begun(talk, prompts[0], DRAWN[0], 12, drafts)]
        passes, before = 0, model.card.bytes_read
        while talk.lines:
            if passes in joins:
                at = len(lines)
                assert talk.fits(prompts[at], 12)
                lines.append(begun(talk, prompts[at], DRAWN[at], 12, drafts))
            for line, token in talk.go_on():
                out[lines.index(line)].append(token)
            passes += 1
            for line in [line for line in talk.lines if line.done]:
                talk.end(line)
                last = lines.index(line)
        nbytes = model.card.bytes_read - before
        assert out == [text for text, _ in alone]
        # what the first two prompts have in common is not computed twice
        assert lines[1].figures.reused_tokens >= 10 and lines[2].figures.reused_tokens == 0
        apart = [f.prefill_card_bytes + f.decode_card_bytes for _, f in alone]
        assert nbytes < 0.6 * sum(apart)
        if not drafts:
            # the last of them begins behind so many passes, and ends them all
            assert passes == joins[1] + 1 + 11
        # the cache has the last text, as if it had been alone
        assert talk.tokens == (prompts[last] + out[last])[:-1] and model.cache.length == len(talk.tokens)
        again = Figures()
        said_on = generate(talk, [*talk.tokens, 5], Sampler(Sampling()), limit=1, eos=(), figures=again)
        assert len(list(said_on)) == 1 and again.prompt_tokens == 1


def test_one_that_ends_or_a_pass_that_breaks_off_changes_nothing_for_the_others(
    short: Path,
) -> None:
    prompts = [tokens_of(short, text) for text in PROMPTS]

    class Stop(Exception):
        pass

    def break_off(done: int, layers: int, nbytes: int) -> None:
        if done == 3:
            raise Stop

    with opened(short, 0.5, 256) as model:
        alone = [said(model, p, s, False, 8)[0] for p, s in zip(prompts, DRAWN, strict=True)]
        model.cache.truncate(0)
        talk = Conversation(model)
        lines = [begun(talk, p, s, 8) for p, s in zip(prompts, DRAWN, strict=True)]
        out: dict[Line, list[int]] = {line: [] for line in lines}
        broken = 0
        while talk.lines:
            with pytest.raises(Stop):
                for line, token in talk.go_on(break_off):
                    out[line].append(token)
            broken += 1
            for line, token in talk.go_on():
                out[line].append(token)
                line.done = line.done or (line is lines[1] and len(out[line]) == 5)
            for line in [line for line in talk.lines if line.done]:
                talk.end(line)
    assert broken > 2
    assert [out[line] for line in lines] == [alone[0], alone[1][:5], alone[2]]


def test_a_prompt_that_is_read_beside_a_draft_leaves_it_less_room(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 4)
    prompts, limits = [list(range(100, 120)), list(range(50, 67))], [24, 8]
    with opened(tiny_bundle, 0.5, 64) as model:
        alone = [said(model, p, Sampling(), False, n)[0] for p, n in zip(prompts, limits, strict=True)]
        model.cache.truncate(0)
        forward, ends = model.forward, list[int]()

        def counted(tokens: Tokens, *rest: Any, **more: Any) -> Floats:
            ends.append(model.cache.length + len(tokens))
            return forward(tokens, *rest, **more)

        monkeypatch.setattr(model, "forward", counted)
        talk, out = Conversation(model), [list[int](), list[int]()]
        lines = [begun(talk, prompts[0], Sampling(), limits[0])]
        while talk.lines:
            if len(lines) == 1 and lines[0].said >= 19:
                # what both may say fills the context
                limits[1] = 64 - model.cache.length - lines[0].to_come - len(prompts[1])
                assert 1 <= limits[1] <= 8 and talk.fits(prompts[1], limits[1])
                lines.append(begun(talk, prompts[1], Sampling(), limits[1]))
            for line, token in talk.go_on():
                out[lines.index(line)].append(token)
            for line in [line for line in talk.lines if line.done]:
                talk.end(line)
    assert len(lines) == 2 and max(ends) == 64
    assert out[0] == alone[0] and out[1] == alone[1][: limits[1]]


def test_what_a_text_begins_with_stays_when_the_one_that_it_is_shared_with_ends(tiny_bundle: Path) -> None:
    prompt, other = list(range(100, 130)), list(range(30, 40))
    with opened(tiny_bundle, 0.5, 128) as model:
        expected = said(model, [*prompt, 7, 8], Sampling(), False, 6)[0]
        model.cache.truncate(0)
        talk = Conversation(model)
        first, second = begun(talk, prompt, Sampling(), 6), begun(talk, other, Sampling(), 20)
        for _ in range(3):
            for _ in talk.go_on():
                pass
        third = begun(talk, [*prompt, 7, 8], Sampling(), 6)
        talk.end(first)
        while not third.done:
            for _ in talk.go_on():
                pass
        talk.end(third)
        talk.end(second)
    assert third.figures.reused_tokens == len(prompt) and third.tokens[-6:] == expected


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_who_listens_may_go_away_between_two_texts(tiny_bundle: Path, taken: int) -> None:
    prompts = [list(range(100, 110)), list(range(30, 45)), list(range(60, 72))]
    with opened(tiny_bundle, 0.5, 128) as model:
        alone = [said(model, p, Sampling(), False, 12)[0] for p in prompts]
        model.cache.truncate(0)
        talk = Conversation(model)
        lines = [begun(talk, p, Sampling(), 12) for p in prompts]
        while talk.lines:
            with closing(talk.go_on()) as tokens:
                # a pass gives each text at least one
                for _ in itertools.islice(tokens, taken):
                    pass
            for line in [line for line in talk.lines if line.done]:
                talk.end(line)
    assert [line.tokens[-12:] for line in lines] == alone


def test_no_more_texts_than_there_is_room_for(packed: dict[str, Path]) -> None:
    with opened(packed["int4"], 0.5, 64) as model:
        talk = Conversation(model)
        assert talk.fits([1] * 63, 1000)  # alone it may have all of it
        line = begun(talk, list(range(20)), Sampling(), 24)
        # 43 slots for the first, whose last token needs none
        assert talk.fits([30] * 11, 10) and not talk.fits([30] * 11, 11)
        # the first 19 are there when the first prompt has been read
        for _ in talk.go_on():
            pass
        assert talk.fits([*range(19), 30, 31], 19) and not talk.fits([*range(19), 30, 31], 20)
        talk.end(line)
        for i in range(MOST_TEXTS):
            assert talk.fits([i, i], 2)
            begun(talk, [i, i], Sampling(), 2)
        assert not talk.fits([1, 2], 2)
    with opened(packed["int4"], None, 64) as model:
        talk = Conversation(model)
        begun(talk, [1, 2], Sampling(), 5)
        assert not talk.fits([3], 5)  # a model that fits takes one line


def test_what_the_text_repeats_is_looked_up(packed: dict[str, Path]) -> None:
    """With nothing in RAM to draft with, the text itself is left."""
    lines = "".join(f"item {i}: apples, pears, plums\n" for i in range(4))
    prompt = tokens_of(packed["int4"], lines + "item 4: app")
    with opened(packed["int4"], 0.0) as model:
        assert model.shares_reads and not model.drafts
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
    tokens, branches = [7, 8, 9, 10, 11, 13, 12], Branches([np.arange(30)], [behind(0), 0, 1, 2, 0, 1, 0])
    line = [[7], [7, 8], [7, 8, 9], [7, 8, 9, 10], [7, 11], [7, 8, 13], [7, 12]]
    with opened(packed["int4"], 0.5) as model:
        model.forward(np.array(prompt), np.array([0]))
        wanted = np.arange(len(tokens))
        checked = model.forward(np.array(tokens), wanted, branches=branches)
        for node, text in enumerate(line):
            model.cache.truncate(len(prompt))
            alone = model.forward(np.array(text), np.array([len(text) - 1]))[0]
            assert relative(checked[node], alone) < 1e-3, node
        model.cache.truncate(len(prompt))
        model.forward(np.array(tokens), wanted, branches=branches)
        model.cache.keep(np.array([*range(len(prompt) + 2), len(prompt) + 5]))  # 13 behind 8
        after = model.forward(np.array([20]), np.array([0]))[0]
        model.cache.truncate(len(prompt))
        model.forward(np.array([7, 8, 13]), np.array([0]))
        assert relative(after, model.forward(np.array([20]), np.array([0]))[0]) < 1e-3


GUESSES = st.lists(
    st.tuples(st.integers(0, 9), st.floats(0.001, 1)), min_size=1, max_size=4, unique_by=lambda g: g[0]
)


@given(st.lists(st.lists(GUESSES, min_size=BEAM, max_size=BEAM), max_size=6), st.lists(st.integers(0, 9), max_size=5),
       st.floats(0.1, 1), st.integers(3, NODES), st.lists(st.integers(0, 5), min_size=1, max_size=3))  # fmt: skip
def test_a_draft_s_likeliest_nodes_are_trees(
    levels: list[list[list[tuple[int, float]]]], found: list[int], trust: float, most: int, rooms: list[int]
) -> None:
    draft = Draft([99 - i for i in range(len(rooms))], rooms, trust)
    draft.follow(0, found[: rooms[0]], 0.5)
    asked: list[int] = []
    for level in levels:
        nodes = draft.likeliest(BEAM)
        if not nodes:
            break
        tokens, parents = draft.asked(nodes)
        asked += tokens
        assert len(parents) == len(asked) and all(p < i for i, p in enumerate(parents))
        for guesses, node in zip(level, nodes, strict=False):
            total = sum(odds for _, odds in guesses)
            draft.grow([node], Guesses(np.array([[t for t, _ in guesses]]),
                                       np.array([[odds / total for _, odds in guesses]], np.float32)))  # fmt: skip
    trees = draft.trees(most)
    assert len(trees.tokens) <= most
    places: list[tuple[int, int]] = []  # of each node, its text and how far behind it
    for node, parent in enumerate(trees.parents):
        assert parent < node
        if parent < 0:
            assert trees.tokens[node] == 99 - ~parent and trees.root(~parent) == node
            places.append((~parent, 0))
            continue
        assert trees.odds[node] <= trees.odds[node - 1] <= 1
        assert trees.child(parent, trees.tokens[node]) == node
        places.append((places[parent][0], places[parent][1] + 1))
    for text, room in enumerate(rooms):
        assert max(depth for of, depth in places if of == text) <= room
        assert trees.guesses(text) == sum(of == text for of, _ in places) - 1
    assert sum(trees.odds) == pytest.approx(draft.expected(most))
    assert trees.child(0, 100) is None


def test_guesses_are_the_likeliest_with_their_odds() -> None:
    logits = np.array([[0, 3, 1, 2], [5, 0, 0, 5]], np.float32)
    guesses = Guesses.of(logits, 2)
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert guesses.tokens[0].tolist() == [1, 3] and sorted(guesses.tokens[1].tolist()) == [0, 3]
    assert np.allclose(guesses.odds, np.take_along_axis(odds, guesses.tokens, 1))
    assert Guesses.of(logits, 9).tokens.shape == (2, 4)


def test_guesses_behind_several_tokens_are_those_behind_each(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree that is drafted step by step: what came before is in the cache, branches do not see each other.

    Guesses are made without rounding here: it would turn other last bits of attention into other odds.
    """
    for module in (streamed, attention_weights):
        monkeypatch.setattr(module, "GUESSED", "float32")
    prompt, tokens, parents = list(range(100, 130)), [7, 8, 11, 9, 12], [behind(0), 0, 0, 1, 2]
    texts = [np.arange(len(prompt))]
    with opened(packed["int4"], 0.5) as model:
        model.forward(np.array(prompt), np.array([0]))
        by_steps = [
            model.draft(np.array(tokens[a:b]), Branches(texts, parents[:b])) for a, b in ((0, 1), (1, 3), (3, 5))
        ]
        for line, guesses in (([7, 8, 9], 0), ([7, 11, 12], 1)):
            model.cache.truncate(len(prompt))
            alone = [model.draft(np.array([t]), Branches(texts, [behind(0), *range(i)])) for i, t in enumerate(line)]
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
        tokens = generate(talk, prompt, Sampler(Sampling()), limit=30, eos=(), figures=Figures())
        out = [next(tokens) for _ in range(taken)]
        tokens.close()
        # the last token said has not been through the model yet
        assert talk.tokens == (prompt + out)[:-1]
        assert model.cache.length == len(talk.tokens)
        figures = Figures()
        again = list(generate(talk, prompt + out, Sampler(Sampling()), limit=4, eos=(), figures=figures))
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
        stopped = list(generate(talk, [10, 20], Sampler(Sampling()), limit=10, eos=(out[3],), figures=figures))
    assert stopped == out[: out.index(out[3])] and figures.finish == "stop"


def grown(odds: float, trust: float = 1.0) -> tuple[Draft, list[int]]:
    """A draft after one step, and what would be drafted next."""
    draft = Draft([1], [9], trust)
    draft.grow([0], Guesses(np.array([[2, 3, 4]]), np.array([[odds, (1 - odds) / 2, (1 - odds) / 2]], np.float32)))
    return draft, draft.likeliest(BEAM)


def test_drafts_go_on_while_they_are_cheap_and_likely() -> None:
    draft, nodes = grown(0.8)
    pace = Pace()
    assert [pace.goes_on(draft, steps, nodes, ahead=False) for steps in (0, STEPS - 1, STEPS)] == [True, True, False]
    pace.measured_draft(0.2)
    pace.measured_pass(10.0, NODES)
    assert pace.goes_on(draft, 1, nodes, ahead=False)
    for _ in range(60):
        pace.measured_draft(20.0)
    assert not pace.goes_on(draft, 1, nodes, ahead=False)
    # once in a while it is tried whether it has become better
    assert 0 < sum(pace.goes_on(draft, 0, nodes, ahead=False) for _ in range(64)) < 8
    dear = Pace()
    dear.measured_draft(2.0)
    dear.measured_pass(10.0, NODES)
    flat = Draft([1], [9], 1.0)
    assert dear.goes_on(flat, 0, [0], ahead=False)
    for _ in range(20):
        dear.measured_guesses(False, 0.001)  # they never promised anything, and are not believed less for that
    assert dear.trust > 0.6 and sum(dear.goes_on(flat, 0, [0], ahead=False) for _ in range(64)) <= 4
    for _ in range(10):
        dear.measured_guesses(True, 0.9)
    assert dear.goes_on(flat, 0, [0], ahead=False)
    assert dear.goes_on(grown(0.9)[0], 1, [1], ahead=False)
    assert not dear.goes_on(grown(0.02, 0.1)[0], 1, [1], ahead=False)


def test_guesses_that_a_pass_does_not_wait_for_cost_nothing() -> None:
    draft, nodes = grown(0.8)
    pace = Pace()
    pace.measured_draft(3.0)
    pace.measured_pass(1.0, 1)
    assert not pace.goes_on(draft, 1, nodes, ahead=True)
    for _ in range(40):
        pace.measured_ahead(drafting=12.0, waited=5.0)  # in seven seconds there is time for two steps
    assert pace.goes_on(draft, 1, nodes, ahead=True) and not pace.goes_on(draft, 1, nodes, ahead=False)
    assert not pace.goes_on(draft, 2, nodes, ahead=True)
    pace.measured_ahead(drafting=9.0, waited=0.0)
    assert pace.goes_on(draft, 2, nodes, ahead=True)


@pytest.mark.parametrize(("each", "counts"), [(0.0, {NODES}), (0.5, {3, 4}), (20.0, {1})])
def test_as_many_guesses_are_checked_as_pay(each: float, counts: Collection[int]) -> None:
    """Of a chain whose guesses are right in 4 of 5 cases; a pass takes a second, and so many for each token."""
    draft, pace = Draft([1], [30], 1.0), Pace()
    draft.follow(0, list(range(2, 22)), 0.8)
    assert pace.count(draft, 1, NODES, 0, ahead=False) == 1 + STEPS  # nothing is known yet
    seen = []
    for _ in range(200):
        tokens = pace.count(draft, 1, NODES, 0, ahead=False)
        pace.measured_pass(1 + each * tokens, tokens)
        seen.append(tokens)
    assert len([n for n in seen[-100:] if n in counts]) > 90
    # the machine is free again
    for _ in range(200):
        tokens = pace.count(draft, 1, NODES, 0, ahead=False)
        pace.measured_pass(1.0, tokens)
    assert tokens in (NODES, NODES // 2)
    assert (
        pace.count(draft, 3, 3, 0, ahead=False) == 3 and pace.count(Draft([], [], 1.0), 0, NODES, 0, ahead=False) == 0
    )


def test_as_many_guesses_are_checked_as_pay_by_what_a_prompt_took() -> None:
    draft, unknown, dear = Draft([1], [30], 1.0), Pace(), Pace()
    draft.follow(0, list(range(2, 22)), 0.8)
    dear.measured_prompt(41.0, 41)
    for pace in (unknown, dear):
        pace.measured_pass(5.5, 5)
    # a second for each token, beside half of one for the pass
    assert (
        unknown.count(draft, 1, NODES, 0, ahead=False) == NODES and dear.count(draft, 1, NODES, 0, ahead=False) <= 3
    )
    dear.measured_prompt(0.1, 3)  # the last few tokens of a long prompt tell nothing
    assert dear.count(draft, 1, NODES, 0, ahead=False) <= 3
    for tokens in (2, 9, 4) * 20:
        dear.measured_pass(5.5, tokens)
    assert dear.count(draft, 1, NODES, 0, ahead=False) == NODES


def test_guesses_that_are_worth_no_place_in_a_pass_are_not_made_again_and_again(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of drafting takes half of a pass here, and no pass checks what it finds."""
    monkeypatch.setattr(Pace, "count", lambda _pace, _draft, least, _most, _steps, _ahead: least)
    monkeypatch.setattr(Pace, "measured_draft", lambda pace, _: setattr(pace, "_draft", 0.5))
    monkeypatch.setattr(Pace, "measured_pass", lambda pace, _, tokens: pace._pass.add(tokens, 1.0))
    steps: list[int] = []
    with opened(tiny_bundle, 0.5, 256) as model:
        draft = model.draft

        def counted(tokens: Tokens, branches: Branches) -> Guesses:
            steps.append(len(tokens))
            return draft(tokens, branches)

        monkeypatch.setattr(model, "draft", counted)
        talk = Conversation(model)
        said = generate(talk, [3, 1, 4, 1, 5], Sampler(Sampling()), limit=60, eos=(), figures=Figures())
        assert len(list(said)) == 60
    assert 1 < len(steps) < 20


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=80))
def test_trust_follows_what_was_promised(told: list[tuple[bool, float]]) -> None:
    pace = Pace()
    for right, promised in told:
        before = pace.trust
        pace.measured_guesses(right, promised)
        assert 0 < pace.trust <= 1
        assert (pace.trust >= before) if right else (pace.trust <= before)
