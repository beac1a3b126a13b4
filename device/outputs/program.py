"""Programs that outputs run: each leads a session of its own, and ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def goes_first(program: subprocess.Popen[bytes]) -> None:
    """If memory is short, the kernel ends this program, and not the daemon in whose group it is."""
    with suppress(OSError):
        Path(f"/proc/{program.pid}/oom_score_adj").write_text("1000")


def kill(program: subprocess.Popen[bytes]) -> None:
    """Ends a program that leads a session, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
