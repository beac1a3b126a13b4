"""What onnxruntime does not read any more once a session is open is not kept, and nothing else is thrown away."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import RowKind
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.forward.products import use_threads
from flashd.graphs.constant import Arithmetic
from flashd.graphs.unread import PARTS, unread
from flashd.pack.rounding.rows import encode_rows


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("arithmetic", ["int8", "float32"])
def test_what_is_kept_is_what_is_read(arithmetic: Arithmetic, eight: bool) -> None:
    use_threads(1)
    found = unread(arithmetic, eight)
    assert "q" in found  # on x86-64 and aarch64, weights are always repacked
    assert found <= set(PARTS)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("arithmetic", ["int8", "float32"])
def test_products_are_right_when_the_arrays_are_gone(
    tiny_bundle: Path, kind: RowKind, arithmetic: Arithmetic
) -> None:
    use_threads(1)
    random = np.random.default_rng(0)
    rows, x = random.standard_normal((96, 256), np.float32), random.standard_normal((3, 256), np.float32)
    form = RowFormat(kind, 256)
    with Bundle(tiny_bundle) as bundle:
        raw = encode_rows(rows, form)
        session = Constants(bundle.header, arithmetic).rows(form.views(raw), 256)
        before = multiplied(session, x=x)
        gone = weakref.ref(raw)
        del raw
        gc.collect()
        other = [
            random.integers(0, 256, size, np.uint8) for size in (24_576, 12_288, 6_144) * 40
        ]  # takes their place
        assert gone() is None and len(other) == 120
        assert np.array_equal(before, multiplied(session, x=x))
        assert np.abs(before - x @ rows.T).max() < (6 if kind == "int4" else 0.6)
