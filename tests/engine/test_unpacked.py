"""Groups that stay in RAM as the card has them: their products, and the memory that they take."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from flashd.bundle.arrays import Groups, Mxfp4Rows, PlainRows, QuantRows, TernaryRows
from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows.formats import GroupFormat
from flashd.bundle.rows.kinds import Floats, RowKind
from flashd.engine.forward import attention_weights
from flashd.engine.forward.attention_weights import UnpackedAttention
from flashd.engine.forward.kept import Scratch, Shelf
from flashd.engine.forward.unpacked import Multiplier, in_turn
from flashd.engine.model.sizes import TOKENS_UNPACKED
from flashd.engine.planning import parts
from flashd.engine.planning.unpacked import OBJECTS, group_kept
from flashd.graphs.constant import Arithmetic
from flashd.pack.pack import pack
from flashd.system.onnx_session import open_session, start_pool
from tests.goldens.models import GOLDENS

KINDS: tuple[RowKind, ...] = ("int4", "int8", "f16", "ternary", "mxfp4", "int3", "int2")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    """Of a tiny mixture. Its expert's matrices have rows of 64 and of 32 weights or more."""
    folder = tmp_path_factory.mktemp("unpacked")
    pack(GOLDENS["qwen3moe"].write(folder / "m.gguf"), folder / "m.flash", "int4")
    start_pool(1)
    with Bundle(folder / "m.flash") as bundle:
        return bundle.header


def drawn(form: GroupFormat, seed: int) -> Groups:
    """A group of random weights of about 1: any bytes are weights, only what they are multiplied with is chosen."""
    random = np.random.default_rng(seed)
    groups = form.views(random.integers(0, 256, (1, form.nbytes), np.uint8))
    for rows in (groups.inputs, groups.down):
        match rows:
            case PlainRows():
                rows.w[:] = random.normal(size=rows.w.shape)
            case TernaryRows():
                rows.scale[:] = random.uniform(0.5, 1, rows.scale.shape)
            case Mxfp4Rows():
                rows.exponent[:] = random.integers(125, 128, rows.exponent.shape)
            case QuantRows():
                rows.step[:] = random.uniform(0.1, 0.2, rows.step.shape)
    return groups


def share(groups: Groups, form: GroupFormat, h: Floats) -> Floats:
    """[T, H], in numpy and float64."""
    wide = form.wide(groups[:1])
    inputs = dequantise(wide.inputs.joined(), form.row.widened.kind).astype(np.float64)
    down = dequantise(wide.down.joined(), form.column.widened.kind).astype(np.float64)
    gate, up = np.split(h @ inputs.T, 2, axis=1)
    return np.asarray((gate / (1 + np.exp(-gate)) * up) @ down.T, np.float64)


def of_kind(header: Header, kind: RowKind, down: RowKind | None = None) -> GroupFormat:
    form = header.group_of(0)
    return GroupFormat(kind, form.hidden, form.inputs, 0, form.neurons, down_kind=down)


def multiplier(
    header: Header, form: GroupFormat, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> Multiplier:
    monkeypatch.setattr(Header, "group_of", lambda *_: form)
    return Multiplier(header, arithmetic)


@pytest.mark.parametrize("arithmetic", get_args(Arithmetic))
@pytest.mark.parametrize(("kind", "down"), [*((kind, None) for kind in KINDS), ("int4", "int8"), ("mxfp4", "int4")])
def test_a_product_is_that_of_the_weights_whatever_their_kind(
    header: Header, kind: RowKind, down: RowKind | None, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = of_kind(header, kind, down)
    groups, h = drawn(form, 1), np.random.default_rng(2).normal(size=(5, form.hidden)).astype(np.float32)
    multiply = multiplier(header, form, arithmetic, monkeypatch)
    made = multiply(Shelf().keep(form, groups), multiply.entering(form.row, h))
    right = share(groups, form, h)
    exact = arithmetic == "float32" or kind == "f16"
    assert np.sqrt(np.mean((made - right) ** 2)) < (1e-5 if exact else 0.02) * right.std()
    assert exact or not np.allclose(made, right, rtol=1e-4, atol=1e-4 * right.std())  # inputs are rounded


@pytest.mark.parametrize("arithmetic", get_args(Arithmetic))
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_share_however_many_others_there_are(
    header: Header, kind: RowKind, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, tokens = of_kind(header, kind), 2 * TOKENS_UNPACKED + 1
    h = np.random.default_rng(3).normal(size=(tokens, form.hidden)).astype(np.float32)
    multiply = multiplier(header, form, arithmetic, monkeypatch)
    kept = Shelf().keep(form, drawn(form, 4))
    made = multiply(kept, multiply.entering(form.row, h))
    for some in (slice(0, 1), slice(tokens - 1, tokens), slice(3, 5), slice(1, 9), slice(1, TOKENS_UNPACKED + 3)):
        assert np.array_equal(multiply(kept, multiply.entering(form.row, h[some])), made[some])


def test_groups_that_go_leave_their_memory_to_others(header: Header) -> None:
    form, shelf = header.group_of(0), Shelf()
    kept = [shelf.keep(form, drawn(form, seed)) for seed in range(3)]
    places = {group.inputs.arrays()[0].ctypes.data for group in kept}
    kept.clear()
    gc.collect()
    again = [shelf.keep(form, drawn(form, seed)) for seed in range(3, 6)]
    assert {group.inputs.arrays()[0].ctypes.data for group in again} == places
    for group, seed in zip(again, range(3, 6), strict=True):
        for held, came in zip(group.inputs.arrays(), drawn(form, seed).inputs.arrays(), strict=True):
            assert np.array_equal(held, came[0].T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_what_a_group_takes(header: Header, kind: RowKind) -> None:
    form = of_kind(header, kind)
    kept = Shelf().keep(form, drawn(form, 5))
    arrays = [*kept.inputs.arrays(), *kept.down.arrays()]
    first = min(array.ctypes.data for array in arrays)
    end = max(array.ctypes.data + array.nbytes for array in arrays)
    assert 0 <= group_kept(form) - OBJECTS - (end - first) < 64


@pytest.mark.parametrize("arithmetic", get_args(Arithmetic))
@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi2", "glm4-flash"])  # plain; norms; biases; products by head
def test_the_plan_counts_what_attention_takes(
    tmp_path: Path, name: str, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    start_pool(1)
    opened: list[bytes] = []

    def opening(graph: bytes, **more: Any) -> Any:
        opened.append(graph)
        return open_session(graph, **more)

    monkeypatch.setattr(attention_weights, "open_session", opening)
    with Bundle(tmp_path / "m.flash") as bundle:
        header = bundle.header
        weights = UnpackedAttention(bundle, arithmetic, "float32")
        for layer in range(header.model.layers):
            weights.load(layer)
        behind = parts.SESSION * header.model.layers if header.model.products_behind() else 0
    arrays = [array for layer in weights._layers for kept in layer.rows.values() for array in kept.rows.arrays()] + [
        vector for layer in weights._layers for vector in layer.vectors.values()
    ]
    sessions = 4 * len(opened) // (3 if arithmetic == "float32" else 2)  # of float32 one for few tokens and for many
    counted = parts.attention_kept(header) - sessions * parts.SESSION - behind
    nbytes = sum(array.nbytes for array in arrays)
    assert nbytes <= counted <= nbytes + len(arrays) * (OBJECTS + 64)
    assert len(opened) == len(set(opened)) < 3 * header.model.layers  # layers that are alike share them


def test_scratch_is_as_large_as_the_largest_that_was_asked_for() -> None:
    """The parts of a head have several sizes: each would else have memory of its own."""
    scratch = Scratch()
    first, other = scratch.array("w", np.uint8, (4, 32, 907)), scratch.array("scale", np.float32, (4, 907))
    other[:] = 7
    smaller = scratch.array("w", np.uint8, (4, 32, 176))
    assert smaller.shape == (4, 32, 176) and np.shares_memory(first, smaller)
    assert smaller.flags.c_contiguous and (other == 7).all()
    larger = scratch.array("w", np.float32, (4, 32, 907))
    assert larger.dtype == np.float32 and not np.shares_memory(first, larger)


def test_what_is_made_in_several_threads_comes_in_turn() -> None:
    running: list[int] = []
    lock, most = threading.Lock(), 3

    def call(number: int) -> tuple[int, int]:
        with lock:
            running.append(number)
            at_once = len(running)
        time.sleep(0.002 * (number % 3))
        with lock:
            running.remove(number)
        return number, at_once

    with ThreadPoolExecutor(8) as workers:
        made = list(in_turn(workers, (partial(call, number) for number in range(20)), most))
        with pytest.raises(ZeroDivisionError):
            list(in_turn(workers, [lambda: 1, lambda: 1 // 0, lambda: 2], most))
        breaking_off = in_turn(workers, (partial(call, number) for number in range(20)), most)
        assert next(breaking_off)[0] == 0
        breaking_off.close()
        assert not running  # none works on behind the back of whoever broke off
    assert [number for number, _ in made] == list(range(20))
    assert max(at_once for _, at_once in made) <= most
