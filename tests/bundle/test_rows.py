"""Rows and groups: what goes in comes out, within what the bits can hold."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashd.bundle.arrays import QuantRows, Rows
from flashd.bundle.reader import dequantise, steps
from flashd.bundle.rows.bits import pack_bits, unpack
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.bundle.rows.kinds import BLOCK, CENTRE_BITS, NARROW, Floats, RowKind, largest_centre, unit_steps
from flashd.pack.rounding import rows
from flashd.pack.rounding.rows import Coded, encode_groups, encode_rows, is_ternary, write

KINDS: list[RowKind] = ["int4", "int8", "f16"]


@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1 << 30), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_rows_come_back_within_half_a_step(kind: RowKind, blocks: int, rows: int, seed: int, size: float) -> None:
    weights = (np.random.default_rng(seed).standard_normal((rows, blocks * BLOCK)) * size).astype(np.float32)
    form = RowFormat(kind, blocks * BLOCK)
    raw = encode_rows(weights, form)
    assert raw.shape == (rows, form.nbytes)
    back = dequantise(form.views(raw), kind)
    span = np.ptp(weights.reshape(rows, blocks, BLOCK), axis=2).max(1, keepdims=True)
    # 4 bits: half of a 15th of the range, and what clipped extremes and 8-bit codes add
    allowed = {"int4": 0.13, "int8": 0.006, "f16": 0.001}[kind]
    assert (np.abs(back - weights) <= allowed * span + 2e-7).all()


def test_each_block_has_the_range_and_the_levels_that_err_least() -> None:
    weights = np.random.default_rng(3).standard_normal((64, 20 * BLOCK)).astype(np.float32)
    form = RowFormat("int4", 20 * BLOCK)
    back = dequantise(form.views(encode_rows(weights, form)), "int4")
    # the whole range gives 0.082, one range for all blocks of a row 0.078, levels not fitted 0.076
    assert np.linalg.norm(back - weights) < 0.074 * np.linalg.norm(weights)


def test_a_source_s_own_grid_moves_over_without_loss() -> None:
    random = np.random.default_rng(1)
    scale = random.uniform(0.5, 1, (6, 4)).astype(np.float16).astype(np.float32)
    centre = random.uniform(-2, 2, (6, 4)).astype(np.float16).astype(np.float32)
    levels = random.integers(-4, 5, (6, 4, BLOCK))  # the outer levels unused: the range alone would mislead
    weights = (levels * scale[:, :, None] + centre[:, :, None]).astype(np.float32).reshape(6, -1)
    form = RowFormat("int4", 128)
    without, with_grid = (
        dequantise(form.views(encode_rows(weights, form, grid)), "int4") for grid in (None, (scale, centre))
    )
    assert np.abs(with_grid - weights).max() < 0.05
    assert np.linalg.norm(with_grid - weights) < 0.2 * np.linalg.norm(without - weights)


@pytest.mark.parametrize("kind", ["int4", "int8", "f16", "int3"])
def test_all_processors_round_and_the_bytes_are_those_of_one(kind: RowKind, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    weights = random.standard_normal((7, 4 * BLOCK)).astype(np.float32)
    grid = tuple(random.uniform(0.1, 0.4, (2, 7, 4)).astype(np.float32))
    weigh = random.uniform(0.5, 1, (1, 4, BLOCK)).astype(np.float32)
    form, seen = RowFormat(kind, 4 * BLOCK), set[str]()
    real = rows._encode

    def noted(*args: Any) -> None:
        seen.add(threading.current_thread().name)
        together.wait()
        real(*args)

    monkeypatch.setattr(rows, "_encode", noted)
    ways: list[dict[str, Any]] = [{}, {"grid": grid}, {"weigh": weigh}, {"centred": False}]
    for way in ways:
        raws = []
        for processors in (1, 3):
            seen.clear()
            together = threading.Barrier(processors, timeout=60)
            monkeypatch.setattr(rows, "WORTH_A_THREAD", 1)
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=processors: set(range(n)))
            raws.append(encode_rows(weights, form, **way).tobytes())
            assert len(seen) == processors
        assert raws[0] == raws[1], way


def test_only_rows_whose_grid_moves_over_badly_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    levels = random.integers(-8, 8, (3, 4, BLOCK)).astype(np.float32)
    scale = random.uniform(0.5, 1, (3, 4)).astype(np.float32)
    centre = np.float32(0.5) * scale
    centre[1, 0] = 1000  # its row's codes of centres are too coarse for the others
    weights = (levels * scale[:, :, None] + centre[:, :, None]).reshape(3, -1)
    fitted: list[int] = []
    real = rows.fitted

    def counted(blocks: Floats, *more: Any) -> Any:
        fitted.append(len(blocks))
        return real(blocks, *more)

    monkeypatch.setattr(rows, "fitted", counted)
    form = RowFormat("int4", 4 * BLOCK)
    raw = encode_rows(weights, form, (scale, centre))
    assert fitted == [1]
    monkeypatch.setattr(rows, "KEPT", 0)
    assert np.array_equal(encode_rows(weights, form, (scale, centre)), raw) and fitted == [1, 3]


def test_rows_of_zeros_stay_zero() -> None:
    form = RowFormat("int4", 64)
    assert not dequantise(form.views(encode_rows(np.zeros((3, 64), np.float32), form)), "int4").any()


@given(st.sampled_from(list(CENTRE_BITS)), st.integers(1, 70), st.integers(0, 1 << 30), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_centres_come_back_within_half_a_code(kind: RowKind, blocks: int, seed: int, size: float) -> None:
    random = np.random.default_rng(seed)
    centre = (random.standard_normal((3, blocks)) * size).astype(np.float32)
    weights = np.repeat(centre, BLOCK, axis=1)  # all weights of a block are its centre
    form = RowFormat(kind, blocks * BLOCK)
    rows = form.views(encode_rows(weights, form))
    assert isinstance(rows, QuantRows)
    _, back = steps(rows, kind)
    largest = np.abs(centre).max(1, keepdims=True)
    assert (np.abs(back - centre) <= (0.5 / largest_centre(kind) + 6e-4) * largest).all()  # 6e-4: float16


@pytest.mark.parametrize("kind", CENTRE_BITS)
def test_every_code_of_a_centre_comes_back_exactly(kind: RowKind) -> None:
    most = largest_centre(kind)
    assert most == {8: 32639, 4: 119}[CENTRE_BITS[kind]]
    every = np.arange(-most, most + 1, dtype=np.int32)
    codes = np.pad(every, (0, -len(every) % 64)).reshape(-1, 64)
    form, zeros = RowFormat(kind, 64 * BLOCK), np.zeros((len(codes), 64, BLOCK), np.uint8)
    raw = np.zeros((len(codes), form.nbytes), np.uint8)
    rows = form.views(raw)
    assert isinstance(rows, QuantRows)
    # the largest centre is as many units as it has codes, so that a code stands for itself
    step = np.broadcast_to(np.array([1, most], np.float16), (len(codes), 2))
    write(rows, Coded(zeros, zeros[:, :, 0], codes, step, np.zeros(len(codes), np.float32)), form)
    digits = unpack(rows.q[:, form.weight_bytes :], CENTRE_BITS[kind]).astype(np.int32).reshape(-1, 2, 64)
    radix = 1 << CENTRE_BITS[kind]
    assert (radix * (digits[:, 0] - radix // 2) + digits[:, 1] - radix // 2 == codes).all()
    _, back = steps(rows, kind)
    unit = np.float32(np.float16(most)) * unit_steps(kind)[1]
    assert (back == codes.astype(np.float32) * unit).all()


def test_digits_fill_whole_blocks() -> None:
    """A row of one block has two blocks of digits, and of what fills them all stands for nothing."""
    form = RowFormat("int4", 33 * BLOCK)
    assert (RowFormat("int4", BLOCK).digits, form.digits) == (64, 128)
    rows = form.views(encode_rows(np.random.default_rng(4).standard_normal((5, form.width)).astype(np.float32), form))
    assert isinstance(rows, QuantRows)
    digits = unpack(rows.q[:, form.weight_bytes :], 4).reshape(5, 2, 64)
    assert (digits[:, :, 33:] == 8).all() and (digits[:, :, :33] != 8).any()


@pytest.mark.parametrize(("neurons", "normed"), [(32, False), (96, False), (96, True)])
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "ternary", *NARROW])
def test_groups_lay_out_each_kind_of_array_in_one_piece(
    kind: RowKind, inputs: int, neurons: int, normed: bool
) -> None:  # fmt: skip
    random = np.random.default_rng(2)
    hidden, groups = 64, 3
    form = GroupFormat(kind, hidden, inputs, inputs, neurons, normed)
    sizes = (inputs, groups * neurons, hidden), (hidden, groups * neurons)
    matrices, down = (drawn(random, kind, size) for size in sizes)
    bias = random.standard_normal((groups * neurons, inputs)).astype(np.float32)
    records = [encode_rows(w, form.row) for w in matrices]
    norm = random.standard_normal(groups * neurons * normed).astype(np.float32)
    raw = encode_groups(records, down, bias, norm, form, None)
    assert raw.shape == (groups, form.nbytes) and form.nbytes % 64 == 0
    found = form.views(raw)
    # group 1: the rows of gate, then of up, as they are by themselves
    its = slice(neurons, 2 * neurons)
    of_inputs = np.concatenate([r[its] for r in records])
    assert same(found.inputs[1:2].joined(), form.row.views(of_inputs))
    # an output is a row: what it takes of the group's neurons
    of_down = encode_rows(np.ascontiguousarray(down[:, its]), form.column)
    assert same(found.down[1:2].joined(), form.column.views(of_down))
    assert (found.bias[1].reshape(inputs, neurons) == bias[its].T).all()
    assert (found.norm[1] == norm[its]).all()
    # the planes lie one behind the other, without gaps, and in each the rows side by side
    rows = [*found.inputs.arrays(), *found.down.arrays()]
    planes = [*(plane[1].T for plane in rows), found.bias[1], found.norm[1]]
    together = b"".join(plane.tobytes() for plane in planes)
    assert raw[1, : len(together)].tobytes() == together and not raw[1, len(together) :].any()
    assert form.nbytes - len(together) < 64


def drawn(random: np.random.Generator, kind: RowKind, size: tuple[int, ...]) -> Floats:
    """Weights; ternary ones have one size a row."""
    values = random.standard_normal(size).astype(np.float32)
    return np.asarray(np.sign(values) * 0.25 if kind == "ternary" else values, np.float32)


def same(a: Rows, b: Rows) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a.arrays(), b.arrays(), strict=True))


@given(st.sampled_from(NARROW), st.integers(1, 40), st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_narrow_rows_stand_for_as_much_when_they_are_widened(kind: RowKind, blocks: int, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((4, blocks * BLOCK)).astype(np.float32)
    form, wide = RowFormat(kind, blocks * BLOCK), RowFormat("int4", blocks * BLOCK)
    rows = form.views(encode_rows(weights, form))
    widened = form.wide(rows)
    assert [a.shape[1:] for a in widened.arrays()] == [shape for _, shape in wide.planes()]
    assert (dequantise(widened, "int4") == dequantise(rows, kind)).all()


@pytest.mark.parametrize("kind", ["int4", "int8", "f16", "ternary"])
def test_rows_that_are_not_narrow_are_not_copied(kind: RowKind) -> None:
    form = RowFormat(kind, 64)
    rows = form.views(np.zeros((2, form.nbytes), np.uint8))
    assert form.wide(rows) is rows


@given(st.sampled_from([2, 4, 8]), st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=16))
def test_packed_bits_unpack(bits: int, values: list[tuple[int, ...]]) -> None:
    q = np.array(values, np.uint8).reshape(1, -1)
    assert (unpack(pack_bits(q, bits), bits) == q).all()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_ternary_rows_come_back_as_they_were(blocks: int, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    levels = random.integers(-1, 2, (rows, blocks * BLOCK))
    weights = (levels * random.uniform(1e-3, 1e3, (rows, 1))).astype(np.float32)
    assert is_ternary(weights)
    form = RowFormat("ternary", blocks * BLOCK)
    raw = encode_rows(weights, form)
    assert raw.shape == (rows, blocks * BLOCK // 4 + 4)
    assert (dequantise(form.views(raw), "ternary") == weights).all()
    weights[0, :2] = 1, 2
    assert not is_ternary(weights)


@pytest.mark.parametrize("width", [0, -32, 33])
def test_a_width_off_the_blocks_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        RowFormat("int4", width)
