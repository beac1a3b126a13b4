"""Outputs: LEDs, buzzer, speech, display, hooks. They follow the jobs' events in a thread of their own."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import gpiozero
import msgspec

from flashd.config.devices import AnyOutput, Buzzer, Display, Hook, Led, RgbLed, Speech
from flashd.daemon.job import Event, State
from flashd.daemon.jobs import Jobs, Watch
from flashd.errors import InputMissing

log = logging.getLogger(__name__)

ERROR_SECONDS = 5.0
"""How long a failure is shown before the appliance looks idle again."""


class Phase(StrEnum):
    """What the appliance does, as an LED shows it."""

    LOADING = "loading"
    IDLE = "idle"
    THINKING = "thinking"
    ANSWERING = "answering"
    ERROR = "error"
    MUTED = "muted"


BLINKS: dict[Phase, tuple[float, float]] = {
    Phase.LOADING: (0.5, 0.5), Phase.IDLE: (0.05, 2.95), Phase.THINKING: (0.2, 0.2),
    Phase.ANSWERING: (1.0, 0.0), Phase.ERROR: (0.08, 0.08), Phase.MUTED: (0.0, 1.0),
}  # fmt: skip
"""Seconds on and off of a single LED."""

COLOURS: dict[Phase, tuple[float, float, float]] = {
    Phase.LOADING: (1, 1, 0), Phase.IDLE: (0, 1, 0), Phase.THINKING: (0, 0, 1),
    Phase.ANSWERING: (0, 1, 1), Phase.ERROR: (1, 0, 0), Phase.MUTED: (0, 0, 0),
}  # fmt: skip


class Output:
    """Takes what happens, in any thread, and does nothing about it unless a kind of output does."""

    def show(self, phase: Phase) -> None:
        """The appliance is in a new phase."""

    def event(self, event: Event) -> None:
        """Something happened to a job."""

    def notice(self, text: str) -> None:
        """Something to be read at once: what a menu stands at."""

    def close(self) -> None:
        """Lets go of what it holds."""


class InTurn:
    """Of jobs that are answered together, what happens to one after the other: what is spoken or read is one text."""

    def __init__(self) -> None:
        self._held: dict[int, list[Event]] = {}  # of jobs that have started; the first one's are passed on at once

    def take(self, event: Event) -> Iterator[Event]:
        """What is to be followed now. A job that did not come to its answer behind another's is left out."""
        if event.kind == "started":
            self._held.setdefault(event.job, [])
        if event.job not in self._held:
            return
        if event.job != next(iter(self._held)):
            self._held[event.job].append(event)
            if event.kind == "restarted" or (event.end and event.end.state is not State.DONE):
                del self._held[event.job]
            return
        yield event
        while event.end or event.kind == "restarted":
            del self._held[event.job]
            if not self._held:
                return
            job = next(iter(self._held))
            held, self._held[job] = self._held[job], []
            yield from held
            event = held[-1]


class _OneText(Output):
    """Follows what happens to one answer after the other."""

    def __init__(self) -> None:
        self._turns = InTurn()

    def event(self, event: Event) -> None:
        for each in self._turns.take(event):
            self._follow(each)

    def _follow(self, event: Event) -> None:
        """Something happened to the answer whose turn it is."""
        raise NotImplementedError


class Panel:
    """All outputs. `phase` is what they show. Raises gpiozero.GPIOZeroError where a pin cannot be had."""

    def __init__(self, settings: list[AnyOutput], jobs: Jobs) -> None:
        self._lock = threading.RLock()
        self._base = Phase.LOADING
        self._muted = False
        self.phase = Phase.LOADING
        self._outputs: list[Output] = []
        self._failing: set[Output] = set()
        self._running: set[int] = set()  # jobs, one after the other or together
        self._timer: threading.Timer | None = None
        self._watch: Watch = jobs.watch()
        try:
            self._outputs = [_output(s, jobs, lambda: self._muted) for s in settings]
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
        phase = Phase.MUTED if self._muted and self._base is Phase.IDLE else self._base
        self.phase = phase
        self._each(lambda output: output.show(phase))


def _pass_on(event: Event, output: Output) -> None:
    output.event(event)


def _output(settings: AnyOutput, jobs: Jobs, muted: Callable[[], bool]) -> Output:
    if isinstance(settings, Led):
        return _Led(settings)
    if isinstance(settings, RgbLed):
        return _Rgb(settings)
    if isinstance(settings, Buzzer):
        return _Buzzer(settings, muted)
    if isinstance(settings, Speech):
        return _Speech(settings, muted)
    if isinstance(settings, Display):
        return _display(settings)
    return _Hook(settings, jobs)


class _Led(Output):
    def __init__(self, settings: Led) -> None:
        self._led = gpiozero.LED(settings.pin, active_high=settings.active_high)
        self._phase: Phase | None = None

    def show(self, phase: Phase) -> None:
        if phase is self._phase:
            return
        self._phase = phase
        on, off = BLINKS[phase]
        if off == 0:
            self._led.on()
        elif on == 0:
            self._led.off()
        else:
            self._led.blink(on, off)

    def close(self) -> None:
        self._led.close()


class _Rgb(Output):
    def __init__(self, s: RgbLed) -> None:
        self._led = gpiozero.RGBLED(s.red, s.green, s.blue, active_high=s.active_high, pwm=False)

    def show(self, phase: Phase) -> None:
        self._led.color = COLOURS[phase]

    def close(self) -> None:
        self._led.close()


class _Buzzer(Output):
    def __init__(self, settings: Buzzer, muted: Callable[[], bool]) -> None:
        self._buzzer, self._muted = gpiozero.Buzzer(settings.pin), muted

    def show(self, phase: Phase) -> None:
        if phase is Phase.ERROR and not self._muted():
            self._buzzer.beep(0.1, 0.1, n=3)

    def event(self, event: Event) -> None:
        if event.end is not None and event.end.state is State.DONE and not self._muted():
            self._buzzer.beep(0.1, 0.1, n=1)

    def close(self) -> None:
        self._buzzer.close()


SPEECH_SECONDS = 120.0
"""How long a program may take for a sentence."""

SENTENCE = re.compile(r"(.*?[.!?:;\n])(?=\s|$)", re.DOTALL)


class _Speech(_OneText):
    """Says an answer sentence by sentence while the rest is still being made; a cancelled one falls silent."""

    def __init__(self, settings: Speech, muted: Callable[[], bool]) -> None:
        super().__init__()
        self._command, self._muted = settings.command, muted
        self._text = ""
        self._sentences: Queue[str | None] = Queue(maxsize=256)
        self._speaking: subprocess.Popen[bytes] | None = None
        self._said_missing = False
        self._thread = threading.Thread(target=self._run, name="speech", daemon=True)
        self._thread.start()

    def _follow(self, event: Event) -> None:
        if event.kind in ("started", "restarted"):
            self._text = ""
        elif event.kind == "text":
            self._text += event.text
            while (match := SENTENCE.match(self._text)) and match.end() < len(self._text):
                self._say(match.group(1))
                self._text = self._text[match.end() :]
        elif event.end is not None:
            if event.end.state is State.CANCELLED:
                self._silence()
            else:
                self._say(self._text)
            self._text = ""

    def close(self) -> None:
        self._silence()
        self._sentences.put(None)

    def _say(self, sentence: str) -> None:
        if sentence.strip() and not self._muted() and not self._sentences.full():
            self._sentences.put(sentence.strip())

    def _silence(self) -> None:
        try:
            while True:
                self._sentences.get_nowait()
        except Empty:
            pass
        speaking = self._speaking
        if speaking is not None:
            _kill(speaking)

    def _run(self) -> None:
        while (sentence := self._sentences.get()) is not None:
            try:
                self._speak(sentence)
                self._said_missing = False
            except (OSError, subprocess.TimeoutExpired) as error:
                if not self._said_missing:
                    log.warning("speech: %s", error)
                self._said_missing = True

    def _speak(self, sentence: str) -> None:
        # a session of its own: a shell that pipes one program into another falls silent as a whole
        with subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        ) as speaking:
            self._speaking = speaking
            _goes_first(speaking)
            try:
                speaking.communicate(sentence.encode(), timeout=SPEECH_SECONDS)
                if speaking.returncode > 0:  # below, it was silenced
                    raise OSError(f"{self._command[0]} ended with {speaking.returncode}")
            finally:
                self._speaking = None
                _kill(speaking)


def _goes_first(program: subprocess.Popen[bytes]) -> None:
    """Where memory is short the kernel ends this program, and not the daemon in whose group it is."""
    with suppress(OSError):
        Path(f"/proc/{program.pid}/oom_score_adj").write_text("1000")


def _kill(program: subprocess.Popen[bytes]) -> None:
    """Ends a program that leads a session, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)


def _display(settings: Display) -> Output:
    """The display, or nothing where none answers: it may hang on loose wires, and the rest goes on without it."""
    try:
        return _Display(_open_display(settings))
    except InputMissing as error:
        log.warning("%s; left out until a reload or restart", error)
        return Output()


def _open_display(settings: Display) -> Any:
    """A luma device. Raises ImportError without luma, InputMissing where none answers."""
    from luma.core.interface.serial import i2c
    from luma.oled import device

    try:
        return getattr(device, settings.driver)(i2c(port=settings.port, address=settings.address))
    except Exception as error:  # luma's and smbus's own are no kin
        raise InputMissing(f"display {settings.driver} on I2C bus {settings.port}: {error}") from error


class _Display(_OneText):
    """A luma device as a small text terminal: the phase, what a menu stands at, the answer as it comes."""

    def __init__(self, device: Any) -> None:
        from luma.core.virtual import terminal

        super().__init__()
        self._device = device
        self._terminal = terminal(device, animate=False)
        self._lock = threading.Lock()
        self._fresh = True  # what is shown is no part of the answer that begins

    def show(self, phase: Phase) -> None:
        if phase in (Phase.LOADING, Phase.THINKING, Phase.ERROR):
            self.notice(str(phase))

    def notice(self, text: str) -> None:
        with self._lock:
            self._terminal.clear()
            self._terminal.println(text)
            self._fresh = True

    def _follow(self, event: Event) -> None:
        if event.kind in ("started", "restarted"):
            self._fresh = True
        elif event.kind == "text":
            with self._lock:
                if self._fresh:
                    self._terminal.clear()
                self._fresh = False
                self._terminal.puts(event.text)
                self._terminal.flush()

    def close(self) -> None:
        self._device.cleanup()


HOOK_EVENTS = {"queued": "accepted", "started": "started"}


class _Hook(Output):
    """Runs a program for an event, the job as JSON on its standard input; it is given a time and no more.

    A stop of the daemon waits for those that run: their threads are no daemon threads.
    """

    def __init__(self, settings: Hook, jobs: Jobs) -> None:
        self._settings, self._jobs = settings, jobs

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
                _goes_first(program)
                try:
                    program.wait(self._settings.timeout)
                finally:
                    _kill(program)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("hook %s: %s", name, error)
            return
        if program.returncode:
            log.warning("hook %s ended with %d", name, program.returncode)
