"""The panel: all outputs, which follow the jobs' events in a thread of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from device.outputs.kinds import KINDS
from device.outputs.output import Output, Phase, Surroundings
from flashd.config.devices import AnyOutput
from flashd.daemon.job import Event, State
from flashd.daemon.jobs import Jobs
from flashd.daemon.watch import Watch

log = logging.getLogger(__name__)

ERROR_SECONDS = 5.0
"""How long a failure is shown before the appliance looks idle again."""


class Panel:
    """All outputs. `phase` is what they show; `entered` is told each one.

    Raises gpiozero.GPIOZeroError if a pin cannot be had.
    """

    def __init__(
        self, settings: list[AnyOutput], jobs: Jobs, entered: Callable[[Phase], None] = lambda _: None
    ) -> None:
        self._entered = entered
        self._lock = threading.RLock()
        self._base = Phase.LOADING
        self._muted = False
        self._hearing: Phase | None = None  # it is shown before what a job does
        self._asking = False  # whether a press is waited for, which is shown before that too
        self.phase = Phase.LOADING
        self._outputs: list[Output] = []
        self._failing: set[Output] = set()
        self._running: set[int] = set()  # jobs, one after the other or together
        self._timer: threading.Timer | None = None
        self._watch: Watch = jobs.watch()
        around = Surroundings(jobs, lambda: self._muted)
        try:
            self._outputs = [KINDS[type(s)](s, around) for s in settings]
        except BaseException:
            self.close()
            raise
        self._show()
        self._thread = threading.Thread(target=self._follow, name="outputs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._watch.close()
        with self._lock:  # an event that is shown meanwhile would have an LED blink that is closed
            if self._timer is not None:
                self._timer.cancel()
            for output in self._outputs:
                output.close()
            self._outputs = []

    def ready(self) -> None:
        """The model is loaded."""
        self._enter(Phase.IDLE)

    def mute(self, muted: bool) -> None:
        with self._lock:
            self._muted = muted
            self._show()
        if muted:
            self.hush()

    def hears(self, phase: Phase | None) -> None:
        """Somebody speaks to it, or no longer. ERROR: it was not understood."""
        with self._lock:
            self._hearing = None if phase is Phase.ERROR else phase
            if phase is Phase.ERROR:
                self._enter(phase)
            else:
                self._show()

    def asks(self, asking: bool) -> None:
        """A call waits for the button that confirms it, or no longer."""
        with self._lock:
            self._asking = asking
            self._show()

    def hush(self) -> None:
        """Somebody wants silence."""
        self._each(lambda output: output.hush())

    def notice(self, text: str) -> None:
        """Something to be read at once: what a menu stands at."""
        self._each(lambda output: output.notice(text))

    def _follow(self) -> None:
        for event in self._watch:
            if event.kind == "started":
                self._running.add(event.job)
                self._enter(Phase.THINKING)
            elif event.kind == "text":
                self._enter(Phase.ANSWERING)
            elif event.kind == "calls":
                self._enter(Phase.THINKING)
            elif event.end is not None or event.kind == "restarted":
                self._running.discard(event.job)
                failed = event.end is not None and event.end.state in (State.FAILED, State.EXPIRED)
                self._enter(Phase.ERROR if failed else self._rest())
            self._each(partial(_pass_on, event))

    def _each(self, do: Callable[[Output], None]) -> None:
        for output in list(self._outputs):
            try:
                do(output)
            except Exception:  # an LED's driver must not stop the display's
                if output not in self._failing:
                    log.exception("an output failed")
                self._failing.add(output)

    def _enter(self, phase: Phase) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if phase is Phase.ERROR:
                self._timer = threading.Timer(ERROR_SECONDS, lambda: self._enter(self._rest()))
                self._timer.daemon = True
                self._timer.start()
            self._base = phase
            self._show()

    def _rest(self) -> Phase:
        """What it shows when nothing happens."""
        return Phase.THINKING if self._running else Phase.IDLE

    def _show(self) -> None:
        wait = Phase.CONFIRMING if self._asking else None
        phase = Phase.MUTED if self._muted and self._base is Phase.IDLE else wait or self._hearing or self._base
        self.phase = phase
        self._entered(phase)
        self._each(lambda output: output.show(phase))


def _pass_on(event: Event, output: Output) -> None:
    output.event(event)
