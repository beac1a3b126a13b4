"""The commands of the appliance: serve, check-config, jobs, show, safe, allow, and asking a daemon that runs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashd.cli.client import Client, socket_path
from flashd.cli.figures import as_json, in_words
from flashd.cli.progress import Waiting, say_cut
from flashd.cli.talk import Turns, talk
from flashd.cli.tty import as_terminal
from flashd.errors import INTERRUPTED, ConfigError, FlashdError, InputMissing, UsageError
from flashd.system.paths import SERVICE, pins_record
from flashd.system.printable import printable

if TYPE_CHECKING:
    from flashd.config.settings import Settings

CONFIG = Path("/etc/flashd/flashd.yaml")
UNFINISHED = Path("/var/lib/flashd/update.unfinished")
UNIT = "flashd.service"
STOPPED = "interrupted"
"""How an answer ended that Ctrl-C cut short."""


def add_commands(commands: Any) -> None:
    """Adds the appliance's commands to the parser's."""
    serve = commands.add_parser("serve", help="run the appliance: jobs, API, consoles, triggers, outputs")
    serve.add_argument("--config", type=Path, default=CONFIG, metavar="FILE.yaml")
    serve.add_argument("--demo", action="store_true", help="try it with no board: mock pins, a pseudo-terminal")
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check-config", help="is the configuration right?")
    check.add_argument("config", type=Path, nargs="?", default=CONFIG, metavar="FILE.yaml")
    check.set_defaults(run=_check)

    jobs = commands.add_parser("jobs", help="the latest jobs")
    jobs.add_argument("--most", type=int, default=20, help="how many (default 20)")
    show = commands.add_parser("show", help="one job: what was asked, answered, and what it cost")
    show.add_argument("number", type=int, metavar="ID")
    for command, run in ((jobs, _jobs), (show, _show)):
        command.add_argument("--config", type=Path, default=CONFIG, metavar="FILE.yaml")
        command.add_argument("--spool", type=Path, metavar="FILE.db", help="default: as the configuration says")
        command.add_argument("--json", action="store_true")
        command.set_defaults(run=run)

    doctor = commands.add_parser("doctor", help="what the board is, what stands in the way, and what to do")
    doctor.add_argument("--card", type=Path, metavar="PATH", help="a bundle or folder on the card to look at")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    update = commands.add_parser("update", help="a model or configuration from a folder, such as a USB stick's")
    update.add_argument("folder", type=Path, nargs="?", metavar="PATH", help="where flashd-update.yaml is")
    update.add_argument("--undo", action="store_true", help="put the old files back if the last did not end")
    update.add_argument("--config", type=Path, default=CONFIG, metavar="FILE.yaml")
    update.set_defaults(run=_update)

    safe = commands.add_parser("safe", help="turn off every pin that a decision drives; for after a crash")
    safe.add_argument("--config", type=Path, default=CONFIG, metavar="FILE.yaml")
    safe.set_defaults(run=_safe)

    allow = commands.add_parser("allow", help="tell systemd which devices and how much memory the service may have")
    allow.add_argument("--config", type=Path, default=CONFIG, metavar="FILE.yaml")
    allow.add_argument("--devices", action="store_true", help="the devices alone: memory changes with a restart")
    allow.set_defaults(run=_allow)


@dataclass
class Said:
    """A daemon's answer as its events come."""

    text: str = ""
    finish: str = ""  # stop, length, context, or STOPPED
    figures: dict[str, float] = field(default_factory=dict)  # with the last event

    def take(self, event: dict[str, Any]) -> str:
        """What an event adds to the text."""
        choice = event["choices"][0]
        piece: str = choice["delta"].get("content", "")
        self.text += piece
        if more := event.get("flashd"):
            self.finish, self.figures = more["finish"], more["figures"]
        return piece


def daemon_serves(args: argparse.Namespace) -> bool:
    """Whether a daemon is to answer: one is there, and no model or budget of one's own is asked for."""
    if not socket_path().exists():
        return False
    own = _own(args)
    if own and not args.model:
        print(f"flashd: the daemon is not asked, because of {own[0]}; a model is loaded beside it", file=sys.stderr)
    return not own


def _own(args: argparse.Namespace) -> list[str]:
    """The options that ask for a model or budget of one's own."""
    names = ("model", "memory", "context", "threads", "ignore_eos", "no_drafts", "no_snapshots")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def ask_daemon(args: argparse.Namespace, text: str) -> int:
    """Streams a daemon's answer to standard output; Ctrl-C cancels the job."""
    turns = [*([("system", args.system)] if args.system else []), ("user", text)]
    return INTERRUPTED if _say_daemons(args, _body(args), turns).finish == STOPPED else os.EX_OK


def chat_with_daemon(args: argparse.Namespace) -> int:
    """A talk with the daemon, here or on a serial line; it goes on whatever becomes of the daemon."""
    body = _body(args) | {"forget": True}
    if args.port is not None and _own(args):
        raise UsageError("--port is a console of the daemon, whose model and budget are its own: leave those out")

    def answer(turns: Turns) -> str | None:
        try:
            return _say_daemons(args, body, turns).text
        except UsageError:
            raise
        except FlashdError as error:
            print(printable(f"flashd: {error}"), file=sys.stderr, flush=True)
            return None

    with as_terminal(args.port, args.speed) if args.port is not None else nullcontext():
        talk(args.system, answer)
    return os.EX_OK


def _body(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked of a daemon beside the messages; what is None is as its configuration says."""
    if args.top_k or args.min_p or args.repeat_penalty != 1:
        raise UsageError("the daemon takes --temperature, --top-p and --seed; name a --model to draw otherwise")
    return {
        "max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed,
        "stop": args.stop,
    }  # fmt: skip


def _say_daemons(args: argparse.Namespace, body: dict[str, Any], turns: Turns) -> Said:
    """Streams a daemon's answer to standard output, or prints it whole with --json."""
    said = Said()
    messages = [{"role": role, "content": text} for role, text in turns]
    with closing(Waiting()) as waiting:
        try:
            with closing(Client(socket_path())) as client:
                for event in client.ask({**body, "messages": messages}, waiting.show):
                    piece = said.take(event)
                    if piece and not args.json:
                        waiting.close()
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            said.finish = STOPPED
        except FlashdError:
            if said.text and not args.json:
                print(flush=True)
            raise
    if args.json:
        print(as_json(said.text, said.finish, said.figures), flush=True)
    else:
        print(flush=True)
        say_cut(said.finish)
    if args.stats and said.figures:
        print(in_words(said.finish, said.figures), file=sys.stderr)
    return said


def _serve(args: argparse.Namespace) -> None:
    """flashd serve"""
    _needs_appliance()
    from flashd.serve import serve, serve_demo

    if args.demo:
        serve_demo(lambda manual: print(manual, flush=True))
    else:
        serve(args.config)


def _check(args: argparse.Namespace) -> None:
    """flashd check-config"""
    _needs_appliance()
    from device.appliance import check
    from flashd.config.settings import load

    settings = load(args.config, check)
    for doubt in _doubts(settings):
        print(printable(f"warning: {doubt}"), file=sys.stderr)
    print(
        f"{args.config}: right; {len(settings.serial)} serial, {len(settings.sensors)} sensors,"
        f" {len(settings.triggers)} triggers, {len(settings.outputs)} outputs"
    )


def _doubts(settings: Settings) -> Iterator[str]:
    """What is right, and would not work here and now: a card may not be in yet, a program not installed."""
    from flashd.config.devices import Hook, Speech
    from flashd.system.memory import parse_size

    model = Path(settings.model) if settings.model else None
    if model is not None and not model.exists():
        yield f"model: {model} is not there"
    elif model is not None and model.suffix == ".gguf":
        yield f"model: {model} is no bundle; flashd pack makes one of it"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if settings.memory and parse_size(settings.memory) > total:
        yield f"memory: {settings.memory} is more than the {total >> 20}M that this machine has"
    for port in (Path(line.port) for line in settings.serial if line.port.startswith("/")):
        if not port.is_char_device():
            yield f"serial: {port} is {'no line' if port.exists() else 'not there'}"
    for output in settings.outputs:
        if isinstance(output, Speech | Hook) and not shutil.which(output.command[0]):
            yield f"outputs: {output.command[0]} is not installed"


def _jobs(args: argparse.Namespace) -> None:
    """flashd jobs"""
    import msgspec

    from flashd.daemon import spool

    jobs = spool.read_latest(_spool_path(args), max(1, args.most))
    if args.json:
        print(msgspec.json.encode(jobs).decode())
        return
    for job in jobs:
        when = datetime.fromtimestamp(job.created).strftime("%Y-%m-%d %H:%M:%S")
        text = " ".join(job.result.text.split())
        print(f"{job.id:6}  {when}  {job.state:9}  {job.request.source:20}  {text[:60]}")


def _show(args: argparse.Namespace) -> None:
    """flashd show"""
    import msgspec

    from flashd.daemon import spool

    path = _spool_path(args)
    job = spool.read_one(path, args.number)
    if job is None:
        raise InputMissing(f"{path}: no job {args.number}; flashd jobs lists them")
    if args.json:
        print(msgspec.json.encode(job).decode())
        return
    for turn in job.request.turns:
        print(f"{turn.role}: {turn.content}")
    print(f"{job.state} ({job.result.finish}): {job.result.text}")
    for choice, probability in job.result.probabilities.items():
        print(f"{probability:9.4f} {choice}")
    if job.result.figures:
        print(in_words(job.result.finish, job.result.figures))


def _doctor(args: argparse.Namespace) -> int:
    """flashd doctor"""
    import json
    from dataclasses import asdict

    from flashd.cli.doctor import examine

    found = []
    for finding in examine(args.card or _configured_bundle()):
        found.append(finding)
        if not args.json:
            advice = f" -> {finding.advice}" if finding.advice and finding.level != "ok" else ""
            print(f"{finding.level:5} {finding.name:14} {finding.text}{advice}", flush=True)
    if args.json:
        print(json.dumps([asdict(f) for f in found], ensure_ascii=False))
    return os.EX_CONFIG if any(f.level == "fail" for f in found) else os.EX_OK


def _configured_bundle() -> Path:
    """The bundle that the daemon would answer with, or where its own would be."""
    from flashd.pack import default_model

    if CONFIG.exists():
        _needs_appliance()
        from flashd.config.settings import load

        try:
            model = load(CONFIG).model
        except ConfigError as error:
            print(printable(f"flashd: {error}"), file=sys.stderr)
            model = None
        if model:
            return Path(model)
    own = default_model.bundle_path()
    return next((path for path in (SERVICE / "flashd" / own.name, own) if path.exists()), Path.cwd())


def _update(args: argparse.Namespace) -> None:
    """flashd update"""
    _needs_appliance()
    from flashd.update import stick

    if (args.folder is None) == (not args.undo):
        raise UsageError("flashd update needs either a PATH or --undo")
    if args.undo:
        back = stick.undo(UNFINISHED)
        for path in back:
            print(f"{path}: the old one is in place again, since the last update did not come to its end")
        if back:
            stick.restart_if_running()
        return
    changed = stick.update(args.folder, args.config, UNFINISHED, stick.restart_service)
    for path in changed:
        print(f"{path}: updated; the old one is {path.name}.old")
    if not changed:
        print(f"{args.folder}: all of it is in place already")


def _safe(args: argparse.Namespace) -> None:
    """flashd safe: the pins that the daemon wrote down; those of the configuration only where there is no record."""
    _needs_appliance()
    from device.drives import held, read_record, turn_off
    from flashd.config.settings import Settings, load
    from flashd.daemon.last_run import note_death

    wrong: ConfigError | None = None
    try:
        settings = load(args.config)
    except ConfigError as error:
        settings, wrong = Settings(), error
    note_death(Path(settings.spool.path))
    record = pins_record(Path(settings.spool.path))
    pins = read_record(record)
    if pins is None:
        if wrong is not None:
            raise wrong
        pins = held(settings.triggers)
    turn_off(pins)
    record.unlink(missing_ok=True)


def _allow(args: argparse.Namespace) -> None:
    """flashd allow: the unit runs it before each start and reload, so that its sandbox is what is configured."""
    _needs_appliance()
    from device.nodes import nodes
    from flashd.config.settings import load

    settings = load(args.config)
    properties = ["DeviceAllow=", *(f"DeviceAllow={node} rw" for node in nodes(settings))]
    if not args.devices:
        # the figure that the plan obeys binds the whole service; systemd writes sizes as we do
        properties.append(f"MemoryMax={settings.memory.upper() if settings.memory else 'infinity'}")
    done = subprocess.run(["systemctl", "set-property", "--runtime", UNIT, *properties], check=False)
    if done.returncode:
        raise UsageError(f"systemctl did not allow {UNIT} what {args.config} names; it needs root")


def _spool_path(args: argparse.Namespace) -> Path:
    if args.spool:
        return Path(args.spool)
    _needs_appliance()
    from flashd.config.settings import load

    return Path(load(args.config).spool.path)


def _needs_appliance() -> None:
    import importlib.util

    missing = [
        name for name in ("yaml", "serial", "gpiozero", "starlette", "uvicorn") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise InputMissing(f"the appliance needs its extra ({', '.join(missing)}): pip install 'flashd[appliance]'")
    if sys.platform != "linux":
        raise UsageError("the appliance runs on Linux")
