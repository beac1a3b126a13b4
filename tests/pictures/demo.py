"""`flashd serve --demo` in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

STOP_SECONDS = 60.0


class Demo:
    """A demo that is ready to answer. Use it in a with statement."""

    def __enter__(self) -> Demo:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flashd", "serve", "--demo"], stdout=subprocess.PIPE, text=True
        )
        self.cable = Path(self._read(r"screen (/dev/\S+)"))
        self.address = self._read(r"kiosk +(http://\S+)")
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(STOP_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self, pattern: str) -> str:
        """What the manual that the demo prints says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(pattern, line):
                return found[1]
        raise RuntimeError("the demo ended before it was ready")
