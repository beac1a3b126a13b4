"""Layers that keep a state: whatever of a text is forgotten, what follows is what follows in a fresh cache."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from flashd.bundle.architecture import Architecture
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.cache.snapshot import Origin, restore, save
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.line import Figures, Line
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.expected import _measured
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.branches import Branches, behind
from flashd.engine.model.contract import Model, silent
from flashd.engine.model.kv_cache import SPARE, KvCache, cache_bytes
from flashd.engine.model.sizes import MOST_TEXTS, NODES
from flashd.engine.model.states import MARKS, MARKS_OF_SUMS, States, lendable_states, states_bytes
from flashd.engine.planning import plan as planning
from flashd.engine.planning.parts import BESIDE
from flashd.engine.planning.plan import make_plan, smallest
from flashd.graphs.kinds.recurrent import REWIND
from flashd.pack.pack import pack
from flashd.system.freed_memory import PAGE
from tests.engine.test_decode import said
from tests.engine.test_paths import ARITHMETICS, all_logits, opened, plan
from tests.engine.test_prefixes import flip, fresh, kept, process, teach
from tests.goldens.models import (
    DELTA_DIM,
    GOLDENS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    MAMBA_GROUPS,
    MAMBA_STATE,
    TAPS,
    TOKENS,
    VALUE_HEADS,
)
from tests.reference import relative

CONTEXT = 120
FALCON = "falcon-h1"
MIXED = (2 * KEY_HEADS + VALUE_HEADS) * DELTA_DIM
SUM = VALUE_HEADS * DELTA_DIM**2
RUNNING = LAYERS - 1
"""Layers that have a state: all but one."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of short convolutions, of gated delta nets, and of Mamba-2 mixers beside attention."""
    folder = tmp_path_factory.mktemp("states")
    for name in ("lfm2", "qwen35", FALCON):
        pack(GOLDENS[name].write(folder / f"{name}.gguf"), folder / f"{name}.flash", "int4")
    return {path.stem: path for path in folder.glob("*.flash")}


@pytest.fixture(scope="module")
def convolving(packed: dict[str, Path]) -> Path:
    return packed["lfm2"]


def taken(model: Model, tokens: list[int]) -> Floats:
    return model.forward(np.array(tokens, np.int64), np.arange(len(tokens)))


@pytest.mark.parametrize(
    ("name", "pinned"),
    [("lfm2", 0.5), ("lfm2", None), ("qwen35", 0.5), ("qwen35", None), (FALCON, 0.5)],
)
def test_whatever_is_forgotten_what_follows_is_right(
    packed: dict[str, Path], name: str, pinned: float | None
) -> None:
    """Passes, drafts, passes that break off, marks and cuts in any order."""
    random = np.random.default_rng(1)
    text = random.integers(0, 262, CONTEXT).tolist()

    def break_off(done: int, layers: int, nbytes: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    how = packed[name], pinned, CONTEXT, ARITHMETICS[1]
    with opened(*how) as model, opened(*how) as by:
        expected = all_logits(by, text, CONTEXT)
        cuts, gone_back = 0, 0
        for _ in range(150):
            cache, stop = model.cache, int(random.integers(1, LAYERS + 1))
            length = cache.length
            match random.choice(["pass", "cut", "mark", "break", "draft"], p=[0.4, 0.3, 0.1, 0.1, 0.1]):
                case "pass" if length < CONTEXT:
                    some = text[length : length + int(random.choice([1, 2, 7, 16, 40]))]
                    logits, right = taken(model, some), expected[length : length + len(some)]
                    assert np.array_equal(logits, right) if pinned else relative(right, logits) < 1e-4
                case "cut":
                    to = int(random.integers(max(0, length - random.choice([3, NODES, CONTEXT])), length + 1))
                    longest = cache.longest(to)
                    assert longest <= to
                    cache.truncate(to)
                    assert cache.length == longest
                    cuts, gone_back = cuts + 1, gone_back + (0 < longest < to)
                    text[longest:] = random.integers(0, 262, CONTEXT - longest).tolist()
                    expected = all_logits(by, text, CONTEXT)
                case "mark":
                    cache.mark()
                    assert cache.longest(length) == length
                case "break" if length < CONTEXT - 20 and pinned:
                    with pytest.raises(KeyboardInterrupt):
                        model.forward(np.array(text[length : length + 20]), np.array([0]), break_off)
                    assert cache.length == length
                case "draft" if 0 < length < CONTEXT - NODES and pinned:
                    guesses = [7, 8, 9, 10] * 4
                    for i, token in enumerate(guesses[: int(random.integers(1, NODES + 1))]):
                        branches = Branches([np.arange(length)], [behind(0), *range(i)])
                        model.draft(np.array([token]), branches)
                    cache.truncate(length)
                    assert cache.length == length
    assert cuts > 25 and gone_back > 0


DRAWN = Sampling(0.8, top_p=0.95, repeat_penalty=1.1, seed=5)


@pytest.mark.parametrize(("name", "sampling"), [("lfm2", Sampling()), ("qwen35", DRAWN), (FALCON, DRAWN)])
def test_drafts_change_no_word(
    packed: dict[str, Path], name: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < NODES)
    prompt = TOKENS[:20].tolist()
    with opened(packed[name], 0.9, CONTEXT) as model:
        assert model.drafts and not model.branches
        without, plain = said(model, prompt, sampling, drafts=False, limit=48)
        withs, figures = said(model, prompt, sampling, drafts=True, limit=48)
    assert withs == without
    assert plain.drafted == 0 and figures.drafted > 100 and 0 < figures.accepted < figures.drafted
    assert figures.passes + figures.accepted == 47


@pytest.mark.parametrize("name", ["lfm2", "qwen35", FALCON])
def test_texts_that_share_passes_say_what_each_says_alone(
    packed: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They join, one ends early, a pass breaks off, one asks what another has asked; and the last one is kept."""
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 3)
    asked = [TOKENS[:25].tolist(), [*TOKENS[:20].tolist(), *range(5, 20)], TOKENS[:25].tolist(), list(range(60, 66))]
    drawn, limits = [DRAWN, Sampling(), Sampling(0.5, seed=9), DRAWN], [10, 12, 12, 14]

    def break_off(done: int, layers: int, nbytes: int) -> None:
        if done == LAYERS - 1:
            raise KeyboardInterrupt

    with process(packed[name], tmp_path, 0.5, 160) as p:
        alone = [said(p.model, a, d, False, n)[0] for a, d, n in zip(asked, drawn, limits, strict=True)]
        p.model.cache.truncate(0)
        p.passes.clear()
        talk, out = p.talk, [list[int]() for _ in asked]
        lines: list[Line] = []
        for number, joining in enumerate((1, 2, 0, 1, *[0] * 20)):
            for at in range(len(lines), len(lines) + joining):
                assert talk.fits(asked[at], limits[at])
                session = "s" if at == 3 else None
                figures, sampler = Figures(), Sampler(drawn[at])
                line = talk.begin(asked[at], sampler, limit=limits[at], eos=(), figures=figures, session=session)
                lines.append(line)
            for on_step in (break_off, silent) if number == 4 else (silent,):
                with suppress(KeyboardInterrupt):
                    for line, token in talk.go_on(on_step):
                        at = lines.index(line)
                        out[at].append(token)
                        line.done = line.done or (at == 1 and line.said == 6)
            for line in [line for line in talk.lines if line.done]:
                talk.end(line)
            if not talk.lines:
                break
        assert out == [alone[0], alone[1][:6], *alone[2:]]
        guessed = [line.figures for line in lines]
        assert sum(f.drafted for f in guessed) > 20 and sum(f.accepted for f in guessed) > 0
        assert len(p.passes) < 25 < sum(limits) - 6
        # what was asked before needs no pass; elsewhere a sum is not known where two texts part
        shared = 20 if name == "lfm2" else 0
        assert [f.reused_tokens for f in guessed] == [0, shared, 25, 0]
        # the cache has the last text, as if it had been alone, and a snapshot is made of it
        assert talk.tokens == [*asked[3], *out[3]][:-1]
        talk.remember(leaving=True)
        logits, figures = p.logits([*talk.tokens, 7])
        assert figures.prompt_tokens == 1
        state = p.model.cache.states(len(talk.tokens))[0]
    with process(packed[name], tmp_path, 0.5, 160) as p:
        again, figures = p.logits([*asked[3], *out[3][:-1], 7])
        assert figures.prompt_tokens == 1 and np.array_equal(again, logits)
    with process(packed[name], None, 0.5, 160) as p:
        apart, _ = p.logits([*asked[3], *out[3][:-1], 7])
        # keys of others, which attention skips, may change the last bits of its sums
        assert relative(apart, logits) < 1e-5
        of_first_layer = p.model.cache.states(len(p.talk.tokens))[0].parts
    assert all(np.array_equal(a, b) for a, b in zip(of_first_layer, state.parts, strict=True))


def wide(model: Architecture) -> Architecture:
    """A model whose states take megabytes."""
    (kind,) = model.recurrent
    return structs.replace(
        model, recurrent=[structs.replace(kind, key_heads=16, value_heads=16, key_dim=64, value_dim=64)]
    )


def test_a_plan_has_as_many_texts_as_there_is_room_for(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_can_be_whole", lambda header: False)
    with Bundle(packed["qwen35"]) as bundle:
        header = structs.replace(bundle.header, model=wide(bundle.header.model))
        each, least = states_bytes(header.model, beside=True), smallest(header, 64, 0)
        for room, texts in ((0, 1), (2 * each - 1, 1), (2 * each, 2), (5 * each, 3), (40 * each, MOST_TEXTS)):
            made = make_plan(header, memory=least + room, context=64, threads=1, base=0)
            assert made.texts == texts and made.total <= made.memory
            assert made.parts.get(BESIDE, 0) == (texts - 1) * each
            # what states of further texts would take holds neurons while they are not there
            assert made.lent_groups >= (texts > 1) * 3 or made.pinned_share == 1
        of_two = make_plan(bundle.header, memory=smallest(bundle.header, 64, 0), context=64, threads=1, base=0)
        of_two = dataclasses.replace(of_two, texts=2)
        model = PagedModel(bundle, of_two)
        try:
            talk = Conversation(model)
            for prompt in ([1, 2, 3], [4, 5]):
                assert talk.fits(prompt, 2)
                talk.begin(prompt, Sampler(Sampling()), limit=2, eos=(), figures=Figures())
            assert not talk.fits([6], 2)
        finally:
            model.close()


def test_states_of_a_text_take_what_is_planned_while_it_is_there(packed: dict[str, Path]) -> None:
    with Bundle(packed["qwen35"]) as bundle:
        model = wide(bundle.header.model)
    lent: list[int] = []
    cache = KvCache(model, 64, lent.append, texts=3)
    each, free = states_bytes(model, beside=True), lent[-1]

    def arrays(states: States) -> list[Floats]:
        layers = states._layers.values()
        assert states._unread is not None
        two = [array for layer in layers if layer.sums for array in (*layer.rows.arrays, *layer.sums.arrays)]
        return [*two, states._unread.now]

    for text in (1, 2):
        cache.share(text, 0, 0)
        assert free - lent[-1] == text * lendable_states(model, 1) > text * 0.9 * each
        states = cache._of_texts[text]
        for tokens in range(1, 20):
            for i in range(LAYERS):
                cache.layer(i, 1, text=text)
            cache.advance(1, {text: 1})
            cache.mark(text)
            marked = [part for kept in states._marks.values() for state in kept for part in state.parts]
            rows = RUNNING * REWIND * states._layers[0].rows.now.shape[2] * 4  # a sum may lack so many
            assert cache.longest(tokens, text) == tokens
            assert sum(array.nbytes for array in (*arrays(states), *marked)) == each - rows
    gone = arrays(cache._of_texts[1])
    for array in (*gone, *arrays(states)):
        array[:] = 1
    cache.keep(np.arange(19), {2: 19})
    assert cache._of_texts[0] is states and all(array.all() for array in arrays(states))
    assert lent[-1] == free and not any(array.reshape(-1)[PAGE:-PAGE].any() for array in gone)


@pytest.mark.parametrize("pinned", [0.5, None])
def test_an_answer_that_is_asked_for_again_needs_no_pass(
    convolving: Path, pinned: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states behind the prompt stay, though more has been said than a state can forget."""
    # how far drafts go depends on how long passes take, and the passes are counted here
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 3)
    prompt = TOKENS[:30].tolist()
    with process(convolving, None, pinned, CONTEXT) as p:
        first, _ = p.say(prompt, limit=40)
        passes = len(p.passes)
        again, figures = p.say(prompt, limit=40)
        assert again == first and figures.reused_tokens == len(prompt)
        assert len(p.passes) == 2 * passes - 1
        # another text, and then the same once more: nothing of it is left
        p.say([*prompt[:20], *range(30)], limit=2)
        third, figures = p.say(prompt, limit=40)
        assert third == first and figures.reused_tokens == 0


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_a_chat_goes_on_where_it_was(packed: dict[str, Path], name: str) -> None:
    with process(packed[name], None, 0.5, CONTEXT) as p:
        talk = TOKENS[:20].tolist()
        for _ in range(3):
            words, figures = p.say(talk, limit=6)
            expected = fresh(packed[name], [*talk, *words], 0.5)
            talk = [*talk, *words, 9, 8, 7]
        assert figures.reused_tokens == len(talk) - 6 - 3 - 4
        logits, _ = p.logits(talk[:-3])
        assert np.array_equal(logits, expected)


OF_A_TOKEN = {
    "lfm2": (TAPS - 1) * HIDDEN,
    "qwen35": (TAPS - 1) * (MIXED + 2 * VALUE_HEADS) + SUM,
    FALCON: (TAPS - 1) * (96 + 2 * MAMBA_GROUPS * MAMBA_STATE + 6) + 96 * MAMBA_STATE,
}
"""Numbers of a layer's state behind a token."""


@pytest.mark.parametrize(("name", "pinned"), [("lfm2", 0.5), ("lfm2", None), ("qwen35", 0.5), (FALCON, None)])
def test_a_prompt_that_comes_again_after_a_restart_needs_no_pass(
    packed: dict[str, Path], tmp_path: Path, name: str, pinned: float | None
) -> None:
    bundle, prompt = packed[name], TOKENS[:30].tolist()
    (path,) = teach(bundle, tmp_path, prompt, prompt, context=CONTEXT)
    expected = fresh(bundle, prompt, 0.5)
    with process(bundle, tmp_path, pinned, CONTEXT) as p:
        logits, figures = p.logits(prompt)
        assert p.passes == [] and np.array_equal(logits, expected) and figures.reused_tokens == len(prompt)
        state_bytes = (LAYERS if name == FALCON else RUNNING) * OF_A_TOKEN[name] * 4
        assert figures.snapshot_bytes == len(prompt) * p.model.cache.token_bytes + state_bytes + logits.nbytes
        onward = taken(p.model, TOKENS[30:].tolist())
    with opened(bundle, pinned, CONTEXT, "float32") as model:
        right = all_logits(model, TOKENS.tolist(), 48)[30:]
    assert np.array_equal(onward, right) if pinned else relative(right, onward) < 1e-4
    # a prompt that parts from it cannot begin with its states
    with process(bundle, tmp_path, pinned, CONTEXT) as p:
        _, figures = p.logits([*prompt[:-2], 1, 2, 3])
        assert figures.reused_tokens == figures.snapshot_bytes == 0
    # damaged states are not taken
    flip(path, path.stat().st_size - 4 * 262 - 1)
    with process(bundle, tmp_path, pinned, CONTEXT) as p:
        logits, figures = p.logits(prompt)
        assert relative(expected, logits) < 1e-4 and figures.reused_tokens == 0
    assert kept(tmp_path) == []


def test_what_prompts_begin_with_is_kept_where_a_pass_ends(
    convolving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = TOKENS.tolist()
    a, b, c = ([*common, *range(n, n + 30)] for n in (1, 40, 120))
    expected = fresh(convolving, c, 0.5)
    opening = PagedModel.__init__

    def in_passes_of_20(self: PagedModel, *args: object) -> None:
        opening(self, *args)  # type: ignore[arg-type]
        self.pass_tokens = 20

    monkeypatch.setattr(PagedModel, "__init__", in_passes_of_20)
    with process(convolving, tmp_path, 0.5, CONTEXT) as p:
        p.ask(a)
        assert p.passes[:4] == [20, 20, 20, 18]
        p.passes.clear()
        p.ask(b)
        assert p.passes[:4] == [20, 20, 20, 18]  # no pass is added
        logits, figures = p.logits(c)
        assert figures.reused_tokens == 40 and np.array_equal(logits, expected)
    assert len(kept(tmp_path)) == 1
    with process(convolving, tmp_path, 0.5, CONTEXT) as p:
        logits, figures = p.logits(c)
        assert figures.reused_tokens == 40 and np.array_equal(logits, expected)


@pytest.mark.parametrize("name", ["lfm2", "qwen35"])
def test_a_plan_counts_states_and_they_do_not_grow(packed: dict[str, Path], name: str) -> None:
    with Bundle(packed[name]) as bundle:
        header = bundle.header
        plans = [make_plan(header, memory=1 << 40, context=n, threads=1, base=0) for n in (32, 128)]
        model = header.model
        assert _measured(bundle, plans[0]).multiplied > 0
    held = [plan.parts["states"] for plan in plans]
    now, marked = REWIND + TAPS - 1, TAPS - 1
    if name == "lfm2":
        assert held == 2 * [RUNNING * (2 * now + MARKS * marked) * HIDDEN * 4]
    else:
        rows = now * (MIXED + 2 * VALUE_HEADS)
        assert held == 2 * [4 * (RUNNING * (2 + MARKS_OF_SUMS) * (rows + SUM) + SUM)]
    # and keys and values only of the layer that has some
    assert (
        plans[1].parts["KV cache"]
        == cache_bytes(model, 128 + SPARE)
        == 2 * 130 * model.kv_width(model.attention[0]) * 4
    )
    assert NODES <= REWIND  # drafts that were wrong can be forgotten


def test_marks_are_few(convolving: Path) -> None:
    """A text that is marked at every token keeps the last of them."""
    with opened(convolving, 0.5, CONTEXT) as model:
        for token in TOKENS.tolist():
            taken(model, [token])
            model.cache.mark()
        known = [model.cache.longest(n) for n in (48, 48 - REWIND, 47 - REWIND, 10)]
        assert known == [48, 48 - REWIND, 0, 0]


@pytest.mark.parametrize("again", [False, True])
def test_rows_that_a_sum_lacks_are_kept_with_it(packed: dict[str, Path], tmp_path: Path, again: bool) -> None:
    """A text ends behind guesses that were wrong, and others are drafted behind it."""
    bundle, text = packed["qwen35"], TOKENS[:40].tolist()
    with opened(bundle, 0.5, CONTEXT) as model:
        right = all_logits(model, text, CONTEXT)[30:]
    with Bundle(bundle) as open_bundle:
        origin = Origin.of(open_bundle, plan(open_bundle, 0.5, CONTEXT))
    with opened(bundle, 0.5, CONTEXT) as model:
        taken(model, text[:20])
        taken(model, [*text[20:30], 9, 9])
        model.cache.truncate(30)
        if again:
            model.draft(np.array([text[30]]), Branches([np.arange(30)], [behind(0)]))
            model.cache.truncate(30)
        save(tmp_path / "s", origin, text[:30], model.cache, None)
        assert [state.pending for state in model.cache.states(30)] == [10] * RUNNING
    with opened(bundle, 0.5, CONTEXT) as model:
        taken(model, [7, 8, 9])
        restore(tmp_path / "s", origin, text[:30], model.cache)
        assert np.array_equal(taken(model, text[30:]), right)
