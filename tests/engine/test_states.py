"""Layers that keep a state: whatever of a text is forgotten, what follows is what follows in a fresh cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.cache.snapshot import Origin, restore, save
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafts import Pace
from flashd.engine.decoding.line import Figures
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.expected import _measured
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.branches import Branches, behind
from flashd.engine.model.contract import Model
from flashd.engine.model.kv_cache import SPARE, cache_bytes
from flashd.engine.model.sizes import NODES
from flashd.engine.model.states import MARKS, MARKS_OF_SUMS
from flashd.engine.planning.plan import make_plan
from flashd.graphs.kinds.recurrent import REWIND
from flashd.pack.pack import pack
from tests.engine.test_decode import said
from tests.engine.test_paths import ARITHMETICS, all_logits, opened
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
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes: steps < NODES)
    prompt = TOKENS[:20].tolist()
    with opened(packed[name], 0.9, CONTEXT) as model:
        assert model.drafts and not model.branches
        without, plain = said(model, prompt, sampling, drafts=False, limit=80)
        withs, figures = said(model, prompt, sampling, drafts=True, limit=80)
    assert withs == without
    assert plain.drafted == 0 and figures.drafted > 100 and 0 < figures.accepted < figures.drafted
    assert figures.passes + figures.accepted == 79


def test_answers_are_computed_one_after_the_other(convolving: Path) -> None:
    with opened(convolving, 0.5, CONTEXT) as model:
        talk = Conversation(model)
        line = talk.begin([1, 2, 3], Sampler(Sampling()), limit=5, eos=(), figures=Figures())
        assert not talk.fits([4, 5], 5)
        talk.end(line)
        assert talk.fits([4, 5], 5)


@pytest.mark.parametrize("pinned", [0.5, None])
def test_an_answer_that_is_asked_for_again_needs_no_pass(
    convolving: Path, pinned: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states behind the prompt stay, though more has been said than a state can forget."""
    # how far drafts go depends on how long passes take, and the passes are counted here
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes: steps < 3)
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
        origin = Origin.of(open_bundle, "float32")
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
