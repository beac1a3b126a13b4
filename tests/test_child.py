"""What runs in a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PARENT = """
import signal, sys, time
from flashd.child import in_child

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may ignore it

def work():
    print("working", flush=True)
    time.sleep(60)

try:
    in_child(work)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_while_a_child_works_is_the_parent_s_to_answer() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"working\n"
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    _, said = parent.communicate(timeout=30)
    assert (parent.returncode, said) == (130, b"")
