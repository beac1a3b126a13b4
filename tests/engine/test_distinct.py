"""The distinct ones of some numbers are those of np.unique."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from flashd.engine.model.distinct import distinct


@pytest.mark.parametrize("shape", [0, 1, 7, 300, (5, 6)])
def test_they_are_those_of_numpy(shape: int | tuple[int, int]) -> None:
    numbers = np.random.default_rng(0).integers(0, 9, shape)
    found = distinct(numbers)
    assert found.dtype == np.int64 and np.array_equal(found, np.unique(numbers))


def test_no_masked_arrays_are_loaded() -> None:
    program = (
        "import sys, numpy as np; from flashd.engine.model.distinct import distinct; "
        "distinct(np.array([1])); sys.exit('numpy.ma' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
