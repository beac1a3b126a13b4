"""flashd on a whole board, emulated: Debian under QEMU with systemd as PID 1. Not part of the test suite.

Run it as root:  python -m tests.board --arch aarch64
"""
