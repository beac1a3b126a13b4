"""The worker with a card that is pulled: a job fails in words, or waits and goes on, as configured."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flashd.bundle.file import Patience
from flashd.bundle.reader import Bundle
from flashd.config.settings import Answering, parse
from flashd.daemon.job import Job, State
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.daemon.spool import Spool
from flashd.daemon.worker import Worker
from flashd.engine import engine as engines
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.engine.planning.draft import Pair, plan_draft
from tests.daemon.fake_worker import request
from tests.engine.test_paths import plan
from tests.faults.layers import Card
from tests.waiting import wait


class Told(Notifier):
    """What systemd would be told."""

    def __init__(self) -> None:
        super().__init__()
        self.fed = 0
        self.statuses: list[str] = []

    def alive(self) -> None:
        self.fed += 1

    def status(self, text: str) -> None:
        self.statuses.append(text)


class Desk:
    """A queue and a worker over an engine that pages everything, with a draft on the same card or without."""

    def __init__(self, path: Path, spool: Path, seconds: float, draft: Path | None) -> None:
        self._spool = Spool(spool, keep=20)
        self.jobs = Jobs(self._spool, most_waiting=8)
        self._bundle = Bundle(path, Patience(seconds))
        self.told = Told()
        self._draft = Bundle(draft) if draft else None
        self.engine = Engine(self._bundle, Budget(None, 128, 1), draft=self._draft)
        prompts = Prompts(self._bundle)
        self._worker = Worker(
            self.jobs, self.engine, prompts, None, Answering(max_tokens=12, temperature=0), self.told
        )
        self._worker.start()

    def close(self) -> None:
        self._worker.stop()
        self.engine.close()
        self._bundle.close()
        if self._draft:
            self._draft.close()
        self.jobs.close()
        self._spool.close()

    def ask(self, text: str = "the thesis") -> Job:
        """The job as it ended."""
        job, watch = self.jobs.ask(request(text))
        *_, last = watch
        watch.close()
        assert last.end is not None and last.end.id == job.id
        return last.end


@contextmanager
def desk(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, with_draft: bool = False,
    model: Path | None = None,
) -> Iterator[Desk]:  # fmt: skip
    """With `model`, the model is there, and the card has its draft."""
    path = card.path if model else None
    if with_draft:
        path = Path(shutil.copy(card.path, card.path.with_name("draft.flash")))
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < 3)
    monkeypatch.setattr(Pace, "count", lambda self, draft, least, most, steps, ahead: min(most, len(draft)))

    def paged(bundle: Bundle, budget: Budget, draft: Bundle | None) -> Pair:
        small = plan_draft(draft, budget.context, 1) if draft else None
        return Pair(replace(plan(bundle, 0.0, context=budget.context), draft=small), None, lambda plan: 1.0)

    monkeypatch.setattr(engines, "plans_for", paged)
    opened = Desk(model or card.path, tmp_path / "spool.db", seconds, path)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("draft", [False, True])
def test_a_job_fails_in_words_and_the_next_works(
    draft: bool, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with desk(card, tmp_path, monkeypatch, 0, draft) as opened:
        right = opened.ask()
        assert right.state is State.DONE
        card.pull(after=8)
        failed = opened.ask()
        assert failed.state is State.FAILED and "is the card in place?" in failed.result.finish
        assert str(card.path) in failed.result.finish
        card.put_back()
        again = opened.ask()
        assert again.state is State.DONE and again.result.text == right.result.text


def test_an_answer_goes_on_without_a_draft_whose_card_is_gone(
    card: Card, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with desk(card, tmp_path, monkeypatch, 0, model=tiny_bundle) as opened:
        right = opened.ask()
        assert right.result.figures["drafted"] > 0
        card.pull()
        for _ in range(2):  # only what was likely in passes before is guessed
            without = opened.ask("the thesis, again")
            assert without.state is State.DONE
        (said,) = [m for m in caplog.messages if m.startswith("no drafts: ")]
        assert str(card.path) in said
        card.put_back()
        assert opened.ask("the thesis, again").result.text == without.result.text
        again = opened.ask()
        assert again.result.text == right.result.text
        assert again.result.figures["accepted"] >= right.result.figures["accepted"] > 0


@pytest.mark.parametrize("draft", [False, True])
def test_a_job_waits_for_the_card_and_goes_on(
    draft: bool, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with desk(card, tmp_path, monkeypatch, 60, draft) as opened:
        right = opened.ask()
        card.pull(after=8)
        told = opened.told

        def put_back() -> None:
            wait(lambda: told.statuses.count("waiting for the card") >= 2)
            card.put_back()

        helper = threading.Thread(target=put_back)
        helper.start()
        job = opened.ask()
        helper.join()
        assert job.state is State.DONE and job.result.text == right.result.text
        # the watchdog was fed meanwhile, and what is done now is told again
        last_wait = len(told.statuses) - 1 - told.statuses[::-1].index("waiting for the card")
        assert any(s.startswith("answering") for s in told.statuses[last_wait:])


def test_a_job_that_waits_for_the_card_can_be_cancelled(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with desk(card, tmp_path, monkeypatch, 600) as opened:
        card.pull(after=8)
        job, watch = opened.jobs.ask(request("the thesis"))
        wait(lambda: "waiting for the card" in opened.told.statuses)
        assert opened.jobs.cancel(job.id)
        *_, last = watch
        assert last.end is not None and last.end.state is State.CANCELLED
        watch.close()
        card.put_back()
        assert opened.ask().state is State.DONE


def test_a_stop_does_not_wait_for_the_card(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk(card, tmp_path, monkeypatch, 600) as opened:
        card.pull(after=8)
        job = opened.jobs.submit(request("the thesis"))
        wait(lambda: "waiting for the card" in opened.told.statuses)
    again = Spool(tmp_path / "spool.db", keep=20)
    assert [j.id for j in again.waiting()] == [job.id]
    again.close()


def test_the_configuration_says_how_long() -> None:
    assert parse("card: {wait: 60}").card.wait == 60
    assert parse("").card.wait == 0
