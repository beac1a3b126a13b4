"""Perplexity, from logits that are never there as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from flashd.engine.evaluate import perplexity
from flashd.engine.planning.parts import PREFILL_TOKENS
from flashd.graphs.constant import Arithmetic
from flashd.pack.pack import pack
from flashd.system.memory import MIB
from tests.conftest import DATA
from tests.engine.test_head import model as with_head
from tests.engine.test_paths import all_logits, opened
from tests.goldens.models import GOLDENS

TOKENS = [1 + i * i % 90 for i in range(2 * PREFILL_TOKENS + 44)]


@pytest.mark.parametrize("name", ["llama3", "gemma2", "phi2"])  # plain; a cap on logits; a bias of the head
def test_it_is_that_of_the_logits(tmp_path: Path, name: str) -> None:
    pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    windows = [TOKENS[i : i + 64] for i in range(0, len(TOKENS), 64)]
    lost, counted = 0.0, 0
    with opened(tmp_path / "m.flash", 0.5, 64) as model:
        for window in windows:
            logits = all_logits(model, window, 64).astype(np.float64)[:-1]
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            lost -= np.log(p[np.arange(len(logits)), window[1:]]).sum()
            counted += len(logits)
    for pinned, rows in ((0.5, 16), (0.0, None), (1.0, 32)):
        with with_head(tmp_path / "m.flash", pinned, rows) as model:
            found = perplexity(model, TOKENS)
            assert found.tokens == counted
            assert found.perplexity == pytest.approx(np.exp(lost / counted), rel=1e-4)
            # and the pass after it is right
            again = perplexity(model, TOKENS)
            assert again == found
    exact: list[float] = []
    for share, arithmetic in product((0.5, None), get_args(Arithmetic)):
        with opened(tmp_path / "m.flash", share, 64, arithmetic) as model:
            value = perplexity(model, TOKENS).perplexity
            assert value is not None and value == pytest.approx(np.exp(lost / counted), rel=3e-3)
            exact += [value] if arithmetic == "float32" else []
    assert exact[0] == pytest.approx(exact[1], rel=1e-4)


def test_who_stops_in_the_middle_leaves_the_next_pass_right(tmp_path: Path) -> None:
    pack(GOLDENS["llama3"].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with with_head(tmp_path / "m.flash", 0.5, 16) as model:
        expected = model.forward(np.array(TOKENS[:20]), np.array([19]))
        model.cache.truncate(0)
        parts = model.in_parts(np.array(TOKENS[:30]))
        next(parts)
        parts.close()  # type: ignore[attr-defined]
        assert model.cache.length == 0
        assert np.array_equal(model.forward(np.array(TOKENS[:20]), np.array([19])), expected)


EVAL = """
import sys
from itertools import product
from flashd.cli.main import main
from flashd.system.memory import peak
code = main(sys.argv[1:])
print(peak())
sys.exit(code)
"""


def test_the_peak_stays_under_the_budget(packed: dict[str, Path]) -> None:
    text = ["eval", str(packed["int4"]), "--text", str(DATA / "prose.txt"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", EVAL, *text, "--memory", "200M", "--context", "512"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts, peak = done.stdout.splitlines()
    assert json.loads(facts)["tokens"] > PREFILL_TOKENS
    assert int(peak) <= 200 * MIB
