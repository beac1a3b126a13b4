"""Experts of fewer bits: whole layers of a mixture have them, on the card and in RAM."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle.errors import DamagedHeader
from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import NARROW, RowKind
from flashd.engine.expected import measure
from flashd.engine.forward.paged import PagedModel
from flashd.engine.planning.held import group_bytes
from flashd.engine.planning.rates import ASSUMED, remember_rates, remembered_rates
from flashd.engine.planning.unpacked import group_kept
from flashd.errors import DataError
from flashd.pack.lossy import narrow_experts
from flashd.pack.lossy.narrow_experts import ExpertsLayer, Shares, kinds_of
from flashd.pack.lossy.narrow_groups import Narrowing
from flashd.pack.pack import pack
from tests.bundle.test_reader import rewrite
from tests.engine.test_paths import all_logits, opened, plan
from tests.goldens.models import GOLDENS, TOKENS
from tests.pack.test_narrow import TEXT
from tests.reference import relative

MIXTURES = ("qwen3moe", "gpt-oss", "glm4moe", "granitemoe-shared")
"""One that is plain, one with biases, one whose first layer has no experts, one with a shared expert."""


def packed(folder: Path, name: str, most: float = 0.9, rows: RowKind = "int4") -> Header:
    golden = GOLDENS[name]
    source = golden.write(folder / "m.gguf")
    return pack(source, folder / "m.flash", rows, allowed=Narrowing(most, TEXT), context=golden.context)


@pytest.fixture(scope="module", params=MIXTURES)
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture, half of whose layers have experts of 2 bits, and the others of 3."""
    folder = tmp_path_factory.mktemp("narrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow_experts, "SHARES", (Shares(0.5, 0.5),))
        packed(folder, request.param)
    return folder / "m.flash"


def test_whole_layers_have_fewer_bits(narrow: Path) -> None:
    with Bundle(narrow) as bundle:
        bundle.verify()
        header, n = bundle.header, bundle.header.narrowed
        paged = [*header.model.paged_layers]
        kinds = [header.group_of(i).kind for i in paged]
        assert set(kinds) <= set(NARROW) and "int2" in kinds and (len(paged) < 2 or "int3" in kinds)
        assert [part.form for part in header.ffn_sections] == [header.group_of(i) for i in paged]
        for layer, kind in zip(paged, kinds, strict=True):
            for _, groups in bundle.groups(layer, 2):  # as the card has them
                assert groups.inputs.arrays()[0].shape[-1] == header.group_of(layer).row.q_bytes
            assert header.section_named(f"layer.{layer}.ffn.{kind}")
    assert n and abs(n.loss) <= 0.9 and 0 < n.divergence < 2 and n.tokens > 100


def test_what_is_in_ram_changes_no_bit_and_agrees_with_float32(narrow: Path) -> None:
    found = []
    for pinned, chunk in ((0.0, 20), (0.5, 48), (1.0, 1)):
        with opened(narrow, pinned, 64) as model:
            found.append(all_logits(model, TOKENS.tolist(), chunk))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    with opened(narrow, 0.5, 64, "float32") as model:
        exact = all_logits(model, TOKENS.tolist(), 20)
    apart = [relative(e, r) for e, r in zip(exact, found[0], strict=True)]
    assert np.quantile(apart, 0.1) < 0.05  # rounded inputs may change which experts a random router chooses


def test_sessions_of_experts_compute_the_same(narrow: Path) -> None:
    """Where all of a mixture has room its experts are constants, which have 4 bits whatever the card has."""
    with opened(narrow, 0.5, 64, "float32") as model:
        paged = all_logits(model, TOKENS.tolist(), 20)
    with Bundle(narrow) as bundle:
        every = bundle.header.model.paged_groups
        made = replace(plan(bundle, 1.0, 64, "float32"), constant_experts=True, buffers=0, pinned=every)
        constant = PagedModel(bundle, made)
        try:
            assert relative(paged, all_logits(constant, TOKENS.tolist(), 20)) < 1e-4
        finally:
            constant.close()


def test_they_take_as_little_of_ram_as_of_the_card(narrow: Path) -> None:
    with Bundle(narrow) as bundle:
        header = bundle.header
        sizes = group_bytes(header, None)
        assert list(sizes) == [group_kept(header.group_of(i)) for i in header.model.paged_layers]
        whole = group_kept(header.group)
        assert all(size < whole for size in sizes)


def test_this_machine_is_measured_for_them_apart(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Bundle(narrow) as bundle:
        made, header = plan(bundle, 0.5, 64), bundle.header
        exact = msgspec.structs.replace(header, narrowed=None)
        remember_rates(exact, made, ASSUMED)
        assert remembered_rates(exact, made) == ASSUMED and remembered_rates(header, made) is None
        measure(bundle, made)
        assert remembered_rates(header, made) not in (None, ASSUMED)


def test_the_layers_that_bear_it_best_have_the_fewest_bits(narrow: Path) -> None:
    with Bundle(narrow) as bundle:
        model = bundle.header.model
    first = model.paged_layers.start
    alike: list[float] = [float(i) for i in range(model.layers)]
    layers = [ExpertsLayer(np.arange(4), [], {"int3": e, "int2": -e}) for e in alike]
    count = len(model.paged_layers)
    assert kinds_of(model, layers, Shares(0, 0)) == ["int4"] * model.layers
    assert kinds_of(model, layers, Shares(0, 1)) == ["int4"] * first + ["int2"] * count
    one = kinds_of(model, layers, Shares(1 / count, 1 / count))  # the last has 2 bits, the first of the others 3
    assert one[-1] == "int2" and one[first] == ("int3" if count > 1 else "int2")


def test_where_no_loss_is_small_enough_it_is_packed_exact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        header = packed(tmp_path, "qwen3moe", -0.99)
    assert header.narrowed is None and "packed exact" in caplog.text
    assert {part.form.kind for part in header.ffn_sections} == {"int4"}


def test_a_search_tells_how_far_it_is_and_an_exact_bundle_needs_none(tmp_path: Path) -> None:
    golden, told = GOLDENS["qwen3moe"], list[tuple[int, int]]()
    source = golden.write(tmp_path / "m.gguf")

    def tell(done: int, layers: int) -> None:
        told.append((done, layers))

    header = pack(source, tmp_path / "m.flash", "int4", context=golden.context, on_layer=tell)
    assert not told
    pack(source, tmp_path / "m.flash", "int4", allowed=Narrowing(0.9, TEXT), context=golden.context, on_layer=tell)
    layers = header.model.layers
    assert {total for _, total in told} == {layers} and {done for done, _ in told} == {*range(1, layers + 1)}


def test_other_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only int4 rows can have fewer bits"):
        packed(tmp_path, "qwen3moe", rows="int8")


def test_part_of_a_layer_s_experts_cannot_have_fewer_bits(narrow: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.flash"
    copy.write_bytes(narrow.read_bytes())

    def change(header: dict[str, Any]) -> None:
        header["narrowed"]["int2"] = [1] * len(header["narrowed"]["int2"])
        header["narrowed"]["int3"] = [0] * len(header["narrowed"]["int2"])

    rewrite(copy, change)
    with pytest.raises(DamagedHeader, match="experts of whole layers"):
        Bundle(copy)
