"""Tests. Each of several processes that test keeps to a processor: threads that wait for one another spin meanwhile.

This is said before numpy is loaded, which takes as many threads as it finds processors.
"""

import os

if _number := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
    _here = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_here[int(_number) % len(_here)]})
