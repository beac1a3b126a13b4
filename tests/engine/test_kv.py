"""The KV cache in 8 bits: what it holds, what it costs, and that an answer does not depend on how it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashd.bundle.reader import Bundle
from flashd.engine.cache import snapshot
from flashd.engine.cache.snapshot import Origin
from flashd.engine.forward.paged import PagedModel
from flashd.engine.forward.resident import ResidentModel
from flashd.engine.model.branches import Branches
from flashd.engine.model.contract import Model
from flashd.engine.model.kv_cache import SPARE, cache_bytes, widened_bytes
from flashd.engine.model.kv_rows import empty, read, write
from flashd.engine.planning.plan import smallest
from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import T
from flashd.graphs.rounding import KvFormat, block, rounded
from flashd.pack.pack import pack
from flashd.system.onnx_session import open_session, start_pool
from tests.engine.test_paths import all_logits, plan
from tests.goldens.models import GOLDENS, TOKENS
from tests.reference import Floats, relative

TEXT = TOKENS.tolist()


@contextmanager
def opened(path: Path, pinned: float | None, kv: KvFormat) -> Iterator[Model]:
    with Bundle(path) as bundle:
        made = dataclasses.replace(plan(bundle, pinned, 128, "float32"), kv=kv)
        model: Model = ResidentModel(bundle, made) if made.resident else PagedModel(bundle, made)
        try:
            yield model
        finally:
            model.close()


@given(st.integers(0, 2**32 - 1), st.floats(-25, 36), st.sampled_from([18, 32, 64]))
@settings(max_examples=30, deadline=None)
def test_a_row_that_was_rounded_is_kept_as_it_is(seed: int, size: float, d: int) -> None:
    start_pool(1)
    g = Graph()
    x = g.input("x", T.FLOAT, [1, "T", 2 * d])
    g.output("y", T.FLOAT, [1, "T", 2 * d], rounded(g, x, d))
    values = np.random.default_rng(seed).normal(size=(1, 5, 2 * d)).astype(np.float32) * np.float32(10) ** size
    values[0, 2] = 0
    (found,) = open_session(g.serialise("rounded")).run(None, {"x": values})
    rows, again = empty("int8", 2, 5, d), np.zeros((2, 2, 5, d), np.float32)
    heads = np.repeat(found.reshape(5, 2, d).transpose(1, 0, 2)[None], 2, axis=0)  # [2, heads, 5, D]
    write(heads, rows)
    read(rows, again)
    assert np.array_equal(again, heads)
    blocks = values.reshape(5, -1, block(d))
    assert (np.abs(found.reshape(blocks.shape) - blocks) <= 0.51 * np.abs(blocks).max(-1, keepdims=True) / 126).all()


# plain; norms of heads and windows; a cap on scores; heads normed when they are turned; a mixture; states beside it
@pytest.mark.parametrize("family", ["llama3", "gemma3", "gemma2", "hunyuan", "qwen3moe", "lfm2"])
def test_it_costs_little_and_all_paths_agree(tmp_path: Path, family: str) -> None:
    pack(GOLDENS[family].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    found: list[Floats] = []
    with opened(tmp_path / "m.flash", 0.5, "float32") as model:
        exact = all_logits(model, TEXT, 48)
        wide = model.cache.token_bytes
    for pinned in (0.5, None) if family != "qwen3moe" else (0.5,):
        with opened(tmp_path / "m.flash", pinned, "int8") as model:
            found += [all_logits(model, TEXT, chunk) for chunk in (48, 7, 1)]
            assert 3 * model.cache.token_bytes < wide
    # a router may choose other experts, which with random weights say something else
    assert 0 < relative(exact, found[0]) < (0.2 if family == "qwen3moe" else 0.02)
    assert all(relative(found[0], logits) < 3e-3 for logits in found)


def test_branches_snapshots_and_gaps(tmp_path: Path) -> None:
    """A tree of drafts gives what each branch gives alone, and rows that move or go to a file stay as they are."""
    pack(GOLDENS["llama3"].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle:
        made = plan(bundle, 0.5, 128, "float32")
        other = [made, dataclasses.replace(made, arithmetic="int8"), plan(bundle, None, 128, "int8")]
        origin = Origin.of(bundle, dataclasses.replace(made, kv="int8"))
        assert len({origin, *(Origin.of(bundle, each) for each in other)}) == 4
    with opened(tmp_path / "m.flash", 0.5, "int8") as model:
        expected = all_logits(model, [*TEXT[:20], 7, 8], 11)[-1]
        all_logits(model, TEXT[:20], 20)
        tree = Branches([np.arange(20)], [-1, 0, -1, 2])  # 5 6 and 7 8, side by side
        logits = model.forward(np.array([5, 6, 7, 8]), np.array([3]), branches=tree)
        assert relative(expected, logits[0]) < 1e-4
        model.cache.keep(np.array([*range(20), 22, 23]))
        follows = model.forward(np.array([9]), np.array([0]))
        model.cache.truncate(22)
        snapshot.save(tmp_path / "a.kv", origin, [*TEXT[:20], 7, 8], model.cache, None)
        kept = [part.copy() for part in model.cache.parts(0, 22)]
    with opened(tmp_path / "m.flash", None, "int8") as model:
        snapshot.restore(tmp_path / "a.kv", origin, [*TEXT[:20], 7, 8, 9], model.cache)
        assert all(np.array_equal(a, b) for a, b in zip(kept, model.cache.parts(0, 22), strict=True))
        assert relative(follows, model.forward(np.array([9]), np.array([0]))) < 1e-4


def test_the_plan_gives_what_it_frees_to_the_model(tiny_bundle: Path) -> None:
    with Bundle(tiny_bundle) as bundle:
        header, rows = bundle.header, 16384 + SPARE
        least = {kv: smallest(header, 16384, 0, kv) for kv in ("float32", "int8")}
        freed = least["float32"] - least["int8"]
        m = header.model
        assert freed == cache_bytes(m, rows) - cache_bytes(m, rows, "int8") - widened_bytes(m, rows, "int8", 1) > 0
