"""Stands in for the worker and its engine: answers each job with some words, at a pace that a test sets."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flashd.daemon.job import Job, Request, State, Turn
from flashd.daemon.jobs import Jobs
from flashd.engine.decoding.tools.calls import CallPart


def request(text: str = "hello", source: str = "test", **more: object) -> Request:
    return Request(turns=(Turn("user", text),), source=source, **more)  # type: ignore[arg-type]


class Clerk:
    """Takes jobs until closed; each word waits for a permit where `permits` is given.

    `calls`: what it calls in each round before it answers, as (name, arguments) pairs, even if nobody may call that.
    """

    def __init__(
        self, jobs: Jobs, words: Sequence[str] = ("one ", "two ", "three"), paced: bool = False,
        calls: Sequence[Sequence[tuple[str, str]]] = (),
    ) -> None:  # fmt: skip
        self._jobs, self._words, self.calls = jobs, words, calls
        self.permits = threading.Semaphore(0) if paced else None
        self.answered: list[Job] = []
        self.forgets = 0  # messages of each talk, as if the context were full
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            job = self._jobs.take(0.01)
            if job is not None:
                self._answer(job)

    def _answer(self, job: Job) -> None:
        rounds = sum(turn.role == "assistant" for turn in job.result.steps)
        for i, (name, arguments) in enumerate(self.calls[rounds] if rounds < len(self.calls) else ()):
            self._jobs.call(job, CallPart(index=i, name=name, arguments=arguments))
        if job.result.calls:
            self._jobs.finish(job, State.DONE, "stop")
            return
        for word in self._words if not job.request.choose else job.request.choose[:1]:
            while self.permits is not None and not self.permits.acquire(timeout=0.01):
                if self._stopping.is_set() or not self._jobs.wanted(job):
                    break
            if self._stopping.is_set() or self._jobs.preempted(job):
                self._jobs.put_back(job)
                return
            if not self._jobs.wanted(job):
                self._jobs.finish(job, State.CANCELLED, "cancelled")
                return
            self._jobs.say(job, word)
        self.answered.append(job)
        job.result.forgotten = self.forgets
        self._jobs.finish(job, State.DONE, "stop")
