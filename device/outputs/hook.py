"""Hooks: a program is run for an event, with the job as JSON on its standard input."""

from __future__ import annotations

import logging
import os
import subprocess
import threading

import msgspec

from device.outputs.output import Output, Surroundings
from flashd.config.devices import Hook
from flashd.daemon.job import Event
from flashd.system.program import goes_first, kill

log = logging.getLogger(__name__)

HOOK_EVENTS = {"queued": "accepted", "started": "started"}


class HookRunner(Output):
    """The program is given a time and no more.

    A stop of the daemon waits for those that run: their threads are no daemon threads.
    """

    def __init__(self, settings: Hook, around: Surroundings) -> None:
        self._settings, self._jobs = settings, around.jobs

    def event(self, event: Event) -> None:
        name = str(event.end.state) if event.end else HOOK_EVENTS.get(event.kind)
        if name == "expired":
            name = "failed"
        if name != self._settings.event:
            return
        job = event.end or self._jobs.get(event.job)
        if job is not None:
            threading.Thread(target=self._run, args=(msgspec.json.encode(job),), name="hook").start()

    def _run(self, text: bytes) -> None:
        name = self._settings.command[0]
        try:
            # whole before the program starts: through a pipe, the daemon's death would leave it a part
            with os.fdopen(os.memfd_create("job"), "w+b") as job:
                job.write(text)
                job.seek(0)
                program = subprocess.Popen(
                    self._settings.command, stdin=job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            with program:
                goes_first(program)
                try:
                    program.wait(self._settings.timeout)
                finally:
                    kill(program)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("hook %s: %s", name, error)
            return
        if program.returncode:
            log.warning("hook %s ended with %d", name, program.returncode)
