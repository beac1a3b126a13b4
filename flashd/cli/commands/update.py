"""flashd update: a model or a configuration from a USB stick."""

from __future__ import annotations

from pathlib import Path

from flashd.cli.needs import check_appliance
from flashd.cli.options import Update

UNFINISHED = Path("/var/lib/flashd/update.unfinished")


def update(options: Update) -> None:
    """Installs what a folder has, or puts the old files back."""
    check_appliance()
    from flashd.update import stick

    if options.folder is None:
        back = stick.undo(UNFINISHED)
        for path in back:
            print(f"{path}: the old file is back, since the last update was interrupted")
        if back:
            stick.restart_if_running()
        return
    changed = stick.update(options.folder, options.config, UNFINISHED, stick.restart_service)
    for path in changed:
        print(f"{path}: updated; the old file is {path.name}.old")
    if not changed:
        print(f"{options.folder}: everything in it is installed already")
