"""Jobs: accepted, queued, watched, cancelled, ended. Accepted means kept.

Devices and the API submit and watch; one worker takes and ends. All of it may be called from any thread.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from flashd.daemon import limits
from flashd.daemon.job import API, Event, Head, Job, Request, Scored, State, Turn, gone_on, missed
from flashd.daemon.spool import Spool
from flashd.daemon.watch import Sink, Watch
from flashd.engine.decoding.tools.calls import CallPart, grown
from flashd.errors import Busy, CannotWrite

log = logging.getLogger(__name__)

MOST_DEATHS = 3
"""Deaths of the daemon, each while it answered one job alone, after which that job is given up."""

LAST = 10
"""Where a suspect stands in the queue: behind every priority."""


class Jobs:
    """The queue. `most_waiting` bounds what waits; each ended job is in the spool until it is among the oldest.

    `died`: the last run ended by something in the process itself. What ran then is suspect: it is answered when
    nothing else waits, and alone, so that a further death is its own.
    """

    def __init__(self, spool: Spool, most_waiting: int, died: bool = False) -> None:
        self._spool = spool
        self._most = most_waiting
        self._changed = threading.Condition(threading.RLock())
        self._waiting: list[tuple[int, int, Job]] = []  # a heap: (-priority, id, job)
        self._running: dict[int, Job] = {}
        self._interrupted: set[int] = set()
        self._going_on: set[int] = set()  # they wait behind calls that were made for them
        self._suspects: set[int] = set()
        self._cancelled: set[int] = set()
        self._watches: list[Watch] = []
        self._rates = limits.Rates()
        self._monotonic: dict[int, float] = {}
        self._unkept: deque[Job] = deque()  # ended, and not in the spool so yet: the disk is full
        self._closed = False
        self.last_text = ""
        self._recover(died)

    # --- for those who ask --------------------------------------------------------------------------------

    def submit(self, request: Request) -> Job:
        """Accepts a request: it is in the spool when this returns.

        Raises Busy where too many wait or its source asks too often; UsageError where it is empty or too long.
        """
        limits.check_texts(request)
        with self._changed:
            if self._closed:
                raise Busy("flashd is stopping; try again when it runs")
            same = self._same(request)
            if same is not None:
                return same
            if request.session is not None:
                self._check_session(request.session)
            self._rates.check(request)
            self.check_room([request])
            job = self._spool.add(request)
            self._rates.note(request.source, request.per_minute)
            self._monotonic[job.id] = time.monotonic()
            self._enqueue(job)
            self._tell(self._place(job, "queued"))
            if request.barge_in:
                self._interrupted |= {j.id for j in self.running if j.request.priority < request.priority}
            self._changed.notify_all()
        log.info("%s accepted", job, extra=job.fields)
        return job

    def continued(self, request: Request, session: str, anew: bool = False) -> Request:
        """The request behind what its session said before; `anew`: that is forgotten. Raises Busy, CannotWrite."""
        with self._changed:
            self._check_session(session)
            last = None if anew else self._spool.last_of(session)
        return gone_on(last, request, session)

    def watch(self, number: int | None = None, sink: Sink | None = None) -> Watch:
        """The events of a job, of all jobs from now on for None. One who comes late is told what was said so far,
        and one who waits his place in the queue, now and whenever it changes.

        They wait to be asked for, or go to `sink` as they happen.
        """
        watch = Watch(self._forget_watch, number, sink)
        with self._changed:
            self._watches.append(watch)
            job = watch.holds = self.get(number) if number is not None else None
            for event in missed(job, self.position(job.id)) if job is not None else ():
                watch.put(event)
        return watch

    def ask(self, request: Request, sink: Sink | None = None) -> tuple[Job, Watch]:
        """Submits a request and watches it, missing nothing. Raises Busy, UsageError."""
        with self._changed:
            job = self.submit(request)
            return job, self.watch(job.id, sink)

    def check_room(self, requests: Sequence[Request]) -> None:
        """Raises NoRoom unless all of them would be accepted now, UsageError if they never would."""
        with self._changed:
            waiting = [job for _, _, job in self._waiting]
            watched = [watch.holds for watch in self._watches if watch.holds is not None]
            held = {job.id: job.asked for job in (*waiting, *self._running.values(), *watched)}
            limits.check_room(requests, self._most_of(requests[0]), len(waiting), held.values())

    def _most_of(self, request: Request) -> int:
        """Jobs that may wait when this one is accepted."""
        return self.most_of_clients if request.source == API else self._most

    def cancel(self, number: int) -> bool:
        """Ends a job that waits or runs. False if it has ended or was never there, or we stop: it is then kept."""
        with self._changed:
            if self._closed:
                return False
            if number in self._running:
                self._cancelled.add(number)
                return True
            for entry in self._waiting:
                if entry[1] == number:
                    self._waiting.remove(entry)
                    heapq.heapify(self._waiting)
                    self._end(entry[2], State.CANCELLED, "cancelled")
                    return True
        return False

    def get(self, number: int) -> Job | None:
        with self._changed:
            return self._find(number) or self._spool.get(number)

    def recent(self, most: int) -> list[Job]:
        return self._spool.recent(most)

    def heads(self, most: int, before: int) -> list[Head]:
        """What the latest jobs before a number begin with, newest first."""
        return self._spool.heads(most, before)

    def position(self, number: int) -> int:
        """How many jobs go before a waiting one."""
        with self._changed:
            order = sorted(entry[:2] for entry in self._waiting)
            before = next((i for i, entry in enumerate(order) if entry[1] == number), 0)
            return before + len(self._running)

    @property
    def most_of_clients(self) -> int:
        """Jobs of the API that may wait; a quarter of the places is for the board's own consoles and triggers."""
        return self._most - self._most // 4

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> tuple[Job, ...]:
        with self._changed:
            return tuple(self._running.values())

    # --- for the worker -----------------------------------------------------------------------------------

    def take(self, timeout: float) -> Job | None:
        """The next job to answer, or None where none came in `timeout` seconds.

        Raises CannotWrite where the spool cannot be written; the job then goes on waiting.
        """
        with self._changed:
            if not self._waiting:
                self._changed.wait(timeout)
            with suppress(CannotWrite):
                self._keep_ended()
            job = self.next
            if job is not None:
                self._start(job)
            return job

    @property
    def next(self) -> Job | None:
        """The one that is to be taken next, of those that wait."""
        with self._changed:
            while self._waiting:
                job = self._waiting[0][2]
                if not self._too_late(job):
                    return job
                heapq.heappop(self._waiting)
                self._end(job, State.EXPIRED, job.lateness)
        return None

    def take_beside(self, job: Job) -> bool:
        """Takes a job beside those that run, if it is still the next and none is suspect. Raises CannotWrite."""
        with self._changed:
            if self.next is not job or self._suspects & {job.id, *self._running}:
                return False
            self._start(job)
            return True

    def wanted(self, job: Job) -> bool:
        """Whether a running job should go on: nobody cancelled it and nothing more urgent came."""
        return job.id not in self._interrupted and not self._given_up(job)

    def preempted(self, job: Job) -> bool:
        """Whether a running job only makes way: it was neither cancelled nor is it too late."""
        return job.id in self._interrupted and not self._given_up(job)

    def say(self, job: Job, text: str, scored: tuple[Scored, ...] = ()) -> None:
        """More of a running job's answer."""
        with self._changed:
            job.result.text += text
            self._tell(Event(kind="text", job=job.id, text=text, scored=scored))

    def think(self, job: Job, text: str) -> None:
        """More of what a running job's model thinks before it answers."""
        with self._changed:
            job.result.thoughts += text
            self._tell(Event(kind="thought", job=job.id, text=text))

    def call(self, job: Job, part: CallPart) -> None:
        """More of a call in a running job's answer."""
        with self._changed:
            job.result.calls = grown(job.result.calls, part, job.id)
            self._tell(Event(kind="call", job=job.id, call=part))

    def progress(self, job: Job, done: int, total: int, card_bytes: int) -> None:
        self._tell(Event(kind="progress", job=job.id, done=done, total=total, card_bytes=card_bytes))

    def finish(self, job: Job, state: State, finish: str) -> None:
        """A running job has ended."""
        with self._changed:
            if job.id in self._cancelled:
                state, finish = State.CANCELLED, "cancelled"
            elif state is State.CANCELLED and self._too_late(job):
                state, finish = State.EXPIRED, job.lateness
            elif state is State.DONE and job.has_calls:
                if job.result.text:
                    self.say(job, "\n")
                job.note_calls()
                try:
                    self._spool.note(job)  # before they are made: after a power cut they are not made again
                    self._tell(Event(kind="calls", job=job.id))
                    return
                except CannotWrite as error:
                    state, finish = State.FAILED, f"its calls cannot be written down, so they are not made: {error}"
            self._runs_no_more(job)
            self._end(job, state, finish)

    def did(self, job: Job, words: str) -> None:
        """What the board did for a running job, in words for people."""
        self._tell(Event(kind="did", job=job.id, text=words))

    def go_on(self, job: Job, results: Sequence[Turn]) -> None:
        """The calls of a running job were made: it waits for its answer to go on, before those that came later."""
        with self._changed:
            if self._closed:
                return  # the spool has the calls, and a new daemon goes on
            job.result.steps += tuple(results)
            if self._given_up(job):
                self.finish(job, State.CANCELLED, "cancelled")
                return
            job.state = State.QUEUED
            self._going_on.add(job.id)
            self._runs_no_more(job)
            self._enqueue(job)
            self._changed.notify_all()

    def put_back(self, job: Job) -> None:
        """A running job was interrupted: it waits again and starts anew."""
        with self._changed:
            if job.id in self._cancelled:
                self.finish(job, State.CANCELLED, "cancelled")
                return
            try:
                self._spool.put_back(job)
            except CannotWrite as error:
                log.error("%s; %s still counts as begun there", error, job)
            job.start_anew()
            job.attempts = 0
            self._runs_no_more(job)
            self._enqueue(job)
            self._tell(Event(kind="restarted", job=job.id))
            if job.result.text:
                self._tell(Event(kind="text", job=job.id, text=job.result.text))

    def close(self) -> None:
        """Takes no more and lets watchers go; what waits stays in the spool."""
        with self._changed:
            self._closed = True
            for watch in list(self._watches):
                watch.close()

    # --- inside -------------------------------------------------------------------------------------------

    def _recover(self, died: bool) -> None:
        waiting = self._spool.waiting()
        deaths = self._spool.begin_again(died)
        self._suspects = set(deaths)
        for job in waiting:
            if (times := deaths.get(job.id, 0)) >= MOST_DEATHS:
                log.error("%s given up: flashd died %d times answering it", job, times, extra=job.fields)
                self._end(job, State.FAILED, f"flashd died {times} times answering it")
                continue
            job.recover()
            # the clock may have jumped while the power was off: a deadline counts from now at the latest
            age = min(max(0.0, time.time() - job.created), job.request.deadline or 0.0)
            self._monotonic[job.id] = time.monotonic() - age
            self._enqueue(job)
        last = self._spool.last_done()
        self.last_text = last.result.text if last else ""
        if self._waiting:
            log.info("%d jobs were waiting in the spool", len(self._waiting))

    def _start(self, job: Job) -> None:
        """The first of those that wait runs. Raises CannotWrite; it then goes on waiting."""
        if begins := job.id not in self._going_on:
            self._spool.begin(job)
        heapq.heappop(self._waiting)
        self._going_on.discard(job.id)
        job.state, job.attempts = State.RUNNING, job.attempts + begins
        self._running[job.id] = job
        if begins:
            self._tell(Event(kind="started", job=job.id))
        for _, _, other in self._waiting:
            self._tell(self._place(other, "moved"))

    def _runs_no_more(self, job: Job) -> None:
        del self._running[job.id]
        self._interrupted.discard(job.id)

    def _place(self, job: Job, kind: Literal["queued", "moved"]) -> Event:
        return Event(kind=kind, job=job.id, position=self.position(job.id))

    def _enqueue(self, job: Job) -> None:
        heapq.heappush(self._waiting, (LAST if job.id in self._suspects else -job.request.priority, job.id, job))

    def _same(self, request: Request) -> Job | None:
        waiting = (job for _, _, job in self._waiting if job.id not in self._going_on)
        others = (job for job in waiting if job.request.source == request.source)
        return next(others, None) if request.coalesce else None

    def _check_session(self, session: str) -> None:
        others = [*self._running.values(), *(job for _, _, job in self._waiting)]
        if any(job.request.session == session for job in others):
            raise Busy(f"session {session} has a question that is not answered yet; wait for its answer")

    def _too_late(self, job: Job) -> bool:
        deadline, since = job.request.deadline, self._monotonic.get(job.id)
        return deadline is not None and since is not None and time.monotonic() - since > deadline

    def _given_up(self, job: Job) -> bool:
        return job.id in self._cancelled or self._too_late(job)

    def _find(self, number: int) -> Job | None:
        known = [*self.running, *self._unkept, *(job for _, _, job in self._waiting)]
        return next((job for job in known if job.id == number), None)

    def _end(self, job: Job, state: State, finish: str) -> None:
        job.state, job.result.finish, job.ended = state, finish, time.time()
        self._cancelled.discard(job.id)
        self._going_on.discard(job.id)
        self._suspects.discard(job.id)
        self._monotonic.pop(job.id, None)
        if state is State.DONE:
            self.last_text = job.result.text
        self._unkept.append(job)
        try:
            self._keep_ended()
        except CannotWrite as error:
            log.error("%s; the end of %s is written down later", error, job)
        self._tell(Event(kind="ended", job=job.id, end=job))
        log.info("%s %s", job, state, extra=job.fields)

    def _keep_ended(self) -> None:
        """Writes down what has ended. Raises CannotWrite; who waits for an answer has it all the same."""
        while self._unkept:
            self._spool.end(self._unkept[0])
            self._unkept.popleft()

    def _tell(self, event: Event) -> None:
        with self._changed:
            for watch in self._watches:
                if watch.job in (None, event.job):
                    watch.put(event)

    def _forget_watch(self, watch: Watch) -> None:
        with self._changed:
            if watch in self._watches:
                self._watches.remove(watch)
