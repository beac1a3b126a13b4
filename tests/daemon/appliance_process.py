"""The daemon with mock pins that can be pressed over HTTP: run as a program by tests that kill it.

python -m tests.daemon.appliance_process FILE.yaml
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from device import demo
from device.appliance import check
from device.mock_board import MockBoard
from flashd.config import settings
from flashd.daemon.notify import log_to_journal
from flashd.errors import FlashdError
from flashd.serve import Daemon


def main(path: Path) -> int:
    board = MockBoard()
    log_to_journal()
    try:
        wanted = settings.load(path, check)
        Daemon(wanted, lambda: settings.load(path, check), partial(demo.routes, board)).run(lambda: None)
    except FlashdError as error:
        print(f"flashd: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
