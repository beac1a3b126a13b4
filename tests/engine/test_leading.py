"""First layers of a mixture that have no experts: what the bundle, the plan and a forged header say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle import prefix
from flashd.bundle.errors import BadSection, DamagedHeader
from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.engine.forward.stages import Stage
from flashd.engine.planning import parts, plan, unpacked
from flashd.engine.planning.held import LEADING_FFNS
from flashd.engine.planning.plan import make_plan
from flashd.errors import DataError
from flashd.graphs.in_place import graph
from flashd.pack.pack import pack
from tests.goldens.models import EXPERTS, GOLDENS, NEURONS, USED


@pytest.fixture
def bundle(packed_golden: Callable[[str], Path]) -> Path:
    return packed_golden("lfm2moe")


def header_of(bundle: Path) -> Header:
    with Bundle(bundle) as opened:
        return opened.header


def test_a_first_layer_without_experts_has_an_ffn_in_ram(bundle: Path) -> None:
    header = header_of(bundle)
    m = header.model
    assert list(m.paged_layers) == [1, 2, 3] and [bool(m.leading_ffn(i)) for i in range(4)] == [
        True,
        False,
        False,
        False,
    ]
    names = {s.name for s in header.sections}
    assert {"layer.0.leading", "layer.1.router", "layer.1.experts", "layer.1.ffn"} <= names
    assert not {"layer.1.leading", "layer.0.router", "layer.0.experts", "layer.0.ffn"} & names
    first = m.leading_ffn(0)
    assert first and NEURONS <= first.neurons < NEURONS + 32
    held = first.groups * parts.group_held(header.of_leading(first).group, "int8") + parts.SESSION
    nbytes = header.group.nbytes * m.expert_groups
    least = plan.smallest(header, 64, 0)
    # one expert in each of three layers, beside which the states of further texts take a quarter
    for more in (0, 4 * m.expert_groups * unpacked.group_kept(header.group)):
        made = make_plan(header, memory=least + more, context=64, threads=1, base=0)
        assert made.parts[LEADING_FFNS] == held
        kept = made.pinned[0] // m.expert_groups
        assert made.pinned == (kept * m.expert_groups,) * 3 and bool(kept) == bool(more)
        assert made.card_bytes == 3 * USED * nbytes * (EXPERTS - kept) // EXPERTS
    with Bundle(bundle) as opened:
        assert opened.floats("layer.1.experts").shape == (EXPERTS,)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"leading": None}, DamagedHeader, "the first 1 of 4 layers have no experts and no other FFN"),
        ({"first": 0}, DamagedHeader, "the first 0 of 4 layers have no experts and no other FFN"),
        ({"first": 4}, DamagedHeader, "the first 4 of 4 layers have no experts and no other FFN"),
        ({"leading": {"neurons": 64, "group_neurons": 48}}, DamagedHeader, "make no whole groups"),
        ({"leading": {"neurons": 64, "group_neurons": 32}}, BadSection, r"layer\.0\.leading' has .* its model needs"),
        ({"first": 2}, BadSection, r"layer\.1\.leading' is missing"),
        ({"leaned": False}, BadSection, r"layer\.1\.experts' is not known"),
    ],
)
def test_a_header_with_other_ffns_than_the_file_is_refused(
    bundle: Path, changes: dict[str, Any], error: type[DataError], match: str
) -> None:
    said = msgspec.json.decode(msgspec.json.encode(header_of(bundle)))
    said["model"]["experts"] |= changes
    body = msgspec.json.encode(said)
    with pytest.raises(error, match=match):
        codec.decode_header(body, prefix.digest(body), bundle.stat().st_size)


def test_a_file_of_which_no_layer_has_experts_is_refused(tmp_path: Path) -> None:
    golden = GOLDENS["lfm2moe"]
    golden = type(golden)(**{**vars(golden), "keys": golden.keys | {"leading_dense_block_count": 4}})
    with pytest.raises(DataError, match="of 4 layers the first 4 have no experts"):
        pack(golden.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")


def test_the_bias_of_the_choice_is_no_part_of_a_weight(bundle: Path) -> None:
    """The router's graph: an expert of a large bias is chosen, and counts as its score says."""
    route = Stage(graph(header_of(bundle), "route"))
    scores = np.array([[2.0, 1.0, 0.0, -1.0, -2.0, -3.0]], np.float32)
    bias = np.array([0, 0, 0, 0, 0, 9], np.float32)
    used, weights = route({"choice.bias": bias}, scores=scores)
    sigmoid = 1 / (1 + np.exp(-scores[0, [5, 0]].astype(np.float64)))
    assert used.tolist() == [[5, 0]] and np.allclose(weights[0], sigmoid / sigmoid.sum(), rtol=1e-6)
