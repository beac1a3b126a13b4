"""Makes the calls of answers, and has the answers go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from device.tools.course import Course, Done
from flashd.daemon.job import Call, Job, Turn
from flashd.daemon.jobs import Jobs

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Jobs whose calls are made at once; those of one job are made one after the other."""

Make = Callable[[Job, Call, Course], Done]
"""Makes one call of a job. It raises nothing, and ends soon when the call is not wanted any longer."""


class Caller:
    """Follows the jobs from now on, until closed."""

    def __init__(self, jobs: Jobs, make: Make) -> None:
        self._jobs, self._make = jobs, make
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, "tools")
        self._watch = jobs.watch()
        self._thread = threading.Thread(target=self._follow, name="tools", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits for the calls that are being made, which end soon."""
        self._stopping.set()
        self._watch.close()
        self._thread.join()
        self._pool.shutdown()

    def _follow(self) -> None:
        for event in self._watch:
            job = self._jobs.get(event.job) if event.kind == "calls" else None
            if job is not None:
                self._pool.submit(self._make_calls, job)

    def _make_calls(self, job: Job) -> None:
        results = []
        course = Course(lambda: self._wanted(job), lambda words: self._jobs.did(job, words))
        for call in job.result.steps[-1].calls:
            if not self._wanted(job):
                break
            done = self._make(job, call, course)
            results.append(Turn("tool", done.result, call=call.id, name=call.name))
            self._jobs.did(job, done.words)
        if not self._stopping.is_set():
            self._jobs.go_on(job, results)

    def _wanted(self, job: Job) -> bool:
        """A job that only makes way for another one goes on later, so its calls are made."""
        return not self._stopping.is_set() and (self._jobs.wanted(job) or self._jobs.preempted(job))
