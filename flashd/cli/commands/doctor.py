"""flashd doctor: what this machine is, what stands in flashd's way, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flashd.bundle.reader import Bundle
from flashd.cli.needs import check_appliance
from flashd.cli.options import CONFIG, Doctor
from flashd.engine.paging.card_speed import CardSpeed, measure, remember, remembered
from flashd.errors import ConfigError, FlashdError
from flashd.system import board
from flashd.system.board import SINCE_START, SLOWED, UNDER_VOLTAGE
from flashd.system.memory import MIB
from flashd.system.paths import SERVICE
from flashd.system.printable import printable

if TYPE_CHECKING:
    from flashd.config.settings import Settings

HOT = 80.0  # degrees Celsius: a Raspberry Pi slows down at 85
LITTLE_SPACE = 256 * MIB
MUCH_WRITTEN = 2048 * MIB  # bytes a day; an SD card of 32 GB wears out after some 10 TB
SLOW_CARD = 20 * MIB
SECTOR = 512


@dataclass(frozen=True)
class Roots:
    """The folders in which the kernel shows its state. Tests have folders of their own."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    run: Path = Path("/run")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do if it is not well."""

    name: str
    level: Literal["ok", "warn", "fail"]
    text: str
    advice: str = ""


def doctor(options: Doctor) -> int:
    """Prints the findings. The exit code is EX_CONFIG if one of them is a failure."""
    found = []
    settings = _configured()
    voices, ears = (_voices(settings), _ears(settings)) if settings else ([], [])
    for finding in examine(options.card or _configured_bundle(settings), voices=voices, ears=ears):
        found.append(finding)
        if not options.json:
            advice = f" -> {finding.advice}" if finding.advice and finding.level != "ok" else ""
            print(f"{finding.level:5} {finding.name:14} {finding.text}{advice}", flush=True)
    if options.json:
        print(json.dumps([asdict(f) for f in found], ensure_ascii=False))
    return os.EX_CONFIG if any(f.level == "fail" for f in found) else os.EX_OK


def _voices(settings: Settings) -> list[str]:
    """The programs that are to make sounds."""
    from flashd.config.devices import Speech

    listener = settings.hearing.listener if settings.hearing else None
    tone = [listener.tone[0]] if listener and listener.tone else []
    return [*(output.command[0] for output in settings.outputs if isinstance(output, Speech)), *tone]


def _ears(settings: Settings) -> list[str]:
    """The programs that are to record and to understand speech."""
    from flashd.config.hearing import Program

    hearing = settings.hearing
    if hearing is None:
        return []
    recogniser = [hearing.recogniser.command[0]] if isinstance(hearing.recogniser, Program) else []
    return [hearing.microphone[0], *recogniser]


def _configured_bundle(settings: Settings | None) -> Path:
    """The bundle that the daemon would answer with, or the folder in which its default bundle would be."""
    from flashd.pack import default_model

    if settings and settings.model:
        return Path(settings.model)
    own = default_model.bundle_path()
    return next((path for path in (SERVICE / "flashd" / own.name, own) if path.exists()), Path.cwd())


def _configured() -> Settings | None:
    """The daemon's configuration, if there is one and it is right."""
    if not CONFIG.exists():
        return None
    check_appliance()
    from flashd.config.settings import load

    try:
        return load(CONFIG)
    except ConfigError as error:
        print(printable(f"flashd: {error}"), file=sys.stderr)
        return None


def examine(
    path: Path, roots: Roots | None = None, voices: Sequence[str] = (), ears: Sequence[str] = ()
) -> Iterator[Finding]:
    """Looks at the board, at the card that `path` lies on, and at sound if something is to speak or to hear.

    Args:
        path: a bundle, another large file, or a folder.
        voices: the programs that are configured to speak.
        ears: those that are configured to record and to understand.
    """
    roots = roots or Roots()
    yield from (_board(roots), _processor(roots), _memory(roots), _kernel(roots), _memory_cgroup(roots))
    yield from (_pins(roots), _serial(roots))
    yield from (_supply(roots), _temperature(roots), _clock(roots))
    if voices:
        yield _sound(roots, voices)
    if ears:
        yield _microphone(roots, ears)
    yield from _card(path, roots)
    yield from (_space(path), _written(path, roots), _systemd(roots), _onnxruntime())


def _board(roots: Roots) -> Finding:
    model = _text(roots.proc / "device-tree/model").rstrip("\0") or platform.machine()
    return Finding("board", "ok", f"{model}, {os.cpu_count()} processors")


INSTRUCTIONS = {
    "dot products": {"asimddp", "avx_vnni", "avx512_vnni"},
    "products of matrices": {"i8mm", "amx_int8"},
}
"""What products of 8-bit numbers are fast with, and the kernel's names of it."""


def _processor(roots: Roots) -> Finding:
    """Which of INSTRUCTIONS the processor has."""
    lines = (line.partition(":") for line in _text(roots.proc / "cpuinfo").splitlines())
    flags = {flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split()}
    if not flags:
        return Finding("processor", "ok", "it does not say which instructions it has")
    said = [f"{name} {'yes' if flags & of else 'no'}" for name, of in INSTRUCTIONS.items()]
    return Finding("processor", "ok", f"8-bit {', '.join(said)}")


def _memory(roots: Roots) -> Finding:
    kib = {k: int(v.split()[0]) for k, _, v in (x.partition(":") for x in _text(roots.proc / "meminfo").splitlines())}
    if "MemTotal" not in kib:
        return Finding("RAM", "warn", "unknown", "mount /proc")
    free = kib.get("MemAvailable", 0) // 1024
    text = f"{kib['MemTotal'] // 1024} MiB, {free} available"
    return Finding("RAM", "warn" if free < 200 else "ok", text, "end other programs, or use a board with more RAM")


def _kernel(roots: Roots) -> Finding:
    release = _text(roots.proc / "sys/kernel/osrelease") or platform.release()
    return Finding("kernel", "ok", f"{release}, {platform.machine()}")


def _memory_cgroup(roots: Roots) -> Finding:
    if "memory" in _text(roots.sys / "fs/cgroup/cgroup.controllers").split():
        return Finding("memory cgroup", "ok", "on")
    return Finding(
        "memory cgroup", "warn", "off; systemd cannot limit memory, but flashd keeps to its budget",
        "add cgroup_enable=memory to the line in /boot/firmware/cmdline.txt and reboot",
    )  # fmt: skip


def _pins(roots: Roots) -> Finding:
    chips = sorted(p.name for p in roots.dev.glob("gpiochip*"))
    if not chips:
        return Finding("pins", "ok", "none on this board")
    for library in ("lgpio", "RPi.GPIO", "pigpio"):
        if importlib.util.find_spec(library.partition(".")[0]):
            return Finding("pins", "ok", f"{', '.join(chips)}, through {library}")
    return Finding(
        "pins", "fail", "this board has pins, but no library for them is installed", "pip install 'flashd[appliance]'"
    )


def _serial(roots: Roots) -> Finding:
    kinds = ("serial0", "ttyAMA*", "ttyUSB*", "ttyACM*", "ttyGS*")
    ports = sorted(p for kind in kinds for p in roots.dev.glob(kind))
    if not ports:
        return Finding("serial ports", "ok", "none")
    closed = [p.name for p in ports if not os.access(p, os.R_OK | os.W_OK)]
    text = ", ".join(p.name for p in ports)
    if closed:
        return Finding(
            "serial ports",
            "warn",
            f"{text}; you may not use {', '.join(closed)}",
            "sudo usermod -aG dialout $USER, then log in again",
        )
    return Finding("serial ports", "ok", text)


def _sound(roots: Roots, voices: Sequence[str]) -> Finding:
    """Whether what is to speak is installed and has a sound card that plays."""
    if missing := _not_installed("sound", voices):
        return missing
    outputs = sorted(roots.dev.glob("snd/pcmC*D*p"))
    names = _sound_cards(roots)
    if not outputs:
        return Finding(
            "sound", "fail", f"speech is configured, and {'no card plays' if names else 'there is no sound card'}",
            "plug in a USB sound card or speaker, or write dtparam=audio=on into /boot/firmware/config.txt and"
            " reboot",
        )  # fmt: skip
    return _sound_devices("sound", outputs, names, voices)


def _sound_devices(what: str, devices: Sequence[Path], names: Sequence[str], programs: Sequence[str]) -> Finding:
    """Whether this user may use one of the devices that there are for some programs."""
    text = f"{', '.join(names) or devices[0].name}, for {', '.join(programs)}"
    if not any(os.access(each, os.R_OK | os.W_OK) for each in devices):
        return Finding(what, "warn", f"{text}; closed to you", "join the group audio")
    return Finding(what, "ok", text)


PACKAGES = {"arecord": "alsa-utils", "pocketsphinx_continuous": "pocketsphinx pocketsphinx-en-us"}
"""Debian's packages of programs that are not called like them."""


def _not_installed(what: str, programs: Sequence[str]) -> Finding | None:
    missing = next((program for program in programs if not shutil.which(program)), None)
    if missing is None:
        return None
    name = Path(missing).name
    return Finding(what, "fail", f"{missing} is not installed", f"sudo apt install {PACKAGES.get(name, name)}")


def _sound_cards(roots: Roots) -> list[str]:
    return re.findall(r"^ *[0-9]+ \[.*?\]: .* - (.*)$", _text(roots.proc / "asound/cards"), re.MULTILINE)


def _microphone(roots: Roots, ears: Sequence[str]) -> Finding:
    """Whether what is to hear is installed and has a sound card that records."""
    if missing := _not_installed("microphone", ears):
        return missing
    inputs = sorted(roots.dev.glob("snd/pcmC*D*c"))
    if not inputs:
        return Finding(
            "microphone", "fail", "speech is to be heard, and no sound card records",
            "plug in a USB microphone; arecord -l lists what records",
        )  # fmt: skip
    return _sound_devices("microphone", inputs, _sound_cards(roots), ears)


def _supply(roots: Roots) -> Finding:
    flags = board.read(roots.sys).flags
    if flags is None:
        return Finding("supply", "ok", "this board does not say")
    was, text = flags >> SINCE_START, f"{flags:#x}"
    if flags & (UNDER_VOLTAGE | SLOWED):
        what = "too weak now" if flags & UNDER_VOLTAGE else "the processor is slowed down now"
        advice = (
            "use the board's own supply and a short cable" if flags & UNDER_VOLTAGE else "give it a fan or heat sink"
        )
        return Finding("supply", "fail" if flags & UNDER_VOLTAGE else "warn", f"{what} ({text})", advice)
    if was & (UNDER_VOLTAGE | SLOWED):
        what = "too weak at times" if was & UNDER_VOLTAGE else "the processor was slowed down"
        return Finding(
            "supply", "warn", f"{what} since the start ({text})", "check the supply, the cable and the cooling"
        )
    return Finding("supply", "ok", "strong enough")


def _temperature(roots: Roots) -> Finding:
    celsius = board.read(roots.sys).temperature
    if celsius is None:
        return Finding("temperature", "ok", "this board does not say")
    if celsius >= HOT:
        return Finding("temperature", "warn", f"{celsius:.0f} °C", "give it a fan or heat sink")
    return Finding("temperature", "ok", f"{celsius:.0f} °C")


def _clock(roots: Roots) -> Finding:
    if (roots.dev / "rtc0").exists():
        return Finding("clock", "ok", "keeps the time without power")
    if (roots.run / "systemd/timesync/synchronized").exists():
        return Finding("clock", "ok", "set by the network; without network and power it stops")
    return Finding(
        "clock", "warn", "stops without power, so `at:` and `now` in flashd.yaml may be wrong",
        "add a clock (dtoverlay=i2c-rtc,ds3231), or use `every:`",
    )  # fmt: skip


def _card(path: Path, roots: Roots) -> Iterator[Finding]:
    """The bundle's header, and the speed of the card. The speed is measured once."""
    file = path
    if path.is_dir():
        file = max((p for p in path.iterdir() if p.is_file()), key=lambda p: p.stat().st_size, default=path)
    if file.suffix == ".flash":
        yield _bundle(file)
    try:
        speed = remembered(file, roots.sys)
        if speed is None:
            speed = measure(file)
            remember(file, speed, roots.sys)
    except FlashdError as error:
        yield Finding("card speed", "warn", str(error), "name a bundle on the card with --card")
        return
    yield _speed(speed)


def _bundle(path: Path) -> Finding:
    try:
        with Bundle(path) as bundle:
            name = bundle.header.model.name
    except FlashdError as error:
        return Finding("bundle", "fail", str(error), "copy the bundle again, or pack it again")
    return Finding("bundle", "ok", f"{path}: {name}, the header is whole (flashd verify reads all of it)")


def _speed(speed: CardSpeed) -> Finding:
    reads = ", ".join(f"{rate:.0f} of {n >> 10} KiB" for n, rate in sorted(speed.random_reads.items()))
    at_once = f"{speed.depth} reads at once" if speed.depth > 1 else "one read at a time"
    text = f"{speed.bandwidth / 1e6:.0f} MB/s in order, {at_once}; random reads a second: {reads}"
    if speed.bandwidth < SLOW_CARD:
        return Finding("card speed", "warn", text, "use a faster card, or a USB 3 or NVMe drive")
    return Finding("card speed", "ok", text)


def _space(path: Path) -> Finding:
    try:
        free = shutil.disk_usage(path if path.exists() else path.parent).free
    except OSError as error:
        return Finding("free space", "warn", f"{path}: {error.strerror}", "put the card in")
    low = free < LITTLE_SPACE
    return Finding("free space", "warn" if low else "ok", f"{free / MIB:.0f} MiB", "free some space" if low else "")


def _written(path: Path, roots: Roots) -> Finding:
    """Bytes a day that were written to the path's disk since the start. Field 7 of stat has the sectors written."""
    try:
        number = path.stat().st_dev
        disk = (roots.sys / "dev/block" / f"{os.major(number)}:{os.minor(number)}").resolve()
        fields = _text(disk / "stat").split() if (disk / "stat").exists() else []
        sectors, days = int(fields[6]), float(_text(roots.proc / "uptime").split()[0]) / 86400
    except (OSError, ValueError, IndexError):
        return Finding("written", "ok", "this file system does not say")
    daily = sectors * SECTOR / max(days, 1 / 24)
    much = daily > MUCH_WRITTEN
    text = f"{daily / MIB:.0f} MiB a day by all programs since the start"
    return Finding(
        "written", "warn" if much else "ok", text, "find the program that writes: sudo iotop -oPa" if much else ""
    )


def _systemd(roots: Roots) -> Finding:
    if not (roots.run / "systemd/system").is_dir():
        return Finding("systemd", "warn", "does not run here", "start flashd serve by hand")
    if importlib.util.find_spec("systemd") is None:
        return Finding("systemd", "warn", "runs, but its Python package is missing", "pip install 'flashd[systemd]'")
    return Finding("systemd", "ok", "runs")


def _onnxruntime() -> Finding:
    try:
        return Finding("onnxruntime", "ok", importlib.metadata.version("onnxruntime"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("onnxruntime", "fail", "missing", "install flashd again with pip")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
