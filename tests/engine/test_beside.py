"""Experts beside an FFN that every token uses, each with norms of its own: the mixture of Gemma 4.

That is beside what every family is tested for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle.errors import BadSection, DamagedHeader
from flashd.bundle.prefix import digest
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.engine.forward.stages import Stage
from flashd.engine.planning import parts
from flashd.engine.planning.plan import make_plan
from flashd.errors import DataError
from flashd.graphs.in_place import graph
from flashd.pack.original import Original
from flashd.pack.pack import pack
from tests.engine.test_prefixes import fresh, process, teach
from tests.goldens import folders
from tests.goldens.by_llama_cpp import perplexity
from tests.goldens.models import EXPERTS, GOLDENS, HIDDEN, LAYERS, SHARED, TOKENS, USED, Floats, Golden

GOLDEN = GOLDENS["gemma4-moe"]


class Apart(Golden):
    """The model with gate and up rows in stacks of their own, as some files have them."""

    def tensors(self) -> dict[str, Floats]:
        tensors = super().tensors()
        for i in range(LAYERS):
            gate, up = np.split(tensors.pop(f"blk.{i}.ffn_gate_up_exps.weight"), 2, axis=1)
            tensors |= {f"blk.{i}.ffn_gate_exps.weight": gate, f"blk.{i}.ffn_up_exps.weight": up}
        return tensors


@pytest.fixture
def bundle(packed_golden: Callable[[str], Path]) -> Path:
    return packed_golden("gemma4-moe")


def test_the_dense_branch_stays_in_ram_and_experts_page(bundle: Path) -> None:
    with Bundle(bundle) as opened:
        header, m = opened.header, opened.header.model
        assert opened.floats("layer.1.experts").shape == (EXPERTS,)
    assert (m.carried_width, m.ffn_input_width) == (2 * HIDDEN, 2 * HIDDEN)
    assert m.experts and m.experts.shared and m.experts.shared.neurons == SHARED
    assert [m.kv_heads_of(kind) for kind in m.attention] == [2, 1] and not m.attention[1].values
    made = make_plan(header, memory=1 << 40, context=64, threads=1, base=0)
    assert made.pinned == (EXPERTS * m.expert_groups,) * LAYERS
    none = make_plan(header, memory=made.smallest, context=64, threads=1, base=0)
    assert none.card_bytes == LAYERS * USED * m.expert_groups * header.group.nbytes
    assert none.parts["attention"] > parts.held(header.row_format("layer.0.shared_inputs"), 2 * SHARED, "float32")


def test_weights_are_scaled_and_add_up_to_no_sum(bundle: Path) -> None:
    with Bundle(bundle) as opened:
        route = Stage(graph(opened.header, "route"))
    scores = np.array([[2.0, 1.0, 0.0, -1.0, -2.0, 3.0]], np.float32)
    used, weights = route({"down.scale": np.array([1, 1, 1, 1, 1, 5], np.float32)}, scores=scores)
    share = 1 / (1 + np.exp(-1.0))
    assert used.tolist() == [[5, 0]] and np.allclose(weights[0], [5 * share, 1 - share], rtol=1e-6)


def test_sample_texts_are_computed_as_answers_are(tmp_path: Path) -> None:
    """While a model is packed, they say which experts are used most."""
    original = Original.open(GOLDEN.write(tmp_path / "m.gguf"), "f16")
    calibration = original.calibration([TOKENS])
    for i in range(LAYERS):
        calibration.mixture(i)
    assert calibration.perplexity() == pytest.approx(perplexity(GOLDEN.logits("gemma4-moe")), rel=1e-4)


def test_gate_and_up_rows_may_be_apart(tmp_path: Path, bundle: Path) -> None:
    pack(Apart(**vars(GOLDEN)).write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as apart, Bundle(bundle) as joined:
        for section in joined.header.sections:
            assert apart.read(section.name) == joined.read(section.name), section.name


@pytest.mark.parametrize(
    "part", ["ffn_gate_inp.scale", "ffn_down_exps.scale", "pre_ffw_norm_2.weight", "ffn_gate.weight"]
)
def test_a_file_without_a_part_is_refused_by_name(tmp_path: Path, part: str) -> None:
    lacking = {name: shape for name, shape in GOLDEN.layer.items() if name != part}
    source = replace(GOLDEN, layer=lacking).write(tmp_path / "m.gguf")
    with pytest.raises(DataError, match=f"blk.0.{part}' is missing"):
        pack(source, tmp_path / "m.flash", "int4")


def test_what_a_config_says_of_experts_that_are_not_there_means_nothing(tmp_path: Path) -> None:
    name = "gemma4-keys"
    saved = folders.write(tmp_path / "m", name, GOLDENS[name].write(tmp_path / "m.gguf"))
    config = msgspec.json.decode((saved / "config.json").read_bytes())
    config |= {"enable_moe_block": False, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 40}
    (saved / "config.json").write_bytes(msgspec.json.encode(config))
    assert pack(saved, tmp_path / "m.flash", "int4").model.experts is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"norms": ["attention", "ffn", "experts", "final"]}, DamagedHeader, "without an expert that all use"),
        ({"shared": None}, DamagedHeader, "without an expert that all use"),
        ({"early": True}, DamagedHeader, "without an expert that all use"),
        ({"router_scaled": False}, BadSection, r"layer\.0\.vectors' has .* its model needs"),
        ({"weights_scaled": False}, BadSection, r"layer\.0\.experts' is not known"),
    ],
)
def test_a_forged_header_is_refused(bundle: Path, change: dict[str, Any], error: type[DataError], match: str) -> None:
    with Bundle(bundle) as opened:
        header: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(opened.header))
    for key, value in change.items():
        (header["model"] if key == "norms" else header["model"]["experts"])[key] = value
    body = msgspec.json.encode(header)
    with pytest.raises(error, match=match):
        codec.decode_header(body, digest(body), bundle.stat().st_size)


def test_a_snapshot_outlives_a_restart(bundle: Path, tmp_path: Path) -> None:
    prompt = TOKENS[:30].tolist()  # longer than the window
    teach(bundle, tmp_path, prompt, prompt)
    with process(bundle, tmp_path, 0.5) as p:
        logits, _ = p.logits(prompt)
        assert p.passes == [] and np.array_equal(logits, fresh(bundle, prompt, 0.0))
