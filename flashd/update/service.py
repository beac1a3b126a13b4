"""Starts the daemon anew, through systemd."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path

from flashd.errors import FlashdError

UNIT = "flashd.service"


def restart() -> None:
    """Has systemd restart flashd and waits until it is ready. Raises FlashdError if it does not start."""
    done = subprocess.run(["systemctl", "restart", UNIT], check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise FlashdError(f"flashd does not start: {said[0] if said else 'systemctl'}")


def restart_if_running() -> None:
    """Has systemd restart flashd if it runs. It waits for nothing, since at boot we come before flashd."""
    subprocess.run(["systemctl", "try-restart", "--no-block", UNIT], check=False)


def held(proc: Path = Path("/proc")) -> int:
    """Bytes of RAM that flashd holds now, and a restart gives back. 0 if it does not run."""
    with suppress(OSError, ValueError):
        shown = subprocess.run(
            ["systemctl", "show", "--property", "MainPID", "--value", UNIT],
            check=False,
            capture_output=True,
            text=True,
        )
        status = (proc / str(int(shown.stdout)) / "status").read_text()
        if found := re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) << 10
    return 0
