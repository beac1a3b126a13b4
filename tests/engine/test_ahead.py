"""The next pass's drafts are made while the head's unlikely rows stream past, and dropped where they are wrong."""

from __future__ import annotations

import _thread
import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.decoding.background import Background
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.line import Figures
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.forward.paged import PagedModel
from tests.engine.one_text import generate
from tests.engine.test_decode import PROMPTS, begun, said
from tests.engine.test_paths import plan, tokens_of

DRAWN = (Sampling(), Sampling(0.9, repeat_penalty=1.2, seed=3))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of two steps, however fast this file is read."""
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 2)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step of drafting, whether it was made beside a pass."""
    beside: list[bool] = []
    real = PagedModel.draft

    def draft(self: PagedModel, *args: Any) -> Any:
        beside.append(threading.current_thread() is not threading.main_thread())
        return real(self, *args)

    monkeypatch.setattr(PagedModel, "draft", draft)
    return beside


@contextmanager
def model(path: Path, head_rows: int) -> Iterator[PagedModel]:
    with Bundle(path) as bundle:
        running = PagedModel(bundle, dataclasses.replace(plan(bundle, 0.5, 256), head_rows=head_rows))
        try:
            yield running
        finally:
            running.close()


@pytest.mark.parametrize("sampling", DRAWN)
@pytest.mark.parametrize("head_rows", [32768, ROWS_OF_A_RUN * 16])
def test_what_is_said_is_the_same(short: Path, sampling: Sampling, head_rows: int, threads: list[bool]) -> None:
    prompt = tokens_of(short, PROMPTS[0])
    with model(short, head_rows) as running:
        without, _ = said(running, prompt, sampling, drafts=False, limit=14)
        assert not threads
        withs, figures = said(running, prompt, sampling, drafts=True, limit=14)
        assert withs == without
        # the first was drafted behind the prompt, others where what was drawn was not likely
        steps, ahead, passes = len(threads), sum(threads), figures.passes
        assert threads[:2] == [False, False]
        if head_rows < 32768:
            assert ahead > 0 and steps - ahead > 2
        else:
            assert ahead >= 2 * (passes - 3) and steps - ahead < ahead / 2 and passes < 13
        # the cache has what was said, and no draft
        assert running.cache.length == len(prompt) + 13


def test_texts_that_grow_together_are_drafted_ahead_together(short: Path, threads: list[bool]) -> None:
    prompts = [tokens_of(short, text) for text in PROMPTS]
    with model(short, 32768) as running:
        alone = [said(running, p, s, False, 12)[0] for p, s in zip(prompts, DRAWN, strict=False)]
        running.cache.truncate(0)
        talk = Conversation(running)
        lines = [begun(talk, p, s, 12) for p, s in zip(prompts, DRAWN, strict=False)]
        out: list[list[int]] = [[], []]
        while talk.lines:
            for line, token in talk.go_on():
                out[lines.index(line)].append(token)
            for line in [line for line in talk.lines if line.done]:
                talk.end(line)
    assert out == alone and sum(threads) > 4


class Stop(Exception):
    pass


def test_a_pass_that_breaks_off_in_the_head_leaves_the_next_one_right(short: Path) -> None:
    prompt = tokens_of(short, PROMPTS[1])
    with model(short, 32768) as running:
        expected, _ = said(running, prompt, Sampling(), drafts=False, limit=10)
        running.cache.truncate(0)
        talk = Conversation(running)
        line = begun(talk, prompt, Sampling(), 10)
        layers, out, broken, length = running._model.layers, list[int](), 0, 0
        seen: list[tuple[int, int]] = []

        def break_off(done: int, of: int, nbytes: int) -> None:
            seen.append((done, nbytes))
            # the last layer's own step is followed by those of the head
            if done == of == layers and len(seen) > 1 and seen[-2][0] == layers:
                raise Stop

        while not line.done:
            length = running.cache.length
            seen.clear()
            with pytest.raises(Stop):
                for _, token in talk.go_on(break_off):
                    out.append(token)
            assert running.cache.length == length
            broken += 1
            out += [token for _, token in talk.go_on()]
        talk.end(line)
    assert out == expected and broken > 2


def test_a_constraint_is_not_asked_what_might_come(short: Path, threads: list[bool]) -> None:
    """It follows what is drawn, and cannot go back."""

    class Everything:
        def __init__(self) -> None:
            self.drawn: list[int] = []

        def mask(self, logits: Floats) -> Floats:
            return logits

        def advance(self, token: int) -> None:
            self.drawn.append(token)

    constraint, prompt = Everything(), tokens_of(short, PROMPTS[0])
    with model(short, 32768) as running:
        tokens = list(
            generate(
                Conversation(running), prompt, Sampler(Sampling(), constraint), limit=8, eos=(), figures=Figures()
            )
        )
    assert constraint.drawn == tokens and threads and not any(threads)


def test_a_block_ends_when_the_work_beside_it_has() -> None:
    ended: list[str] = []
    begun = threading.Event()

    def work() -> int:
        assert begun.wait(60)
        time.sleep(0.05)
        ended.append("work")
        return 7

    with Background(work) as beside:
        ended.append("block")
        begun.set()
    assert ended == ["block", "work"] and beside.result == 7
    with pytest.raises(Stop), Background(work):
        raise Stop
    assert ended[2:] == ["work"]

    def fail() -> None:
        raise ValueError("beside")

    with pytest.raises(ValueError, match="beside"), Background(fail):
        pass
    with pytest.raises(Stop), Background(fail):
        raise Stop


def test_ctrl_c_waits_for_the_work_beside() -> None:
    ended: list[str] = []
    begun = threading.Event()

    def work() -> None:
        assert begun.wait(60)
        time.sleep(0.05)
        _thread.interrupt_main()
        time.sleep(0.2)
        ended.append("work")

    with pytest.raises(KeyboardInterrupt), Background(work):
        begun.set()
    assert ended == ["work"]
