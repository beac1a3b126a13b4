"""flashd serve and flashd check-config: the daemon, and whether its configuration is right."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from flashd.cli.demo_screen import DemoScreen
from flashd.cli.needs import check_appliance
from flashd.cli.options import CheckConfig, Serve
from flashd.system.printable import printable

if TYPE_CHECKING:
    from flashd.config.settings import Settings


def serve(options: Serve) -> None:
    """Runs the daemon until it is told to stop."""
    check_appliance()
    from flashd.serve import serve, serve_demo

    if options.demo:
        with closing(DemoScreen()) as screen:
            serve_demo(screen)
    else:
        serve(options.config)


def check_config(options: CheckConfig) -> None:
    """Says that a configuration is right, with warnings about this machine. Raises ConfigError if it is wrong."""
    check_appliance()
    from flashd.check_config import check
    from flashd.config.settings import load

    settings = load(options.config, check)
    for warning in _warnings(settings):
        print(printable(f"warning: {warning}"), file=sys.stderr)
    counts = {
        "serial line": len(settings.serial), "sensor": len(settings.sensors),
        "trigger": len(settings.triggers), "output": len(settings.outputs),
    }  # fmt: skip
    print(
        f"{options.config}: right; " + ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items())
    )


def _warnings(settings: Settings) -> Iterator[str]:
    """What is right and would not work here and now, such as a card that is not in yet, or is open to others."""
    from flashd.config.devices import Hook, Speech
    from flashd.system.memory import parse_size

    model = Path(settings.model) if settings.model else None
    if model is not None and not model.exists():
        yield f"model: {model} is not there"
    elif model is not None and model.suffix == ".gguf":
        yield f"model: {model} is not a bundle; make one of it with: flashd pack {model} --out {model.stem}.flash"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if settings.memory and parse_size(settings.memory) > total:
        yield f"memory: {settings.memory} is more than the {total >> 20}M that this machine has"
    for port in (Path(line.port) for line in settings.serial if line.port.startswith("/")):
        if not port.is_char_device():
            yield f"serial: {port} is {'not a serial line' if port.exists() else 'not there'}"
    if settings.api.network is not None:
        yield "api.network: nothing is encrypted; others on the network can read the PIN, questions and answers"
    for output in settings.outputs:
        if isinstance(output, Speech | Hook) and not shutil.which(output.command[0]):
            yield f"outputs: {output.command[0]} is not installed"
