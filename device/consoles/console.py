"""The console a person meets at a cable or on a text screen: a prompt, answers as they come, a few commands."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from device.consoles.port import Port
from device.controls import Controls, Shown
from flashd.config.settings import Serial
from flashd.daemon.job import Event, Job, Request, State, Turn, so_far
from flashd.daemon.watch import Watch
from flashd.errors import FlashdError
from flashd.terminal.line_editor import MAX_LINE, Key, LineEditor
from flashd.terminal.wrapping import Wrap, to_ascii

POLL_SECONDS = 0.05
IDLE_SECONDS = 0.5
STATUS_SECONDS = 1.0
"""How often the line that stands in for a first token changes."""

MOST_TURNS = 64
"""Messages of a talk that are kept; the oldest half goes when there are more."""

LISTENING = "listening"
"""The phase in which somebody speaks to the board."""

MOST_NEWS = 8
"""Rows of what is heard that wait while something is typed or answered."""

PRIORITY = 6
"""Somebody stands at the cable and waits: before sensors and schedules."""

HELP = """\
Type a question and press Enter. Ctrl-C stops an answer, Ctrl-D or /quit ends.
/reset           forget what was said
/status          what flashd is doing, and what the sensors say
/model           the model and its memory
/stats           what the last answer cost
/trigger NAME    start a trigger; without a name, list them
/mute            start nothing by itself and say nothing aloud, or undo that
1, 2, ...        ask a preset question
Enter alone      show the title and the preset questions"""


class Console:
    """One person's session on one port. Raises port.GONE when the port goes away."""

    def __init__(self, controls: Controls, settings: Serial) -> None:
        self._controls, self._settings = controls, settings
        self._turns: list[Turn] = []
        self._news: deque[str] = deque(maxlen=MOST_NEWS)
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._say(HELP), "status": self._status, "reset": self._reset, "model": self._model,
            "stats": self._stats, "trigger": self._trigger, "mute": self._mute,
        }  # fmt: skip

    def run(self, port: Port, stopping: threading.Event) -> None:
        """Talks until /quit, Ctrl-D, or the daemon stops; then waits for Enter to begin anew."""
        self._port, self._stopping = port, stopping
        self._editor = LineEditor(port.write, self._settings.columns)
        self._ahead = b""
        self._greet()
        unwatch = self._controls.watch_shown(self._take_news)
        try:
            self._talk(stopping)
        finally:
            unwatch()

    def _talk(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            self._show_news()
            entry = self._next_entry()
            if entry is Key.END or entry == "/quit":
                self._turns = []
                self._say("Goodbye. Press Enter to begin anew.")
                self._wait_for_enter()
                self._greet()
            elif entry is Key.INTERRUPT:
                self._editor.start()
            elif entry is not None:
                self._line(entry.strip())

    # --- what the board hears -----------------------------------------------------------------------------

    def _take_news(self, shown: Shown) -> None:
        """Keeps what is to be read until there is a place for it. In any thread."""
        if shown.notice or shown.phase == LISTENING:
            self._news.append(shown.notice or LISTENING)

    def _show_news(self) -> None:
        if self._news and self._editor.empty:
            self._send("\r\x1b[K")
            while self._news:
                self._say(f"({self._news.popleft()})")
            self._editor.start()

    # --- lines --------------------------------------------------------------------------------------------

    def _next_entry(self) -> str | Key | None:
        data = self._ahead or self._port.read(IDLE_SECONDS)
        if b"\x03" in data:
            self._port.discard()
        entry, self._ahead = self._editor.next(data)
        if self._editor.full:
            self._port.note(f"a line of more than {MAX_LINE} characters; the rest of it is dropped")
        if self._editor.garbled:
            self._port.note("bytes that are not UTF-8")
        return entry

    def _line(self, line: str) -> None:
        if not line:  # Enter alone: a person who connects the cable presses it to see what is there
            self._greet()
            return
        if line.isascii() and line.isdigit():
            self._preset(line)
        elif line.startswith("/"):
            self._command(line)
        else:
            self._ask(line)
        self._editor.start()

    def _preset(self, number: str) -> None:
        presets = self._controls.settings.kiosk.questions
        found = presets[int(number) - 1 : int(number)] if 0 < len(number) < 4 and int(number) else []
        if found:
            self._ask(found[0])
            return
        there = f"there are 1 to {len(presets)}" if presets else "there are none"
        self._say(f"no preset question has the number {number}; {there}")

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._say(f"/{name} is not known; /help lists what is")
            return
        try:
            command(rest.strip())
        except FlashdError as error:
            self._say(f"{error}")

    def _ask(self, text: str) -> None:
        turns = [*self._turns, Turn("user", text)]
        calling = self._controls.calling(self._settings.tools, text)
        request = Request(
            turns=tuple(turns), source=f"serial:{self._settings.name}", priority=PRIORITY, forget=True,
            calling=calling, rounds=self._settings.rounds if calling else 0,
        )  # fmt: skip
        try:
            job, watch = self._controls.jobs.ask(request)
        except FlashdError as error:
            self._say(f"{error}")
            return
        end = self._follow(job, watch)
        if end is not None and (end.state is State.DONE or end.result.text):
            self._turns = list(so_far(end))
            if end.result.forgotten:
                self._say(f"(the context is full: the oldest {end.result.forgotten} messages are forgotten)")
            if len(self._turns) > MOST_TURNS:
                asked = [i for i, turn in enumerate(self._turns) if turn.role == "user"]
                del self._turns[: next((i for i in asked if i >= MOST_TURNS // 2), asked[-1])]
                self._say("(the older half of this talk is forgotten)")

    # --- an answer as it comes ----------------------------------------------------------------------------

    def _follow(self, job: Job, watch: Watch) -> Job | None:
        """Streams a job's answer; Ctrl-C cancels it. The job as it ended, None where the daemon stops."""
        wrap, waiting = Wrap(self._settings.columns), _Waiting(self._settings.columns)
        did: list[str] = []
        try:
            while not self._stopping.is_set():
                self._watch_keys(job)
                while (event := watch.next(0)) is not None:
                    if event.kind == "text":
                        self._send(waiting.end() + wrap.push(self._plain(event.text)))
                    elif event.kind == "did":
                        self._send(waiting.end() + wrap.finish())
                        self._say(f"({event.text})")
                        did.append(event.text)
                        waiting = _Waiting(self._settings.columns)
                    elif event.kind == "restarted":
                        self._send(wrap.finish() + "\r\n(interrupted by something urgent; starting again)\r\n")
                    elif event.end is not None:
                        self._send(waiting.end() + wrap.finish() + "\r\n")
                        self._close_answer(event.end)
                        return event.end
                    else:
                        waiting.heard(event)
                self._send(waiting.row())
            return None
        finally:
            watch.close()
            for each in [news for news in list(self._news) if news in did]:  # it was read here already
                self._news.remove(each)

    def _watch_keys(self, job: Job) -> None:
        """Ctrl-C stops the answer; what else is typed meanwhile is taken up afterwards."""
        data = self._port.read(POLL_SECONDS)
        if b"\x03" in data:
            self._port.discard()
            self._controls.jobs.cancel(job.id)
            data = data.rpartition(b"\x03")[2]
            self._ahead = b""
        self._ahead = (self._ahead + data)[:MAX_LINE]

    def _close_answer(self, end: Job) -> None:
        if end.state is State.CANCELLED:
            self._send("(stopped)\r\n")
        elif end.state is not State.DONE:
            self._say(f"({end.state}: {end.result.finish})")
        elif end.result.cut:
            full = end.result.finish == "context"
            self._say(f"(cut: {'the context is full' if full else 'the answer is as long as it may be'})")
        if end.result.probabilities:
            self._say(", ".join(f"{name} {100 * p:.0f} %" for name, p in end.result.probabilities.items()))

    # --- commands -----------------------------------------------------------------------------------------

    def _status(self, _: str) -> None:
        status = self._controls.status()
        rows = [f"{status.phase}, {status.waiting} waiting" + (", muted" if status.muted else "")]
        rows += [f"{name}: {value}" for name, value in status.sensors.items()]
        if status.temperature is not None:
            rows.append(f"processor {status.temperature:.0f} °C")
        if status.throttled:
            rows.append("processor slowed: too hot, or too weak a supply")
        self._say("\n".join(rows))

    def _model(self, _: str) -> None:
        model = self._controls.status().model
        self._say("\n".join(f"{name}: {value}" for name, value in model.items()))

    def _stats(self, _: str) -> None:
        last = self._controls.status().last
        if not last:
            self._say("nothing was answered yet")
            return
        self._say(
            f"{last['tokens']:.0f} tokens in {last['seconds']:.1f} s, the first after"
            f" {last['first_token_seconds']:.1f} s, then {last['decode_tokens_per_second']:.2f} a second;"
            f" {last['card_bytes_per_token'] / 2**20:.1f} MiB a token from the card,"
            f" {100 * last['window_hit_rate']:.0f} % of neurons found in RAM"
        )

    def _reset(self, _: str) -> None:
        self._turns = []
        self._say("forgotten")

    def _mute(self, _: str) -> None:
        self._controls.mute(not self._controls.muted)
        self._say("muted" if self._controls.muted else "no longer muted")

    def _trigger(self, name: str) -> None:
        known = [t.name for t in self._controls.settings.triggers]
        if name not in known:
            self._say(("no such trigger; " if name else "") + f"there are: {', '.join(known) or 'none'}")
            return
        job = self._controls.start(name)
        self._follow(job, self._controls.jobs.watch(job.id))

    # --- out ----------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        presets = self._controls.settings.kiosk.questions
        rows = [f"{self._controls.settings.kiosk.title} - flashd. /help lists the commands."]
        rows += [f"{i}  {text}" for i, text in enumerate(presets[:9], 1)]
        self._send("\r\n")
        self._say("\n".join(rows))
        self._editor.start()

    def _say(self, text: str) -> None:
        wrap = Wrap(self._settings.columns)
        self._send(wrap.push(self._plain(text)) + wrap.finish() + "\r\n")

    def _plain(self, text: str) -> str:
        return to_ascii(text) if self._settings.charset == "ascii" else text

    def _send(self, text: str) -> None:
        self._port.write(text)

    def _wait_for_enter(self) -> None:
        while not self._stopping.is_set():
            if any(c in self._port.read(IDLE_SECONDS) for c in b"\r\n"):
                return


class _Waiting:
    """The row that stands in for an answer until its first words come."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._since = time.monotonic()
        self._shown = 0.0
        self._open = True
        self._drawn = False
        self._text = "waiting"

    def heard(self, event: Event) -> None:
        if event.kind in ("queued", "moved"):
            self._text = f"waiting, {event.position} before you"
        elif event.kind == "started":
            self._text = "thinking"
        elif event.kind == "progress":
            card = f", {event.card_bytes >> 20} MiB read" if event.card_bytes else ""
            self._text = f"thinking, layer {event.done} of {event.total}{card}"

    def row(self) -> str:
        """The row anew where it is time for that; the first after a second, so that quick answers have none."""
        now = time.monotonic()
        if not self._open or now - max(self._since, self._shown) < STATUS_SECONDS:
            return ""
        self._shown, self._drawn = now, True
        return f"\r{self._text}, {now - self._since:.0f} s"[: self._columns] + "\x1b[K"

    def end(self) -> str:
        """What takes the row away, once."""
        if not self._open:
            return ""
        self._open = False
        return "\r\x1b[K" if self._drawn else ""
