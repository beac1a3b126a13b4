"""The flashd command; python -m flashd.

A service that is stopped while Python still loads what it is made of ends at once, and says so.
"""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs one command; returns its exit code."""
    if sys.argv[1:2] == ["serve"]:
        signal.signal(signal.SIGTERM, _stop)
    from flashd.cli.main import main as run

    return run()


def _stop(_: int, __: FrameType | None) -> None:
    # an exception could be lost in a library that is just being imported; nothing is open yet
    os.write(2, b"flashd: stopped before it had begun\n")
    os._exit(os.EX_OK)


if __name__ == "__main__":
    sys.exit(main())
