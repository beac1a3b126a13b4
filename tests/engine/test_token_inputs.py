"""What tokens say to each layer, and keys that layers borrow: Gemma 4, beside what every family is tested for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle.errors import DamagedHeader, DamagedRun
from flashd.bundle.prefix import digest
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.model.kv_cache import SPARE, cache_bytes
from flashd.engine.model.sizes import KEPT_ROWS, NODES
from flashd.engine.planning.plan import make_plan
from flashd.errors import UsageError
from tests.bundle.test_reader import poke
from tests.engine.test_decode import said
from tests.engine.test_paths import ARITHMETICS, all_logits, opened
from tests.engine.test_prefixes import fresh, process, teach
from tests.goldens.models import LAYERS, TOKENS
from tests.reference import relative

CONTEXT = 120


@pytest.fixture
def gemma(packed_golden: Callable[[str], Path]) -> Path:
    return packed_golden("gemma4")


def test_a_row_is_read_once_and_counted(gemma: Path) -> None:
    with Bundle(gemma) as bundle:
        wide, row = bundle.section("token_inputs"), bundle.section("head")
        assert wide.run == bundle.header.row_format("token_inputs").nbytes
        assert bundle.header.row_format("token_inputs").width == 32 * LAYERS
    # if the model pages, the head's rows are in RAM, and its rows are the embeddings
    for pinned, each in ((0.5, wide.run), (None, wide.run + row.run)):
        with opened(gemma, pinned, CONTEXT) as model:
            model.forward(np.array([5]), np.array([0]))
            assert model.card.table_bytes == each
            model.forward(np.array([5, 9, 5]), np.array([2]))
            assert model.card.table_bytes == 2 * each


def test_a_damaged_row_is_found_before_it_is_used(gemma: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m.flash"
    copy.write_bytes(gemma.read_bytes())
    with Bundle(copy) as bundle:
        section = bundle.section("token_inputs")
    poke(copy, section.offset + 8 * section.run, b"\xaa\x55\xaa\x55")
    with opened(copy, 0.5, CONTEXT) as model:
        model.forward(np.array([7]), np.array([0]))
        with pytest.raises(DamagedRun, match="'token_inputs' is damaged"):
            model.forward(np.array([8]), np.array([0]))


def test_the_plan_counts_rows_that_are_kept_and_no_keys_that_are_borrowed(gemma: Path) -> None:
    with Bundle(gemma) as bundle:
        header, model = bundle.header, bundle.header.model
    assert model.neurons == 416 and model.layer_neurons == [224, 224, 416, 416]
    assert [model.lender(i) for i in range(LAYERS)] == [0, 1, 0, 1]
    held = make_plan(header, memory=1 << 40, context=CONTEXT, threads=1, base=0).parts
    assert held["KV cache"] == cache_bytes(model, CONTEXT + SPARE) == 4 * 2 * (2 * 16 + 2 * 32) * (CONTEXT + SPARE)
    assert held["token inputs"] > KEPT_ROWS * header.row_format("token_inputs").nbytes


def test_drafts_and_snapshots_change_no_word(gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < NODES)
    prompt = TOKENS[:30].tolist()
    with opened(gemma, 0.9, CONTEXT) as model:
        assert model.drafts and model.branches
        for sampling in (Sampling(), Sampling(0.8, top_p=0.95, repeat_penalty=1.1, seed=5)):
            without, _ = said(model, prompt, sampling, drafts=False, limit=40)
            withs, figures = said(model, prompt, sampling, drafts=True, limit=40)
            assert withs == without and figures.drafted > 20
    teach(gemma, tmp_path, prompt, prompt, context=CONTEXT)
    expected = fresh(gemma, prompt, 0.5)
    with process(gemma, tmp_path, 0.5, CONTEXT) as p:
        logits, figures = p.logits(prompt)
        assert p.passes == [] and np.array_equal(logits, expected)


def test_a_model_in_ram_keeps_what_scales_its_layers(gemma: Path) -> None:
    """In the fast arithmetic too, which throws away the scales of rows once they are packed."""
    found = []
    for arithmetic in ARITHMETICS:
        with opened(gemma, None, CONTEXT, arithmetic) as model:
            found += [all_logits(model, TOKENS.tolist(), chunk) for chunk in (48, 1)]
    assert all(relative(found[0], other) < 0.15 for other in found)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer_kinds": [2, 1, 0, 3]}, "a layer finds no keys to borrow"),
        ({"ropes": 1}, "a rotary table does not exist"),
        ({"rope": 0}, "heads of two sizes share a rotary table"),
        ({"kv_heads": 3}, "cannot share"),
        ({"layer_neurons": [224, 224, 416]}, "widths of up to others"),
        ({"layer_neurons": [224, 224, 224, 224]}, "widths of up to others"),
        ({"layer_neurons": [33, 224, 416, 416]}, "do not make whole groups"),
        ({"width": 33}, "does not make sense"),
    ],
)
def test_a_forged_header_is_refused(gemma: Path, change: dict[str, Any], match: str) -> None:
    with Bundle(gemma) as bundle:
        header: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(bundle.header))
        size = bundle.file.size
    model = header["model"]
    for key, value in change.items():
        of = {"rope": model["attention"][0], "kv_heads": model["attention"][0], "width": model["token_inputs"]}
        of.get(key, model)[key] = value
    body = msgspec.json.encode(header)
    with pytest.raises(DamagedHeader, match=match):
        codec.decode_header(body, digest(body), size)


def test_keys_of_several_sizes_stay_in_float32(gemma: Path) -> None:
    with Bundle(gemma) as bundle, pytest.raises(UsageError, match="heads of several sizes"):
        make_plan(bundle.header, memory=1 << 40, context=CONTEXT, threads=1, base=0, kv="int8")
