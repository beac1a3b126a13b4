"""The random mixture: its text, how its experts are used, and that the engine pages it within its budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.engine.forward.paged import PagedModel
from flashd.engine.paging.eviction import LeastRecentlyUsed, Numbers
from flashd.pack.pack import pack
from flashd.system.freed_memory import give_back_freed_memory
from flashd.system.memory import MIB, resident_now
from tests.cli.command import run
from tests.engine.test_paths import opened
from tests.lab import mixture
from tests.lab.mixture import Shape, follower

SMALL = Shape(layers=3, vocabulary=1024, hidden=256, heads=4, kv_heads=2, head_dim=64, neurons=256)
"""Small experts, but as many as the real ones."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    pack(mixture.write(folder / "m.gguf", SMALL), folder / "m.flash", "int4")
    return folder / "m.flash"


@pytest.fixture
def half(bundle: Path) -> Iterator[PagedModel]:
    """The model with half of its experts in RAM."""
    with opened(bundle, 0.5 + 1e-6, 512) as model:
        assert isinstance(model, PagedModel)
        yield model


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q4_0])
def test_weights_are_around_zero_and_lengthen_as_they_should(tmp_path: Path, kind: Kind) -> None:
    path = mixture.write(tmp_path / "m.gguf", replace(SMALL, layers=1, experts=8), kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, gain in (("attn_q", 1.0), ("attn_output", mixture.OUTPUT_GAIN), ("ffn_down_exps", mixture.DOWN_GAIN)):
        tensor = tensors[f"blk.0.{name}.weight"]
        assert tensor.tensor_type == kind
        weights = gguf.dequantize(tensor.data, kind)
        spread = gain / np.sqrt(weights.shape[-1])
        assert weights.std() == pytest.approx(spread, rel=0.05) and abs(weights.mean()) < 0.02 * spread


@pytest.mark.slow
def test_each_token_follows_another_whatever_is_in_ram(half: PagedModel) -> None:
    ring, token, said = follower(SMALL), 7, []
    for _ in range(20):
        (logits,) = half.forward(np.array([token]), np.array([0]))
        assert int(logits.argmax()) == ring[token]
        token = int(ring[token])
        said.append(token)
    assert len(set(said)) == len(said)


@pytest.mark.slow
def test_most_experts_are_found_and_a_token_has_others_than_the_last(
    half: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[set[int]] = []
    real = LeastRecentlyUsed.use

    def use(self: LeastRecentlyUsed, units: Numbers) -> None:
        used.append(set(units[0].tolist()))
        real(self, units)

    monkeypatch.setattr(LeastRecentlyUsed, "use", use)
    ring, token = follower(SMALL), 7
    for _ in range(120):
        half.forward(np.array([token]), np.array([0]))
        token = int(ring[token])
    assert 0.7 <= half.hit_rate <= 0.8
    pairs = zip(used, used[SMALL.layers :], strict=False)
    assert np.mean([len(a & b) / SMALL.used for a, b in pairs]) < 0.4


@pytest.mark.slow
def test_experts_that_come_and_go_leave_nothing(half: PagedModel) -> None:
    ring, token = follower(SMALL), 7
    for i in range(260):
        if i == 60:
            give_back_freed_memory()
            before = resident_now()
        half.forward(np.array([token]), np.array([0]))
        token = int(ring[token])
    assert half.card.bytes_read > 128 << 20
    give_back_freed_memory()
    assert resident_now() - before < 8 << 20


@pytest.mark.slow
def test_a_session_for_each_expert_is_within_the_budget(bundle: Path) -> None:
    more = ("--context", "64", "--json", "--memory")
    plan = json.loads(run("plan", bundle, *more, "4G").stdout)
    assert plan["pinned"] == plan["groups"] and sum(plan["groups"]) == SMALL.layers * SMALL.experts
    all_fit = f"{-(-plan['total'] // MIB)}M"
    facts = json.loads(run("ask", "hello", "--model", bundle, "--max-tokens", "4", *more, all_fit).stdout)
    assert facts["peak_bytes"] <= facts["memory_bytes"]
