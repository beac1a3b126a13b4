"""The worker with a card that is pulled: a job fails in words, or waits and goes on, as configured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.engine.planning.plan import Plan
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
    """A queue and a worker over an engine that pages everything."""

    def __init__(self, path: Path, spool: Path, seconds: float) -> None:
        self._spool = Spool(spool, keep=20)
        self.jobs = Jobs(self._spool, most_waiting=8)
        self._bundle = Bundle(path, Patience(seconds))
        self.told = Told()
        self.engine = Engine(self._bundle, Budget(None, 128, 1))
        prompts = Prompts(self._bundle)
        self._worker = Worker(
            self.jobs, self.engine, prompts, None, Answering(max_tokens=12, temperature=0), self.told
        )
        self._worker.start()

    def close(self) -> None:
        self._worker.stop()
        self.engine.close()
        self._bundle.close()
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
def desk(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[Desk]:
    def paged(bundle: Bundle, budget: Budget) -> Plan:
        return plan(bundle, 0.0, context=budget.context)

    monkeypatch.setattr(engines, "plan_for", paged)
    opened = Desk(card.path, tmp_path / "spool.db", seconds)
    try:
        yield opened
    finally:
        opened.close()


def test_a_job_fails_in_words_and_the_next_works(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk(card, tmp_path, monkeypatch, 0) as opened:
        right = opened.ask()
        assert right.state is State.DONE
        card.pull(after=8)
        failed = opened.ask()
        assert failed.state is State.FAILED and "is the card in place?" in failed.result.finish
        assert str(card.path) in failed.result.finish
        card.put_back()
        again = opened.ask()
        assert again.state is State.DONE and again.result.text == right.result.text


def test_a_job_waits_for_the_card_and_goes_on(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk(card, tmp_path, monkeypatch, 60) as opened:
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
