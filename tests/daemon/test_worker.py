"""The worker with a real engine that pages: how fast it lets go, and what the journal is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flashd.bundle.reader import Bundle
from flashd.config.settings import Answering
from flashd.daemon import worker as worker_module
from flashd.daemon.job import Job, Request, State, Turn
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.daemon.spool import Spool
from flashd.daemon.worker import Worker
from flashd.engine.decoding.schemas import held_by_answer
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.engine.planning import plan as planning
from flashd.engine.planning.plan import smallest
from flashd.errors import CardError
from flashd.system.memory import MIB, resident_now
from tests.daemon.fake_worker import request
from tests.waiting import wait

MIDDLE = 7
"""Steps of a worker that begins with one to three jobs, up to the middle of its first pass through six layers."""

YES_OR_NO = {"enum": ["yes", "no"]}


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers take less memory whole than in pages, and here they have to page."""
    monkeypatch.setattr(planning, "_can_be_whole", lambda header: False)


class Steps(Notifier):
    """Counts what the engine does, and cancels in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.at: int | None = None
        self.count = 0
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def alive(self) -> None:
        self.count += 1
        if self.at is not None and self.count >= self.at and not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(30)


@pytest.mark.parametrize("how", ["cancel", "barge in", "stop"])
def test_a_job_is_let_go_within_one_layer(
    how: str, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spool, steps = Spool(tmp_path / "spool.db", keep=10), Steps()
    jobs = Jobs(spool, most_waiting=4)
    with Bundle(short) as bundle:
        prompts = Prompts(bundle)
        least = smallest(bundle.header, 256, resident_now(), threads=2) + 2 * MIB
        with Engine(bundle, Budget(least, 256, 2)) as engine:
            assert not engine.plan.resident
            worker = Worker(jobs, engine, prompts, None, Answering(max_tokens=2), steps)
            job = jobs.submit(request("Hello?"))
            steps.at = MIDDLE  # of the prompt's pass
            worker.start()
            assert steps.reached.wait(60)
            before = steps.count
            if how == "cancel":
                assert jobs.cancel(job.id)
            elif how == "barge in":
                jobs.submit(request("Now!", priority=9, barge_in=True))
            stopper = threading.Thread(target=worker.stop)
            if how == "stop":
                stopper.start()
            watch = jobs.watch(job.id)
            steps.go_on.set()
            kinds: list[str] = []
            while not kinds or kinds[-1] not in ("ended", "restarted"):
                event = watch.next(60)
                assert event is not None
                kinds.append(event.kind)
            # the step it was in ends at once; what else it counted is the queue's own turn
            assert steps.count - before <= 2
            if how != "stop":
                stopper.start()
            stopper.join()
    kept = jobs.get(job.id)
    assert kept is not None and kept.state is (State.CANCELLED if how == "cancel" else State.QUEUED)
    fields = [r.__dict__ for r in caplog.records if "JOB_ID" in r.__dict__]
    assert fields and fields[0]["JOB_ID"] == job.id and fields[0]["TRIGGER"] == "test"
    assert {"TOKENS", "CARD_BYTES"} <= set(fields[-1])
    jobs.close()
    spool.close()


class Office:
    """A queue, a spool and a worker with an engine that pages, whose passes are counted."""

    def __init__(self, jobs: Jobs, worker: Worker, engine: Engine, steps: Steps) -> None:
        self.jobs, self.worker, self.engine, self.steps = jobs, worker, engine, steps
        self.rows: list[int] = []  # tokens of each pass
        forward = engine.model.forward

        def counted(tokens, *rest, **more):  # type: ignore[no-untyped-def]
            self.rows.append(len(tokens))
            return forward(tokens, *rest, **more)

        engine.model.forward = counted  # type: ignore[method-assign]

    def hold(self) -> None:
        """The worker stands still in the middle of its next pass."""
        self.steps.at = self.steps.count + MIDDLE
        self.worker.start()
        assert self.steps.reached.wait(60)

    def end(self, *jobs: Job) -> list[State]:
        wait(lambda: all(job.state.ended for job in jobs), 60)
        return [job.state for job in jobs]


@contextmanager
def office(bundle_path: Path, tmp_path: Path, context: int = 256, tokens: int = 8) -> Iterator[Office]:
    spool, steps = Spool(tmp_path / "spool.db", keep=20), Steps()
    jobs = Jobs(spool, most_waiting=10)
    with Bundle(bundle_path) as bundle:
        prompts = Prompts(bundle)
        least = smallest(bundle.header, context, resident_now(), threads=2) + 2 * MIB
        with Engine(bundle, Budget(least, context, 2)) as engine:
            assert not engine.plan.resident
            worker = Worker(jobs, engine, prompts, None, Answering(max_tokens=tokens, temperature=0), steps)
            try:
                yield Office(jobs, worker, engine, steps)
            finally:
                steps.go_on.set()
                worker.stop()
    jobs.close()
    spool.close()


QUESTIONS = ("Hello?", "What is rain?", "Name a colour.")


def test_who_brings_no_system_message_has_the_configuration_s(short: Path, tmp_path: Path) -> None:
    own = (Turn("system", "You are a pirate of the seven seas."), Turn("user", "Hello?"))
    with office(short, tmp_path) as o:
        o.worker.answering = Answering(max_tokens=1, system="You are a poet.")
        jobs = [o.jobs.submit(r) for r in (request("Hello?"), Request(turns=own, source="test"))]
        o.steps.go_on.set()
        o.worker.start()
        o.end(*jobs)
        used = [job.result.figures["prompt_tokens"] + job.result.figures["reused_tokens"] for job in jobs]
    with Bundle(short) as bundle:
        prompts = Prompts(bundle)
        poet = prompts.tokens([Message("system", "You are a poet."), Message("user", "Hello?")])
        pirate = prompts.tokens([Message(turn.role, turn.content) for turn in own])
    assert used == [len(poet), len(pirate)] and len(poet) != len(pirate)


def test_what_comes_meanwhile_is_answered_together(packed: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    with office(packed["int4"], tmp_path / "alone") as o:
        o.steps.go_on.set()
        o.worker.start()
        alone = []
        for question in QUESTIONS:
            job = o.jobs.submit(request(question))
            o.end(job)
            alone.append(job)
        card_alone, rows_alone = o.worker.totals.card_bytes, len(o.rows)
    with office(packed["int4"], tmp_path) as o:
        first = o.jobs.submit(request(QUESTIONS[0]))
        o.hold()
        jobs = [first, *(o.jobs.submit(request(q)) for q in QUESTIONS[1:])]
        watch = o.jobs.watch()
        o.steps.go_on.set()
        assert o.end(*jobs) == [State.DONE] * 3
        assert [j.result.text for j in jobs] == [j.result.text for j in alone]
        # two passes more than the first one takes: the others' prompts, and what they say behind its end
        assert len(o.rows) < rows_alone / 2
        # and what was read ahead in vain, where texts that grow take room back
        assert o.worker.totals.card_bytes < (len(o.rows) + 1) * card_alone / rows_alone
        assert o.worker.totals.jobs == 3
        watch.close()
        kinds = [(e.job, e.kind) for e in watch if e.kind in ("started", "ended")]
    assert kinds[:2] == [(jobs[1].id, "started"), (jobs[2].id, "started")]


def test_a_talk_of_any_length_is_shortened_in_few_tries(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try renders and cuts up all of it; meanwhile nobody else is answered."""
    tries: list[int] = []
    tokens = Prompts.tokens

    def counted(self: Prompts, messages: Sequence[Message], *more: Any) -> list[int]:
        tries.append(len(messages))
        return tokens(self, messages, *more)

    monkeypatch.setattr(Prompts, "tokens", counted)
    talk = [Turn("system", "Be brief."), *(Turn(("user", "assistant")[i % 2], f"{i} " * 200) for i in range(900))]
    with office(short, tmp_path) as o:
        o.steps.go_on.set()
        o.worker.start()
        ask = Request(turns=(*talk, Turn("user", "Hello?")), source="test", forget=True)
        job = o.jobs.submit(ask)
        assert o.end(job) == [State.DONE]
        assert len(tries) < 12 and tries[-1] < 10
        assert job.result.forgotten == 902 - tries[-1]  # which a console tells the person
        tries.clear()
        said = (Turn("user", "Hello?"), Turn("assistant", "Hi."), Turn("user", "Who are you?"))
        fits = Request(turns=(talk[0], *said), source="test", forget=True)
        assert o.end(o.jobs.submit(fits)) == [State.DONE] and tries == [4]  # one that fits is cut up once
        long = o.jobs.submit(Request(turns=(Turn("user", "word " * 40_000),), source="test"))
        assert o.end(long) == [State.FAILED] and long.result.refused
        assert "more than 255 tokens and the context room for 255" in long.result.finish


def test_what_is_drawn_is_drawn_again_after_an_interruption(short: Path, tmp_path: Path) -> None:
    """Who was told a part of it is told the rest of the same."""
    with office(short, tmp_path, tokens=16) as o:
        o.worker.answering = Answering(max_tokens=16, temperature=1.5)
        job, watch = o.jobs.ask(request("Tell me something."))
        o.worker.start()
        text = ""
        for event in watch:
            text += event.text if event.kind == "text" else ""
            if event.kind == "text" and len(text) > 12:
                break
        urgent = o.jobs.submit(request("Now.", barge_in=True, priority=9))
        assert o.end(job, urgent) == [State.DONE] * 2
        assert job.result.text.startswith(text)
        other = o.jobs.submit(request("Tell me something."))
        assert o.end(other) == [State.DONE] and other.result.text != job.result.text


def test_grammars_beyond_what_is_planned_are_followed_one_after_another(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(worker_module, "HELD_BY_ANSWERS", held_by_answer(YES_OR_NO) + 1)
    monkeypatch.setattr(worker_module, "held_by_schemas", lambda _: 0)  # this plan leaves no room for them
    with office(short, tmp_path) as here:
        first, second = (here.jobs.submit(request("Is it?", json_schema=YES_OR_NO)) for _ in range(2))
        plain = here.jobs.submit(request("Hello?"))
        most: list[int] = []

        def note(text: str) -> None:
            most.append(sum(job.request.json_schema is not None for job in here.jobs.running))

        here.steps.status = note  # type: ignore[method-assign]
        here.worker.start()
        assert here.end(first, second, plain) == [State.DONE] * 3
    assert max(most) == 1


def test_one_of_several_is_cancelled_and_the_others_go_on(short: Path, tmp_path: Path) -> None:
    with office(short, tmp_path) as o:
        jobs = [o.jobs.submit(request(q)) for q in QUESTIONS]
        o.hold()
        assert {j.id for j in o.jobs.running} == {j.id for j in jobs}
        assert o.jobs.cancel(jobs[1].id)
        before = len(o.rows)
        o.steps.go_on.set()
        o.end(jobs[1])
        # at once: not when the pass has ended
        assert len(o.rows) == before
        assert o.end(*jobs) == [State.DONE, State.CANCELLED, State.DONE]
        assert jobs[1].result.text == ""


def test_one_that_barges_in_has_the_engine_for_itself(short: Path, tmp_path: Path) -> None:
    with office(short, tmp_path) as o:
        jobs = [o.jobs.submit(request(q)) for q in QUESTIONS[:2]]
        o.hold()
        urgent = o.jobs.submit(request("Now!", priority=9, barge_in=True))
        watch = o.jobs.watch()
        o.steps.go_on.set()
        assert o.end(urgent, *jobs) == [State.DONE] * 3
        watch.close()
        order = [(e.job, e.kind) for e in watch if e.kind in ("started", "ended", "restarted")]
    assert sorted(order[:2]) == [(j.id, "restarted") for j in jobs]
    assert order[2:4] == [(urgent.id, "started"), (urgent.id, "ended")]
    assert sorted(order[4:6]) == [(j.id, "started") for j in jobs]


@pytest.mark.parametrize("how", ["stop", "card"])
def test_what_ends_a_pass_ends_it_for_all(short: Path, tmp_path: Path, how: str) -> None:
    with office(short, tmp_path) as o:
        jobs = [o.jobs.submit(request(q)) for q in QUESTIONS]
        o.hold()
        if how == "card":
            o.engine.model.cache.advance = broken  # type: ignore[method-assign]
            o.steps.go_on.set()
            assert o.end(*jobs) == [State.FAILED] * 3
            assert {j.result.finish for j in jobs} == {"the card is gone"}
            return
        stopper = threading.Thread(target=o.worker.stop)
        stopper.start()
        o.steps.go_on.set()
        stopper.join()
        assert [j.state for j in jobs] == [State.QUEUED] * 3 and not o.jobs.running


def test_an_error_in_flashd_ends_the_job_that_meets_it_and_no_other(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it is met while others run, when the worker looks whether the next one may join them."""
    tokens = Prompts.tokens

    def strange(self: Prompts, messages: Sequence[Message], *more: Any) -> list[int]:
        if messages[-1].content == QUESTIONS[1]:
            raise RuntimeError("never thought of")
        return tokens(self, messages, *more)

    monkeypatch.setattr(Prompts, "tokens", strange)
    with office(short, tmp_path) as o:
        jobs = [o.jobs.submit(request(q)) for q in QUESTIONS]
        o.hold()
        o.steps.go_on.set()
        assert o.end(*jobs) == [State.DONE, State.FAILED, State.DONE]
        assert "never thought of" in jobs[1].result.finish


def broken(tokens: int, of_texts: Mapping[int, int] | None = None) -> None:
    raise CardError("the card is gone")


def test_one_for_which_there_is_no_room_waits(short: Path, tmp_path: Path) -> None:
    with office(short, tmp_path, context=64, tokens=20) as o:
        jobs = [o.jobs.submit(request("Hello?")), o.jobs.submit(request("Go on. " * 5))]
        decision = o.jobs.submit(request("Rain?", choose=("yes", "no")))
        o.hold()
        assert [j.id for j in o.jobs.running] == [jobs[0].id]
        o.steps.go_on.set()
        assert o.end(*jobs, decision) == [State.DONE] * 3
    assert decision.result.text in ("yes", "no")
