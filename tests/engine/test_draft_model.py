"""A small model guesses for a large one: fewer passes, the same text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle.reader import Bundle
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafting.draft_model import DraftModel
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.line import Figures, Line
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.engine import Budget, plans_for
from flashd.engine.model.contract import Model
from flashd.engine.planning.draft import Pair, check_draft, plan_draft
from flashd.engine.planning.plan import Plan, make_plan
from flashd.engine.planning.rates import ASSUMED, expected
from flashd.errors import DataError, MemoryTooSmall
from flashd.pack.pack import pack
from flashd.system.memory import MIB
from tests import tiny
from tests.cli.test_least import flashd
from tests.engine.one_text import generate
from tests.engine.test_paths import THREADS, opened
from tests.goldens.models import GOLDENS, WINDOW

CONTEXT = 128


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the same tokenizer that says something else."""
    folder = tmp_path_factory.mktemp("other")
    pack(tiny.write(folder / "other.gguf", seed=1), folder / "other.flash", "int4")
    return folder / "other.flash"


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are read at memory's speed, at which a draft is worth nothing."""
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 7)


@contextmanager
def drafting(path: Path, context: int = CONTEXT) -> Iterator[DraftModel]:
    with Bundle(path) as bundle:
        small = DraftModel(bundle, plan_draft(bundle, context, THREADS), bundle.header.model.vocabulary)
        yield small
        small.close()


def said(
    model: Model, small: DraftModel | None, prompt: list[int], sampling: Sampling, limit: int = 24
) -> tuple[list[int], Figures]:
    model.cache.truncate(0)
    figures, talk = Figures(), Conversation(model, small=small)
    drafts = small is not None
    out = generate(talk, prompt, Sampler(sampling), limit=limit, eos=(), figures=figures, drafts=drafts)
    return list(out), figures


SEEDED = Sampling(0.8, top_p=0.95, repeat_penalty=1.1, seed=5)


def test_a_small_model_changes_no_word_and_saves_passes(tiny_bundle: Path, other: Path) -> None:
    prompt = list(range(30, 60))
    with opened(tiny_bundle, 0.5, CONTEXT) as model, drafting(tiny_bundle) as same, drafting(other) as wrong:
        for sampling in (Sampling(), SEEDED):
            alone, plain = said(model, None, prompt, sampling)
            assert plain.drafted == 0 and plain.passes == 23
            for small in (same, wrong):
                withs, figures = said(model, small, prompt, sampling)
                assert withs == alone
                assert figures.drafted > 0 and figures.passes + figures.accepted == 23
                # what the same model guesses is mostly right; its arithmetic rounds
                assert figures.passes <= 14 or small is wrong or sampling is SEEDED
        # the next turn of a chat begins with all that was said: only what is new is read
        turn = [*prompt, *alone, 7, 8]
        assert same.unread(turn, None) <= 4
        # a token that the small model does not have, and a text that is longer than its context
        assert not same.guesses([1, 262], "a", 4, lambda: None).tokens.size
        assert not same.guesses([1] * (CONTEXT + 1), "a", 4, lambda: None).tokens.size


@pytest.mark.parametrize(("family", "branches"), [("llama-drelu", True), ("lfm2", False)])
def test_what_was_wrong_is_forgotten_behind_a_window_and_in_states(
    family: str, branches: bool, tmp_path: Path
) -> None:
    """Of a model with a sliding window trees are checked, and of one whose layers have states chains."""
    pack(GOLDENS[family].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    prompt = list(range(30, 60))
    with opened(tmp_path / "m.flash", 0.5, CONTEXT) as model, drafting(tmp_path / "m.flash") as small:
        assert model.branches is branches
        for sampling in (Sampling(), SEEDED):
            alone, _ = said(model, None, prompt, sampling)
            withs, figures = said(model, small, prompt, sampling)
            assert withs == alone and 0 < figures.accepted <= figures.drafted
            assert figures.passes + figures.accepted == 23


def test_a_mixture_s_text_stays_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    pack(GOLDENS["mixtral"].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with opened(tmp_path / "m.flash", 0.5, CONTEXT) as model, drafting(tiny_bundle) as small:
        for sampling in (Sampling(), SEEDED):
            alone, _ = said(model, None, list(range(30, 60)), sampling)
            withs, figures = said(model, small, list(range(30, 60)), sampling)
            assert withs == alone and 0 < figures.accepted < figures.drafted
    with Bundle(tmp_path / "m.flash") as bundle:
        plan = make_plan(bundle.header, memory=1 << 40, context=64, threads=2, base=0)
        plan = replace(plan, card_bytes=90_000_000, constant_experts=False)  # of two experts of four
        once = expected(plan, ASSUMED, 45e6)
        assert 0.4 < once < 0.5  # two seconds of the card, meanwhile experts are multiplied
        # two tokens read 3/2 times as much, and many tokens all experts: twice as much
        assert once < expected(replace(plan, draft=plan), ASSUMED, 45e6) < 5 * once / 2 * 1.01
        with pytest.raises(DataError, match="it has experts, and a draft stays in RAM whole"):
            check_draft(bundle, bundle)


@pytest.mark.parametrize(("family", "room"), [("", 512), ("", 190), ("llama-drelu", 512), ("mixtral", 512)])
def test_texts_that_grow_together_say_what_each_says_alone(
    family: str, room: int, tiny_bundle: Path, packed_golden: Callable[[str], Path]
) -> None:
    """Each is read apart. If the small model has no room for all of them, some have no guesses from it.

    llama-drelu has a window, and mixtral experts. In int8, which mixtures have by default, rounding would turn the
    last bits that other texts change into another word now and then.
    """
    prompts = [[*range(100, 112), 1], [*range(100, 112), 2, 3], list(range(30, 40))]
    assert min(map(len, prompts)) + 16 > 2 * WINDOW
    drawn = (Sampling(), SEEDED, Sampling(0.5, seed=9))
    large = packed_golden(family) if family else tiny_bundle
    small_one = tiny_bundle if family == "mixtral" else large  # what has experts cannot be a draft
    with opened(large, 0.5, 256, "float32") as model, drafting(small_one, room) as small:
        alone = [said(model, None, p, s, 16)[0] for p, s in zip(prompts, drawn, strict=True)]
        model.cache.truncate(0)
        talk = Conversation(model, small=small)
        lines = [
            talk.begin(p, Sampler(s), limit=16, eos=(), figures=Figures())
            for p, s in zip(prompts, drawn, strict=True)
        ]
        out: dict[Line, list[int]] = {line: [] for line in lines}
        held = 0
        while talk.lines:
            for line, token in talk.go_on():
                out[line].append(token)
            held = max(held, sum(read.held for read in small._texts))
            for line in [line for line in talk.lines if line.done]:
                talk.end(line)
        assert [out[line] for line in lines] == alone
        assert sum(line.figures.accepted for line in lines) > 0
        assert [read.text for read in small._texts] == [None] * len(small._texts)
        # what the pages at a cache's two ends take counts as 128 tokens here
        assert bool(family) or (held > 190 - 128) == (room == 512)


def test_what_cannot_be_a_draft_is_refused_by_name(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bundle(tiny_bundle) as bundle:
        check_draft(bundle, bundle)
        pack(tiny.write(tmp_path / "f16.gguf"), tmp_path / "f16.flash", "f16")
        texts, merges = tiny._vocabulary()
        monkeypatch.setattr(tiny, "_vocabulary", lambda: ([*texts[:-2], "tin", *texts[-2:]], merges))
        pack(tiny.write(tmp_path / "words.gguf"), tmp_path / "words.flash", "int4")
        for name, words in (
            ("f16", r"f16\.flash: it has f16 rows, and a draft stays in RAM whole; take one of int4 or int8 rows"),
            ("words", r"words\.flash: token 260 is 'tin' here and a control token in .*tiny\.flash; a draft has the"),
        ):
            with Bundle(tmp_path / f"{name}.flash") as draft, pytest.raises(DataError, match=words):
                plans_for(bundle, Budget(1 << 30, 64, 1), draft)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of f16 rows, which always pages, larger than the tiny one."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HIDDEN": 512, "HEADS": 8, "HEAD_DIM": 64, "NEURONS": 2048, "LAYERS": 2}.items():
            patch.setattr(tiny, name, value)
        pack(tiny.write(folder / "large.gguf", kind=Kind.F16), folder / "large.flash", "f16")
    return folder / "large.flash"


def rate(plan: Plan) -> float:
    """What to expect on a slow card."""
    return expected(plan, ASSUMED, 45e6)


def test_what_is_faster_is_taken_and_the_other_is_named(large: Path, tiny_bundle: Path) -> None:
    with Bundle(large) as bundle, Bundle(tiny_bundle) as draft:
        whole = make_plan(bundle.header, memory=1 << 40, context=64, threads=2, base=0)
        # as small beside this one as a real draft is beside a real model
        small = replace(plan_draft(draft, 64, 2), parts={"constant weights": 4 * MIB})

        def plans(memory: int) -> Pair:
            alone, beside = (
                partial(
                    make_plan,
                    bundle.header,
                    memory=memory,
                    context=64,
                    threads=2,
                    base=0,
                    beside={"clients": MIB},
                    draft=one,
                )
                for one in (None, small)
            )
            return Pair.of(alone, beside, rate)

        least = whole.smallest + MIB
        room = plans(least + small.total)
        # with all that it has pinned, the draft has pinned nothing
        assert room.beside is not None and room.beside.parts["draft"] == small.total
        assert room.beside.total <= room.beside.memory and sum(room.beside.pinned) == 0 < sum(room.alone.pinned)
        assert room.beside.smallest == room.alone.smallest + small.total
        assert room.alone.parts["interpreter, libraries, tokenizer"] == 0 < room.alone.parts["clients"]
        # most of it streams past either way, and then guesses are worth more than these pins
        assert room.taken is room.beside and not room.why_not
        # all of it is pinned if there is no draft
        much = plans(whole.smallest + 27 * MIB)
        assert much.taken is much.alone and "if its RAM pins groups instead" in much.why_not
        little = plans(least)
        assert little.taken is little.alone
        assert re.fullmatch(r".* is too small for .* and its draft; the smallest that works is --memory \d+M",
                            little.why_not)  # fmt: skip
        with pytest.raises(MemoryTooSmall):
            plans(least - MIB)
    with Bundle(tiny_bundle) as bundle:
        fits = partial(make_plan, bundle.header, memory=1 << 40, context=64, threads=2, base=0)
        assert "fits in RAM" in Pair.of(fits, fits, rate).why_not


ASK = """
import sys
from flashd.cli.main import main
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.planning.draft import Pair
Pair.taken = property(lambda self: self.beside or self.alone)
Pace.goes_on = lambda self, draft, steps, nodes, ahead: steps < 3
sys.exit(main(sys.argv[1:]))
"""
"""The command, with a draft however little it is worth: this model is small, and its file may be read fast."""


def test_the_least_memory_that_is_named_is_enough_and_the_text_is_the_same(large: Path, tiny_bundle: Path) -> None:
    plan = json.loads(flashd("plan", large, "--draft", tiny_bundle, "--context", "64", "--json").stdout)
    least = plan["smallest_with_draft"]
    assert least > plan["smallest"]
    command = [sys.executable, "-c", ASK, "ask", "the thesis", "--model", large, "--context", "64", "--json"]
    command += ["--memory", str(least), "--no-snapshots", "--max-tokens", "8", "--seed", "3", "--temperature", "1"]
    without, withs = (
        json.loads(subprocess.run([*map(str, command), *map(str, more)], capture_output=True, check=True).stdout)
        for more in ([], ["--draft", tiny_bundle])
    )
    assert withs["text"] == without["text"] and withs["drafted"] > 0
    assert withs["peak_bytes"] <= least, f"{withs['peak_bytes'] / MIB:.1f} MiB of {least / MIB:.1f}"
