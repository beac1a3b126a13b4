"""The worker with a real engine that pages: how fast it lets go, and what the journal is told."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from flashd.bundle.reader import Bundle
from flashd.config import Answering
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.daemon.spool import Spool
from flashd.daemon.worker import Worker
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.engine.plan import MIB, resident_now, smallest
from tests.daemon.clerk import request


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
    how: str, packed: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spool, steps = Spool(tmp_path / "spool.db", keep=10), Steps()
    jobs = Jobs(spool, most_waiting=4)
    with Bundle(packed["int4"]) as bundle:
        prompts = Prompts(bundle)
        least = smallest(bundle.header, 256, resident_now()) + 8 * MIB
        with Engine(bundle, Budget(least, 256, 2)) as engine:
            assert not engine.plan.resident
            worker = Worker(jobs, engine, prompts, None, Answering(max_tokens=2), steps)
            job = jobs.submit(request("Hello?"))
            steps.at = 20  # in the middle of the prompt's pass
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
