"""The queue: accepted means kept, ended means once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashd.daemon import spool as spool_module
from flashd.daemon.job import HELD_BYTES, MAX_TEXT, OF_BIAS, OF_SCHEMA, Draw, State
from flashd.daemon.jobs import MOST_DEATHS, Jobs
from flashd.daemon.spool import Spool
from flashd.errors import Busy, UsageError
from tests.daemon.fake_worker import Clerk, request
from tests.waiting import wait


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.db", keep=50)
    yield spool
    spool.close()


@pytest.fixture
def jobs(spool: Spool) -> Jobs:
    return Jobs(spool, most_waiting=4)


def test_a_job_is_answered_and_stays_readable(jobs: Jobs) -> None:
    job, watch = jobs.ask(request("hi"))
    clerk = Clerk(jobs)
    events = list(watch)
    clerk.close()
    assert [e.kind for e in events] == ["queued", "started", "text", "text", "text", "ended"]
    kept = jobs.get(job.id)
    assert kept is not None and kept.state is State.DONE and kept.result.text == "one two three"
    assert jobs.last_text == "one two three"
    # one that comes late still learns how it ended
    assert [e.end.result.text for e in jobs.watch(job.id) if e.end] == ["one two three"]


def test_one_who_comes_late_misses_no_words(jobs: Jobs) -> None:
    job = jobs.submit(request())
    running = jobs.take(0)
    assert running is not None
    jobs.say(running, "one ")
    watch = jobs.watch(job.id)
    jobs.say(running, "two")
    jobs.finish(running, State.DONE, "stop")
    for late in (watch, jobs.watch(job.id)):
        assert "".join(e.text for e in late) == "one two"


def test_the_most_urgent_goes_first(jobs: Jobs) -> None:
    first, low, high = (jobs.submit(request(priority=p)) for p in (5, 1, 9))
    assert [jobs.position(j.id) for j in (high, first, low)] == [0, 1, 2]
    order = []
    while (job := jobs.take(0)) is not None:
        order.append(job.id)
        jobs.finish(job, State.DONE, "stop")
    assert order == [high.id, first.id, low.id]


def test_who_waits_is_told_his_place_as_it_changes(jobs: Jobs) -> None:
    jobs.submit(request())
    _, watch = jobs.ask(request())
    for _ in range(2):
        job = jobs.take(0)
        assert job is not None
        jobs.finish(job, State.DONE, "stop")
    assert [(e.kind, e.position) for e in watch if e.end is None] == [("queued", 1), ("moved", 1), ("started", 0)]


def test_the_queue_is_bounded_and_an_empty_prompt_refused(jobs: Jobs) -> None:
    for _ in range(4):
        jobs.submit(request())
    with pytest.raises(Busy, match="no room for another job: 4 waiting"):
        jobs.submit(request())
    with pytest.raises(UsageError, match="empty"):
        jobs.submit(request("  \n"))
    assert jobs.waiting == 4


def test_clients_leave_room_for_the_board_s_own(jobs: Jobs) -> None:
    for _ in range(3):
        jobs.submit(request(source="api"))
    with pytest.raises(Busy, match="no room for another job: 3 waiting"):
        jobs.submit(request(source="api"))
    jobs.submit(request(source="trigger:door"))
    with pytest.raises(Busy, match="4 waiting"):
        jobs.submit(request(source="serial:console"))


def test_prompts_that_wait_are_bounded_in_bytes(spool: Spool) -> None:
    jobs = Jobs(spool, most_waiting=100)
    most = HELD_BYTES // MAX_TEXT - 1
    for _ in range(most):
        jobs.submit(request("x" * MAX_TEXT))
    with pytest.raises(Busy, match=f"no room for this prompt beside {most} others"):
        jobs.submit(request("x" * MAX_TEXT))
    jobs.submit(request("a short one"))


@pytest.mark.parametrize(
    "more",
    [
        {"stop": ("x" * (HELD_BYTES // 4),)}, {"choose": ("x" * (HELD_BYTES // 4), "y")},
        {"json_schema": {"enum": ["x" * (HELD_BYTES // 4 // OF_SCHEMA)]}},
        {"draw": Draw(logit_bias=dict.fromkeys(range(HELD_BYTES // 4 // OF_BIAS), 1.0))},
    ],
)  # fmt: skip
def test_all_that_a_request_holds_counts(more: dict[str, Any], jobs: Jobs) -> None:
    for _ in range(3):
        jobs.submit(request(**more))
    with pytest.raises(Busy, match="no room for this prompt beside 3 others"):
        jobs.submit(request(**more))


def test_what_is_answered_or_still_read_counts_too(jobs: Jobs) -> None:
    large, watches = request("x" * MAX_TEXT), []
    for _ in range(HELD_BYTES // MAX_TEXT - 1):
        job, watch = jobs.ask(large)
        watches.append(watch)
        assert jobs.take(0) is job
        jobs.finish(job, State.DONE, "stop")
    with pytest.raises(Busy, match="no room for this prompt"):
        jobs.submit(large)
    watches[0].close()
    assert jobs.take(0) is None and jobs.submit(large)
    watches[1].close()
    running = jobs.take(0)
    assert running is not None and jobs.submit(large)
    with pytest.raises(Busy, match="no room for this prompt"):
        jobs.submit(large)


def test_a_sensor_that_fires_ten_times_asks_once(jobs: Jobs) -> None:
    numbers = {jobs.submit(request(source="trigger:door", coalesce=True)).id for _ in range(10)}
    assert len(numbers) == 1 and jobs.waiting == 1
    # once it runs, the next firing is news again
    running = jobs.take(0)
    assert running is not None
    assert jobs.submit(request(source="trigger:door", coalesce=True)).id != running.id


def test_a_source_may_ask_so_often_a_minute(jobs: Jobs) -> None:
    for _ in range(2):
        jobs.submit(request(source="trigger:door", per_minute=2))
    with pytest.raises(Busy, match="trigger:door asks more than 2 times a minute"):
        jobs.submit(request(source="trigger:door", per_minute=2))
    jobs.submit(request(source="trigger:bell", per_minute=2))


def test_a_waiting_and_a_running_job_can_be_cancelled(jobs: Jobs) -> None:
    running, waiting = jobs.submit(request()), jobs.submit(request())
    clerk = Clerk(jobs, paced=True)
    wait(lambda: jobs.running)
    assert jobs.cancel(waiting.id) and jobs.cancel(running.id) and not jobs.cancel(999)
    wait(lambda: not jobs.running)
    clerk.close()
    states = {j.id: j.state for j in jobs.recent(10)}
    assert states == {running.id: State.CANCELLED, waiting.id: State.CANCELLED}
    assert not jobs.cancel(running.id)


def test_barge_in_makes_the_running_job_wait_and_start_anew(jobs: Jobs) -> None:
    slow, watch = jobs.ask(request("slow", priority=3))
    clerk = Clerk(jobs, paced=True)
    assert clerk.permits is not None
    clerk.permits.release()
    wait(lambda: slow.result.text == "one ")
    urgent = jobs.submit(request("now", priority=8, barge_in=True))
    wait(lambda: [j.id for j in jobs.running] == [urgent.id])
    clerk.permits.release(6)
    events = list(watch)
    clerk.close()
    assert [j.id for j in clerk.answered] == [urgent.id, slow.id]
    assert "restarted" in [e.kind for e in events]
    assert events[-1].end is not None and events[-1].end.result.text == "one two three"


def test_one_of_equal_priority_does_not_barge_in(jobs: Jobs) -> None:
    first = jobs.submit(request(priority=5))
    job = jobs.take(0)
    jobs.submit(request(priority=5, barge_in=True))
    assert job is not None and job.id == first.id and jobs.wanted(job)


def test_a_job_that_waited_too_long_expires(jobs: Jobs) -> None:
    late = jobs.submit(request(deadline=0.01))
    time.sleep(0.02)
    assert jobs.take(0) is None
    kept = jobs.get(late.id)
    assert kept is not None and kept.state is State.EXPIRED and "0.01 s" in kept.result.finish


def test_what_was_accepted_outlives_the_process(jobs: Jobs, spool: Spool) -> None:
    """The file is opened anew while the first daemon still has it, as after a power cut: nothing was closed."""
    numbers = [jobs.submit(request(f"{i}")).id for i in range(3)]
    job = jobs.take(0)
    assert job is not None
    again = Spool(spool.path, keep=50)
    after = Jobs(again, most_waiting=4)
    clerk = Clerk(after)
    wait(lambda: after.waiting == 0 and not after.running)
    clerk.close()
    assert [j.id for j in clerk.answered] == numbers
    assert {j.state for j in after.recent(10)} == {State.DONE}
    again.close()


def test_a_job_that_kills_the_daemon_is_given_up(jobs: Jobs, spool: Spool) -> None:
    deadly = jobs.submit(request())
    for _ in range(MOST_DEATHS):
        assert jobs.take(0) is not None
        jobs = Jobs(spool, most_waiting=4, died=True)
    assert jobs.take(0) is None
    kept = jobs.get(deadly.id)
    assert kept is not None and kept.state is State.FAILED and "died 3 times" in kept.result.finish


def test_no_job_is_charged_with_a_kill_from_outside(jobs: Jobs, spool: Spool) -> None:
    job = jobs.submit(request())
    for _ in range(10):
        assert jobs.take(0) is not None
        jobs = Jobs(spool, most_waiting=4, died=False)
    taken = jobs.take(0)
    assert taken is not None and taken.id == job.id


def test_of_jobs_that_ran_together_only_the_deadly_one_is_given_up(jobs: Jobs, spool: Spool) -> None:
    """The daemon dies whenever the first job runs; the second is beside it as often as the queue allows."""
    deadly, other = jobs.submit(request("deadly", priority=9)), jobs.submit(request("harmless"))
    for _ in range(2 * MOST_DEATHS + 2):
        job = jobs.take(0)
        if job is None:
            break
        together = [job]
        while (beside := jobs.next) is not None and jobs.take_beside(beside):
            together.append(beside)
        if deadly.id in [j.id for j in together]:
            jobs = Jobs(spool, most_waiting=4, died=True)
        else:
            jobs.finish(job, State.DONE, "stop")
    states = {job.id: (job.state, job.result.finish) for job in jobs.recent(10)}
    assert states == {
        other.id: (State.DONE, "stop"), deadly.id: (State.FAILED, f"flashd died {MOST_DEATHS} times answering it")
    }  # fmt: skip


def test_a_suspect_waits_for_all_others_and_runs_alone(jobs: Jobs, spool: Spool) -> None:
    suspect = jobs.submit(request(priority=9))
    assert jobs.take(0) is not None
    jobs = Jobs(spool, most_waiting=4, died=True)
    other = jobs.submit(request(priority=0))
    first = jobs.take(0)
    assert first is not None and first.id == other.id
    last = jobs.next
    assert last is not None and last.id == suspect.id and not jobs.take_beside(last)
    jobs.finish(first, State.DONE, "stop")
    last = jobs.take(0)
    late = jobs.submit(request(priority=9))
    beside = jobs.next
    assert last is not None and beside is not None and beside.id == late.id and not jobs.take_beside(beside)


def test_a_suspect_stays_one_through_a_restart(jobs: Jobs, spool: Spool) -> None:
    """Two ran when the daemon died, so nobody is charged. A clean restart later, both still run alone."""
    numbers = {jobs.submit(request(f"{i}")).id for i in range(2)}
    first = jobs.take(0)
    assert first is not None and (second := jobs.next) is not None and jobs.take_beside(second)
    jobs = Jobs(spool, most_waiting=4, died=True)
    for died in (False, True, True, True):
        jobs = Jobs(spool, most_waiting=4, died=died)  # nothing ran: nothing is charged
    other = jobs.submit(request("other", priority=0))
    taken = jobs.take(0)
    assert taken is not None and taken.id == other.id and jobs.next is not None and not jobs.take_beside(jobs.next)
    jobs.finish(taken, State.DONE, "stop")
    for _ in numbers:
        taken = jobs.take(0)
        assert taken is not None and (jobs.next is None or not jobs.take_beside(jobs.next))
        jobs.finish(taken, State.DONE, "stop")
    assert {job.state for job in jobs.recent(9)} == {State.DONE}


def test_old_jobs_are_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "small.db", keep=5)
    jobs = Jobs(spool, most_waiting=4)
    for _ in range(12):
        jobs.submit(request())
        job = jobs.take(0)
        assert job is not None
        jobs.finish(job, State.DONE, "stop")
    assert [j.id for j in jobs.recent(100)] == [12, 11, 10, 9, 8]
    spool.close()


def test_the_spool_is_bounded_in_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "MOST_BYTES", 100_000)
    spool = Spool(tmp_path / "large.db", keep=1000)
    jobs = Jobs(spool, most_waiting=4)
    waiting = jobs.submit(request("a job that waits is never forgotten", priority=1))
    for _ in range(12):
        jobs.submit(request("x" * 30_000))
        job = jobs.take(0)
        assert job is not None
        jobs.finish(job, State.DONE, "stop")
    assert [j.id for j in jobs.recent(100)] == [13, 12, 11, waiting.id]
    spool.close()


def test_the_last_answer_outlives_a_restart(jobs: Jobs, spool: Spool) -> None:
    jobs.submit(request())
    job = jobs.take(0)
    assert job is not None
    jobs.say(job, "It rains.")
    jobs.finish(job, State.DONE, "stop")
    assert Jobs(spool, most_waiting=4).last_text == "It rains."


def test_a_queue_that_stops_takes_nothing_and_cancels_nothing(jobs: Jobs) -> None:
    job = jobs.submit(request())
    jobs.close()
    with pytest.raises(Busy, match="stopping"):
        jobs.submit(request())
    assert not jobs.cancel(job.id)
