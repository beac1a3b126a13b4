"""How long it takes to be answered aloud: python -m tests.lab.voice FILE.flash [--recogniser YAML] [--idle SECONDS]

The real daemon, with mock pins. espeak-ng asks questions. A program stands for the microphone and gives them at their
own speed, while the button of a talk trigger is held. From the moment it is let go three things are timed: until the
question is understood, until the first sentence goes to the voice, and until the voice's first sound. Without
--recogniser it is pocketsphinx with a grammar of the questions. It needs Debian's espeak-ng, pocketsphinx and
pocketsphinx-en-us.

With --idle nothing is asked. For so many seconds the microphone hears people who never say the wake word, and the
processor's time is taken: the daemon's, the listener's and the microphone's. It needs the voice extra and silero-vad.
--spotter names a folder with a model; without it that of the tests, whose network costs next to nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import gpiozero
from gpiozero.pins.mock import MockFactory

from flashd.config.hearing import RATE, SAMPLE_BYTES
from flashd.config.settings import parse
from flashd.serve import Daemon
from tests.device.tones import spoken, spotter

QUESTIONS = (
    "what is the capital of france", "tell me a story", "how do i grow tomatoes", "what is the moon", "who are you",
)  # fmt: skip
STAGES = "understood", "sentence", "sound"
PIN = 6
WAIT_SECONDS = 120
SETTLE_SECONDS = 3.0


class Desk:
    """The button, and the folder of what the programs beside the daemon read and write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "said").touch()
        gpiozero.Device.pin_factory = self._pins = MockFactory()

    def ask(self, question: str) -> tuple[dict[str, float], str]:
        """Seconds from the button's release to each stage, and what was understood."""
        sound = spoken(question)
        (self.folder / "said").write_bytes(sound)
        self._pins.pin(PIN).drive_low()
        time.sleep(len(sound) / (SAMPLE_BYTES * RATE))
        for stage in STAGES:  # now the voice is still, which may have said the last answer until the press
            (self.folder / stage).unlink(missing_ok=True)
        self._pins.pin(PIN).drive_high()
        let_go = time.time()
        seconds = {stage: self._stamped(stage) - let_go for stage in STAGES}
        return seconds, json.loads((self.folder / "job").read_text())["request"]["turns"][-1]["content"]

    def stamp(self, stage: str) -> str:
        """A shell command that says when a stage was reached."""
        return f"date +%s.%N >> {self.folder}/{stage}"

    def _stamped(self, stage: str) -> float:
        file, until = self.folder / stage, time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            if file.exists() and (lines := file.read_text().split()):
                return float(lines[0])
            time.sleep(0.01)
        raise SystemExit(f"{stage}: not reached in {WAIT_SECONDS} s")


def configuration(desk: Desk, args: argparse.Namespace) -> str:
    folder = desk.folder
    microphone = f"while head -c 3200; do sleep 0.1; done < {folder}/said"
    understood = f"cat > {folder}/job; {desk.stamp('understood')}"
    sound = f"(head -c 4096; {desk.stamp('sound')}; cat) > /dev/null"
    voice = f"{desk.stamp('sentence')}; espeak-ng --stdin --stdout | {sound}"
    return f"""
model: {args.bundle.resolve()}
memory: {args.memory}
context: 512
snapshots: false
spool: {{path: {folder}/spool.db}}
api: {{socket: {folder}/api.sock}}
answer: {{max_tokens: 48, temperature: 0}}
hearing:
  memory: {args.hearing}
  microphone: [sh, -c, {json.dumps(microphone)}]
  recogniser: {args.recogniser or by_grammar(folder)}
  {listener(folder, args.spotter) if args.idle else ""}
triggers: [{{kind: talk, name: ask, pin: {PIN}, bounce: 0{f", wake: [{args.word}]" if args.idle else ""}}}]
outputs:
  - {{kind: speech, command: [sh, -c, {json.dumps(voice)}]}}
  - {{kind: hook, event: accepted, command: [sh, -c, {json.dumps(understood)}]}}
"""


def by_grammar(folder: Path) -> str:
    """pocketsphinx, as device/README.md has it."""
    grammar = folder / "questions.gram"
    grammar.write_text(f"#JSGF V1.0; grammar questions; public <question> = {' | '.join(QUESTIONS)};")
    command = ["pocketsphinx_continuous", "-infile", "/dev/stdin", "-logfn", "/dev/null", "-jsgf", str(grammar)]
    return f"{{kind: program, command: {json.dumps(command)}}}"


def listener(folder: Path, model: Path | None) -> str:
    return f"listener: {{memory: 96M, spotter: {model.resolve() if model else spotter(folder / 'spotter')}}}"


def time_questions(desk: Desk) -> None:
    rows = []
    for question in QUESTIONS:
        seconds, heard = desk.ask(question)
        rows.append(seconds)
        print(*(f"{stage} {each:5.2f} s " for stage, each in seconds.items()), f"{question!r} as {heard!r}")
        time.sleep(SETTLE_SECONDS)
    print("medians", *(f"{stage} {median(row[stage] for row in rows):5.2f} s " for stage in STAGES))


def time_idle(desk: Desk, seconds: float) -> None:
    talk = b"".join(spoken(question) for question in QUESTIONS)
    with (desk.folder / "said").open("wb") as file:  # the program has it open, and goes on in it
        file.write(talk * (2 + round(seconds * SAMPLE_BYTES * RATE / len(talk))))
    time.sleep(SETTLE_SECONDS)
    names = dict(programs())
    before = {pid: processor_seconds(pid) for pid in names}
    time.sleep(seconds)
    for pid, name in names.items():
        print(f"{100 * (processor_seconds(pid) - before[pid]) / seconds:6.2f} % of a processor  {name}")


def programs() -> Iterator[tuple[int, str]]:
    """This process and those that it started, each with its command."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]
        except OSError:  # it has ended
            continue
        if os.getpid() in (parent, int(folder.name)):
            yield int(folder.name), command


def processor_seconds(pid: int) -> float:
    """What a process and its children that have ended used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", default="900M", help="for all: enough for the model to be in RAM whole")
    parser.add_argument("--hearing", default="256M", help="of that for the recogniser")
    parser.add_argument("--recogniser", help="as hearing.recogniser in flashd.yaml")
    parser.add_argument("--idle", type=float, help="seconds in which only the wake word is listened for")
    parser.add_argument("--spotter", type=Path, help="a folder with a model that spots keywords")
    parser.add_argument("--word", default="▁LOW ▁HIGH ▁LOW ▁HIGH ▁LOW", help="the wake word, which nobody says")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        desk = Desk(Path(name))
        settings = parse(configuration(desk, args))
        work: Callable[[], None] = (lambda: time_idle(desk, args.idle)) if args.idle else lambda: time_questions(desk)

        def when_ready() -> None:
            threading.Thread(target=run, daemon=True).start()

        def run() -> None:
            try:
                work()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        Daemon(settings, lambda: settings).run(when_ready)


if __name__ == "__main__":
    main()
