"""Rows and groups: what goes in comes out, within what the bits can hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashd.bundle.bits import pack_bits, unpack
from flashd.bundle.formats import GroupFormat, RowFormat
from flashd.bundle.reader import dequantise
from flashd.bundle.row_kinds import BLOCK, RowKind
from flashd.pack.rounding.rows import encode_groups, encode_rows, is_ternary

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


def test_rows_of_zeros_stay_zero() -> None:
    form = RowFormat("int4", 64)
    assert not dequantise(form.views(encode_rows(np.zeros((3, 64), np.float32), form)), "int4").any()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_lay_out_each_neuron_as_one_run(kind: RowKind) -> None:
    random = np.random.default_rng(2)
    hidden, groups = 64, 3
    form = GroupFormat(kind, hidden)
    gate, up = (random.standard_normal((groups * BLOCK, hidden)).astype(np.float32) for _ in range(2))
    down = random.standard_normal((hidden, groups * BLOCK)).astype(np.float32)
    records = [encode_rows(w, form.row) for w in (gate, up)]
    raw = encode_groups(records, down, np.zeros((down.shape[1], 0), np.float32), form, None)
    assert raw.shape == (groups, form.nbytes)
    # neuron 5 of group 1: its gate row, its up row, its down column, one after the other
    at = 5 * form.bundle_bytes
    assert (raw[1, at : at + form.row.nbytes] == records[0][BLOCK + 5]).all()
    assert (raw[1, at + form.row.nbytes : at + 2 * form.row.nbytes] == records[1][BLOCK + 5]).all()
    column = raw[1, at + 2 * form.row.nbytes : at + form.bundle_bytes]
    if kind == "f16":
        assert np.allclose(column.view(np.float16), down[:, BLOCK + 5], atol=2e-3)
    else:
        # the levels follow the weights: the largest of the column is where the largest weight is, nearly
        levels = unpack(column, form.row.bits).astype(float)
        assert np.corrcoef(levels, down[:, BLOCK + 5])[0, 1] > 0.9


@given(
    st.sampled_from([2, 4, 8]), st.lists(st.integers(0, 3), min_size=4, max_size=64).filter(lambda v: len(v) % 4 == 0)
)
def test_packed_bits_unpack(bits: int, values: list[int]) -> None:
    q = np.array([values], np.uint8)
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
