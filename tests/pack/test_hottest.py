"""The order of neurons on the card: the hottest first, alone or with those that their columns share a grid with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.architecture import Architecture
from flashd.bundle.arrays import PlainRows
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import BLOCK, Floats
from flashd.pack.families.properties import model_of
from flashd.pack.families.registry import family_of
from flashd.pack.families.rope import rope_tables
from flashd.pack.lossy.calibration import Calibration, Numbers, hottest, sample_tokens
from flashd.pack.pack import pack
from flashd.pack.sources.gguf import GgufModel
from flashd.pack.weights.weights import Weights
from tests import tiny


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Architecture:
    with Bundle(tiny_bundle) as bundle:
        return bundle.header.model


@given(st.data())
def test_every_neuron_has_its_place_and_hotter_ones_come_first(model: Architecture, data: st.DataObject) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=200, max_size=200)), np.float32)
    filled = np.pad(sizes, (0, model.neurons - 200))
    alone = hottest(sizes, whole=False)
    assert sorted(alone) == list(range(model.neurons)) and (np.diff(filled[alone]) <= 0).all()
    whole = hottest(sizes, whole=True).reshape(-1, BLOCK)
    assert (np.diff(filled[whole].sum(1)) <= 0).all()
    assert sorted(whole[:, 0] // BLOCK) == list(range(model.neurons // BLOCK)) and (np.diff(whole, axis=1) == 1).all()
    assert not (whole[:, 0] % BLOCK).any()


def test_a_source_without_a_grid_is_sorted_neuron_by_neuron(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "m.gguf")
    pack(source, tmp_path / "m.flash", "f16")
    order, sizes = written_order(source, tmp_path / "m.flash")
    assert (np.diff(sizes[order]) <= 0).all() and (np.diff(order) != 1).mean() > 0.9


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_groups_that_share_a_grid_stay_together(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "NEURONS", 192)  # whole blocks
    source = tiny.write(tmp_path / "m.gguf", kind=kind)
    pack(source, tmp_path / "m.flash", "f16")
    order, sizes = written_order(source, tmp_path / "m.flash")
    groups = order.reshape(-1, BLOCK)
    assert not (groups[:, 0] % BLOCK).any() and (np.diff(groups, axis=1) == 1).all()
    assert (np.diff(sizes[groups].sum(1)) <= 0).all()


def written_order(source: Path, bundle_path: Path) -> tuple[Numbers, Floats]:
    """(which neurons of the source the bundle's first layer has, in its order; their shares in the output)."""
    file = GgufModel(source)
    family = family_of(file)
    with Bundle(bundle_path) as bundle:
        m = bundle.header.model
        weights = Weights(file, family, m)
        inputs = bundle.all_groups(0).inputs
        tokens = sample_tokens(bundle.read("tokenizer"))[: m.context]
    assert isinstance(inputs, PlainRows)
    gates = inputs.w.reshape(m.groups, m.inputs, m.group_neurons, m.hidden)[:, 0].reshape(m.neurons, m.hidden)
    theirs = weights.ffns(0)[0].inputs[0].rows(slice(None))
    real = np.abs(gates).max(1) > 0
    nearest = np.abs(gates[real, None] - theirs[None]).sum(2).argmin(1)
    sizes = Calibration(weights, model_of(file, family), rope_tables(file, family), [tokens]).layer(0).sizes()
    return nearest, sizes
