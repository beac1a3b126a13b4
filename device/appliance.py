"""The appliance: everything configured that touches the world, over one queue of jobs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import Full, Queue

import gpiozero
from msgspec.structs import replace

from device.consoles.console import Console
from device.consoles.machine import Machine
from device.consoles.port import Port, SerialLine
from device.controls import Facts, Shown, Status
from device.drives import Drives, letting_go, taking_pins
from device.hearing.ears import Ears, Stage
from device.outputs.output import Phase
from device.outputs.panel import Panel
from device.prompt import Prompt
from device.sensors.sensors import Sensors
from device.tools.caller import Caller
from device.tools.confirmation import Confirmation
from device.tools.course import Course, Done
from device.tools.tool import Reach
from device.tools.toolbox import Toolbox, calling
from device.triggers import Triggers
from flashd.config.devices import AnyTrigger, Talk
from flashd.config.settings import Serial, Settings, check_hearing
from flashd.daemon.job import Call, Calling, Job, Request, question
from flashd.daemon.jobs import Jobs
from flashd.daemon.watch import Watch
from flashd.errors import ConfigError, FlashdError, Misfit, NotStarted
from flashd.system import board
from flashd.system.paths import pins_record

log = logging.getLogger(__name__)

MOST_FIRED = 64
"""Triggers that have gone off and are not started yet."""

STAGES = {
    Stage.LISTENING: Phase.LISTENING, Stage.UNDERSTANDING: Phase.UNDERSTANDING, Stage.OVER: None,
    Stage.FAILED: Phase.ERROR,
}  # fmt: skip
"""What is shown while somebody speaks."""

CLOSE_SECONDS = 5.0
"""How long a close waits for one that is being started."""


class Appliance:
    """The `Controls` of everything. It shows `loading` from the start, listens from `open` on, until `close`.

    Args:
        settings: the configuration.
        jobs: the queue.
        facts: what only the daemon knows of model and last answer, for `status`.
        sysfs: the kernel's files.

    Raises ConfigError where a template is wrong or a pin cannot be had, CannotWrite where pins cannot be recorded.
    """

    def __init__(
        self, settings: Settings, jobs: Jobs, facts: Callable[[], Facts], sysfs: Path = Path("/sys")
    ) -> None:
        self.jobs = jobs
        self._facts, self._sysfs = facts, sysfs
        self._settings = settings
        self._muted = False
        self._is_open = False
        self._lock = threading.RLock()
        self._mute_button: gpiozero.Button | None = None
        self._serial: list[SerialLine] = []
        self._sinks: list[Callable[[Shown], None]] = []
        self._watch: Watch | None = None
        self._fired: Queue[tuple[str, dict[str, str | float]] | None] = Queue(MOST_FIRED)
        self._starting = threading.Thread(target=self._start_fired, name="triggers", daemon=True)
        self._record = pins_record(Path(settings.spool.path))
        self._build(settings, _prompts(settings))
        self._caller = Caller(jobs, self._make_call)

    @property
    def settings(self) -> Settings:
        return self._settings

    @property
    def muted(self) -> bool:
        return self._muted

    def mute(self, muted: bool) -> None:
        self._muted = muted
        self._panel.mute(muted)
        log.info("muted" if muted else "no longer muted")

    def open(self) -> None:
        """A prompt can be answered now: consoles greet and triggers listen."""
        self._is_open = True
        self._starting.start()
        self._listen()
        self._serial = [SerialLine(s, self._session(s)) for s in self._settings.serial]
        for line in self._serial:
            line.start()
        self._watch = self.jobs.watch()
        threading.Thread(target=self._follow_decisions, args=(self._watch,), name="drives", daemon=True).start()

    def close(self) -> None:
        for line in self._serial:
            line.close()
        if self._watch is not None:
            self._watch.close()
        self._caller.close()
        self._drop()
        self._drives.forget()
        if self._starting.is_alive():
            self._fired.put(None)
            self._starting.join(CLOSE_SECONDS)

    def reload(self, settings: Settings) -> None:
        """Takes new triggers, templates, sensors and outputs; consoles that are open and jobs go on.

        Raises ConfigError, and then all is as it was.
        """
        if settings.hearing != self._settings.hearing:
            settings = replace(settings, hearing=self._settings.hearing)
            try:
                check_hearing(settings)
            except Misfit as error:
                raise ConfigError("hearing is new, and its memory is planned at a start: restart flashd") from error
        prompts = _prompts(settings)
        with self._lock:
            before = self._settings, self._prompts
            self._drop()
            try:
                self._build(settings, prompts)
            except FlashdError:
                self._drop()
                self._build(*before)
                raise

    def start(self, name: str, **values: str | float) -> Job:
        with self._lock:
            trigger, prompt, sensors = self._triggers[name], self._prompts[name], self._sensors
            now = time.monotonic()
            if self._muted or now < self._ready_at.get(name, 0.0):
                raise NotStarted(f"trigger {name!r} was not started: muted, or started a moment ago")
            self._ready_at[name] = now + trigger.cooldown
        text = prompt.render(sensors.read(), self.jobs.last_text, values)
        if not text.strip():
            self._ready_at.pop(name, None)  # nothing was started that the next one must wait for
            raise NotStarted(f"trigger {name!r} was not started: its prompt is empty at the moment")
        calling = self.calling(trigger.tools)
        if calling is not None and trigger.must_call:
            calling = replace(calling, required=True)
        return self.jobs.submit(_request(trigger, text, calling))

    def equipped(self, request: Request) -> Request:
        """A client's request that asks for the tools of this board, with those that the page has."""
        if not request.rounds:
            return request
        kiosk = self._settings.kiosk
        found = self.calling(kiosk.tools, request.turns[-1].content)
        return replace(request, calling=found, rounds=kiosk.rounds if found else 0)

    def calling(self, names: Sequence[str], asked: str = "") -> Calling | None:
        preset = self._settings.kiosk.preset(asked)
        found = calling(self._settings.tools, names if preset is None else preset.tools or [])
        return replace(found, required=True) if found and preset and preset.must_call else found

    def status(self) -> Status:
        state, facts = board.read(self._sysfs), self._facts()
        return Status(
            phase=str(self._panel.phase), muted=self._muted, waiting=self.jobs.waiting,
            running=[job.id for job in self.jobs.running],
            sensors={name: str(reading) for name, reading in self._sensors.read().items()},
            temperature=state.temperature, throttled=state.throttled,
            title=self._settings.kiosk.title, presets=self._settings.kiosk.questions,
            triggers=[t.name for t in self._settings.triggers], model=facts.model, last=facts.last,
            demo=facts.demo,
        )  # fmt: skip

    def watch_shown(self, sink: Callable[[Shown], None]) -> Callable[[], None]:
        self._sinks.append(sink)
        sink(Shown(str(self._panel.phase)))
        return lambda: self._sinks.remove(sink)

    # --- inside -------------------------------------------------------------------------------------------

    def _build(self, settings: Settings, prompts: dict[str, Prompt]) -> None:
        self._settings = settings
        self._triggers = {t.name: t for t in settings.triggers}
        self._prompts = prompts
        self._ready_at: dict[str, float] = {}
        self._sensors = Sensors(settings.sensors, self._sysfs)
        self._listening: Triggers | None = None
        self._ears = self._made_ears(settings)
        with ExitStack() as undo:
            undo.callback(self._sensors.close)
            if self._ears is not None:
                undo.callback(self._ears.close)
            with taking_pins("a pin cannot be used"):
                self._drives = Drives(settings, self._record)
                undo.callback(self._drives.close)
                self._confirmation = Confirmation(settings.confirm, self._asks)
                undo.callback(self._confirmation.close)
                self._toolbox = Toolbox(settings, Reach(self._sensors, self._drives, self._confirmation))
                undo.callback(self._toolbox.close)
                self._panel = Panel(settings.outputs, self.jobs, self._entered)
            undo.pop_all()
        self._panel.mute(self._muted)
        if self._is_open:
            self._listen()

    def _made_ears(self, settings: Settings) -> Ears | None:
        if settings.hearing is None:
            return None
        wake = [word for trigger in settings.triggers if isinstance(trigger, Talk) for word in trigger.wake or ()]
        return Ears(settings.hearing, wake, self._hears, lambda: not self._muted)

    def _listen(self) -> None:
        self._panel.ready()
        with taking_pins("a pin cannot be used"):
            self._listening = Triggers(
                self._settings.triggers, self._sensors, self._fire, self._panel.notice, self._pressed, self._ears
            )
            if self._settings.mute_pin is not None:
                self._mute_button = gpiozero.Button(self._settings.mute_pin, bounce_time=0.05)
                self._mute_button.when_pressed = lambda: self.mute(not self._muted)

    def _drop(self) -> None:
        opened = (self._panel, self._toolbox, self._confirmation, self._drives, self._sensors)
        for each in (self._listening, self._ears, self._mute_button, *opened):
            if each is not None:
                with letting_go():
                    each.close()
        self._listening = self._ears = self._mute_button = None

    def _entered(self, phase: str) -> None:
        self._tell(Shown(phase))

    def _tell(self, shown: Shown) -> None:
        for sink in list(self._sinks):
            sink(shown)

    def _hears(self, stage: Stage, words: str) -> None:
        """Somebody speaks to it: how far it is, and what was heard or why nothing was."""
        self._panel.hears(STAGES[stage])
        if words:
            self._panel.notice(words)
            self._tell(Shown(str(self._panel.phase), words))

    def _asks(self, words: str | None) -> None:
        """A call waits for the button that confirms it, or no longer."""
        self._panel.asks(words is not None)
        if words is not None:
            self._panel.notice(words)
            self._tell(Shown(str(self._panel.phase), words))

    def _pressed(self, name: str) -> None:
        """A button went down, or a wake word came: it is quiet. Whoever talks need not wait for the last answer."""
        self._panel.hush()
        if isinstance(self._triggers.get(name), Talk):  # its own thread calls this, which may wait
            for job in self.jobs.running:
                if job.request.source == f"trigger:{name}":
                    self.jobs.cancel(job.id)

    def _fire(self, name: str, **values: str | float) -> None:
        """A trigger went off. It comes from a driver's thread, which all pins have in common and no error may end."""
        try:
            self._fired.put_nowait((name, values))
        except Full:
            log.warning("trigger %s: too many have gone off", name)

    def _start_fired(self) -> None:
        """Starts what went off, one after the other: sensors are read for it and a template rendered."""
        while (fired := self._fired.get()) is not None:
            name, values = fired
            try:
                self.start(name, **values)
            except NotStarted as error:
                log.info("%s", error)
            except FlashdError as error:
                log.warning("trigger %s: %s", name, error)
            except KeyError:
                log.info("trigger %s went off as it was taken away", name)
            except Exception:
                log.exception("trigger %s", name)

    def _make_call(self, job: Job, call: Call, course: Course) -> Done:
        """In a thread of the caller's, which may wait."""
        return self._toolbox.call(job.request.source, call, course, job.request.turns[-1].content)

    def _session(self, settings: Serial) -> Callable[[Port, threading.Event], None]:
        kind = Machine if settings.mode == "machine" else Console
        return lambda port, stopping: kind(self, settings).run(port, stopping)

    def _follow_decisions(self, watch: Watch) -> None:
        for event in watch:
            if event.end is not None:
                with self._lock:
                    self._drives.decided(event.end)


def _prompts(settings: Settings) -> dict[str, Prompt]:
    """Each trigger's prompt. Raises Misfit."""
    sensors = [s.name for s in settings.sensors]
    prompts = {}
    for i, trigger in enumerate(settings.triggers):
        try:
            prompts[trigger.name] = Prompt(trigger.prompt, trigger.name, sensors)
        except ConfigError as error:
            raise Misfit(("triggers", i, "prompt"), str(error)) from error
    return prompts


def _request(trigger: AnyTrigger, text: str, calling: Calling | None) -> Request:
    return Request(
        turns=question(text, trigger.system), source=f"trigger:{trigger.name}", priority=trigger.priority,
        deadline=trigger.deadline, barge_in=trigger.barge_in, coalesce=trigger.coalesce,
        per_minute=trigger.per_minute, max_tokens=trigger.max_tokens,
        choose=tuple(trigger.choose or ()), json_schema=trigger.json_schema,
        calling=calling, rounds=trigger.rounds if calling else 0,
    )  # fmt: skip


def check(settings: Settings) -> None:
    """What can be said of a configuration without touching a pin. Raises Misfit."""
    _prompts(settings)
