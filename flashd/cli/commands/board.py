"""flashd safe and flashd allow: what systemd runs beside the daemon, with more rights than the daemon has."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flashd.cli.needs import check_appliance
from flashd.cli.options import Allow, Safe
from flashd.errors import ConfigError, UsageError
from flashd.system.memory import parse_size
from flashd.system.paths import pins_record

UNIT = "flashd.service"


def safe(options: Safe) -> None:
    """Turns off the pins that the daemon wrote down. If there is no record, it takes those of the configuration."""
    check_appliance()
    from device.drives import held, read_record, turn_off
    from flashd.config.settings import Settings, load
    from flashd.daemon.last_run import note_death

    wrong: ConfigError | None = None
    try:
        settings = load(options.config)
    except ConfigError as error:
        settings, wrong = Settings(), error
    note_death(Path(settings.spool.path))
    record = pins_record(Path(settings.spool.path))
    pins = read_record(record)
    if pins is None:
        if wrong is not None:
            raise wrong
        pins = held(settings)
    turn_off(pins)
    record.unlink(missing_ok=True)


def allow(options: Allow) -> None:
    """The unit runs this before each start and reload, so that its sandbox fits the configuration."""
    check_appliance()
    from device.needed_devices import needed_devices
    from flashd.config.settings import load

    settings = load(options.config)
    properties = ["DeviceAllow=", *(f"DeviceAllow={device} rw" for device in needed_devices(settings))]
    if not options.devices:
        # the plan keeps to this figure, and systemd holds the whole service to it
        properties.append(f"MemoryMax={parse_size(settings.memory) if settings.memory else 'infinity'}")
    done = subprocess.run(["systemctl", "set-property", "--runtime", UNIT, *properties], check=False)
    if done.returncode:
        raise UsageError(f"systemctl did not give {UNIT} what {options.config} names; run this as root")
