"""flashd models, use and rm: the bundles on this machine, and which one the daemon answers with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashd.cli.bundles import LOOKING, all_bundles, find, is_model
from flashd.cli.needs import check_appliance
from flashd.cli.options import CONFIG, Models, Rm, Use
from flashd.errors import CannotWrite, ConfigError, FlashdError, InputMissing, MemoryTaken, UsageError
from flashd.system.memory import MIB
from flashd.system.printable import printable

if TYPE_CHECKING:
    from flashd.config.settings import Settings

HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"), Path("/tmp"))
"""Folders that the service cannot see."""

SYSTEMD = Path("/run/systemd/system")
"""It is there if systemd runs."""

STEP = 10 * MIB
SPARE = 1.1
"""Times the least RAM: what the devices of the board take comes on top of the daemon's."""


@dataclass(frozen=True)
class Found:
    """One line of `flashd models`."""

    name: str
    path: str
    model: str
    family: str
    size_bytes: int
    least_bytes: int  # of RAM, with the usual context
    whole: bool  # whether it stays in RAM whole
    tokens_per_second: float | None  # to expect; None: it pages, and the card was not measured
    daemon: bool  # whether the daemon answers with it


def models(options: Models) -> None:
    """Lists the bundles."""
    from flashd.system.child import Limits, in_child

    try:
        settings = _settings(CONFIG)
    except ConfigError as error:
        print(printable(f"flashd: {error}"), file=sys.stderr)
        settings = None
    found = in_child(lambda: list(_found(settings)), Limits(*LOOKING))
    if options.json:
        print(json.dumps([asdict(f) for f in found], ensure_ascii=False))
        return
    if not found:
        print("There are no bundles here; flashd pack MODEL makes one.")
        return
    width = max(len(f.name) for f in found)
    print(f"{'NAME':{width}}  {'FAMILY':12}{'SIZE':>9}{'LEAST RAM':>12}  TOKENS/S")
    for f in found:
        sizes = f"{f.size_bytes / MIB:>5.0f} MiB{f.least_bytes / MIB:>8.0f} MiB"
        daemon = "the daemon answers with it" if f.daemon else ""
        print(f"{f.name:{width}}  {f.family:12}{sizes}  {_rate(f):11}{daemon}".rstrip())
    memory = settings.memory if settings and settings.memory else "what is free"
    print(f"\nTokens/s are an estimate for this machine, with memory: {memory}.")
    if any(f.tokens_per_second is None for f in found):
        print("?: flashd doctor measures the card, once.")


def _rate(found: Found) -> str:
    if found.tokens_per_second is None:
        return "?"
    rate = found.tokens_per_second
    figures = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
    return f"about {figures}"


def _found(settings: Settings | None) -> Iterator[Found]:
    for path in all_bundles():
        try:
            yield _look(path, settings)
        except FlashdError as error:
            print(printable(f"flashd: {error}"), file=sys.stderr)


def _look(path: Path, settings: Settings | None) -> Found:
    from flashd.bundle.reader import Bundle
    from flashd.cli.own_model import plan_for_answers
    from flashd.engine.engine import Budget, rate_of
    from flashd.engine.expected import measure
    from flashd.engine.paging.card_speed import remembered
    from flashd.system.memory import available_memory, parse_size

    memory = parse_size(settings.memory) if settings and settings.memory else available_memory()
    with Bundle(path) as bundle:
        model = bundle.header.model
        least = plan_for_answers(bundle, Budget(memory=1 << 40)).least
        plan = plan_for_answers(bundle, Budget(memory=max(memory, least)))
        measure(bundle, plan)
        known = not plan.card_bytes or remembered(bundle.path)
        rate = rate_of(bundle, plan) if known else None
    used = Path(settings.model).resolve() if settings and settings.model else None
    return Found(
        name=path.stem, path=str(path), model=model.name, family=model.family, size_bytes=path.stat().st_size,
        least_bytes=least, whole=plan.resident, tokens_per_second=rate, daemon=path.resolve() == used,
    )  # fmt: skip


def use(options: Use) -> None:
    """Has the daemon answer with a bundle from now on."""
    check_appliance()
    from device.appliance import check
    from flashd.config.settings import load
    from flashd.system.child import Limits, in_child

    settings = load(options.config, check)
    path = find(options.name)
    if is_model(path):
        bundle = f"/var/lib/flashd/{path.stem}.flash"
        raise UsageError(f"{path} is not a bundle; make one of it with: flashd pack {path} --out {bundle}")
    if any(path.is_relative_to(folder) for folder in HIDDEN):
        raise UsageError(f"{path}: the service cannot see this folder; copy the bundle to /var/lib/flashd")
    needs = in_child(lambda: _needs(path, settings), Limits(*LOOKING))
    memory = _memory(path, needs, settings)
    before = options.config.read_bytes()
    _write(options.config, settings, path, memory)
    print(f"{options.config}: model is {path}, memory is {memory or 'what is free'}", flush=True)
    if options.config.resolve() == CONFIG.resolve() and SYSTEMD.is_dir():
        _restart(options.config, before)
    else:
        print("The daemon answers with it after: sudo systemctl restart flashd")


def _restart(config: Path, before: bytes) -> None:
    """Has the daemon answer with the new bundle; if it does not start, with the old one. Raises FlashdError."""
    from flashd.update import service

    print("flashd starts again; this takes as long as the model loads", flush=True)
    try:
        service.restart()
    except FlashdError as error:
        _put(config, before)
        with suppress(FlashdError):
            service.restart()
        raise FlashdError(f"{error}; {config} is as it was again. Why: journalctl -u flashd") from error
    print("flashd answers with it now")


def _needs(path: Path, settings: Settings) -> int:
    """Bytes of RAM with which the daemon can answer. Called in a child, which loads what the daemon has loaded."""
    from flashd.bundle.reader import Bundle
    from flashd.check_config import least_memory

    with Bundle(path) as bundle:
        least = least_memory(settings, bundle)
    return -(-int(least * SPARE) // STEP) * STEP


def _memory(path: Path, needs: int, settings: Settings) -> str | None:
    """The `memory` that works: the configured one, or more if that is too little. None: what is free."""
    from flashd.system.memory import available_memory, parse_size
    from flashd.update import service

    free = available_memory() + (service.held() if SYSTEMD.is_dir() else 0)
    if needs > free:
        raise MemoryTaken(
            f"{path.stem} needs {needs // MIB}M with a context of {settings.context}, and"
            f" {free // MIB}M are free; lower context, end other programs, or use a smaller model"
        )
    if settings.memory is None or parse_size(settings.memory) >= needs:
        return settings.memory
    return f"{needs // MIB}M"


def _write(config: Path, before: Settings, path: Path, memory: str | None) -> None:
    """Changes the two keys in the file. Raises ConfigError if the file is written in a way that is not understood."""
    import msgspec

    from flashd.config.edit import with_key
    from flashd.config.settings import parse

    text = with_key(config.read_text("utf-8"), "model", str(path))
    if memory != before.memory and memory is not None:
        text = with_key(text, "memory", memory)
    wanted = msgspec.structs.replace(before, model=str(path), memory=memory)
    try:
        right = parse(text, str(config)) == wanted
    except ConfigError:
        right = False
    if not right:
        lines = f"model: {path}" + (f" and memory: {memory}" if memory else "")
        raise ConfigError(f"{config}: flashd cannot change this file safely; change it yourself to {lines}")
    _put(config, text.encode())


def _put(config: Path, data: bytes) -> None:
    from flashd.system.new_file import NewFile

    target = config.resolve()
    with NewFile(target, target.stat().st_mode & 0o777) as file:
        file.write(data, 0)
        file.publish()


def rm(options: Rm) -> None:
    """Removes a bundle. Refuses the one that the daemon answers with."""
    path = find(options.name)
    if path.resolve() not in [bundle.resolve() for bundle in all_bundles()]:
        raise InputMissing(f"{path} is not one of the bundles that flashd models lists; remove it with rm")
    if path.resolve() == _configured(options.config):
        raise UsageError(f"the daemon answers with {path}; choose another one first: flashd use NAME")
    try:
        path.unlink()
    except OSError as error:
        raise CannotWrite(f"{path}: {error.strerror}") from error
    print(f"{path} is removed")


def _configured(config: Path) -> Path | None:
    """The bundle that a configuration names."""
    settings = _settings(config)
    return Path(settings.model).resolve() if settings and settings.model else None


def _settings(config: Path) -> Settings | None:
    """None if there is no configuration. Raises ConfigError."""
    if not config.exists():
        return None
    check_appliance()
    from flashd.config.settings import load

    return load(config)
