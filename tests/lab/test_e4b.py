"""The random E4B: its folder and its file are of one shape, and a token's row is all that is read of its tables."""

from __future__ import annotations

from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle.reader import Bundle
from flashd.pack.original import Original
from flashd.pack.pack import pack
from tests.engine.test_paths import opened
from tests.lab import e4b, mixture

SMALL = e4b.Shape(
    layers=6, vocabulary=4096, hidden=256, heads=4, head_dim=32, wide=64, every=3, window=16, neurons=512, said=64,
    borrowing=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return e4b.write_folder(tmp_path_factory.mktemp("e4b") / "folder", SMALL)


def test_the_folder_and_the_file_are_of_one_shape(folder: Path, tmp_path: Path) -> None:
    first = Original.open(folder, "int4")
    second = Original.open(e4b.write_gguf(tmp_path / "m.gguf", SMALL), "int4")
    model = second.model  # a GGUF file has its numbers in float32
    assert msgspec.structs.replace(first.model, name=model.name, norm_epsilon=model.norm_epsilon) == model
    assert first.source.names == second.source.names
    assert first.model.token_width == 6 * 64 and [first.model.lender(i) for i in range(6)] == [0, 1, 2, 1, 1, 2]
    for name in first.source.names:
        a, b = (original.source.tensor(name) for original in (first, second))
        assert a.shape == b.shape
        if len(a.shape) == 2:
            assert a.rows(slice(64)).std() == pytest.approx(b.rows(slice(64)).std(), rel=0.05)


def test_tokens_differ_and_each_reads_a_run(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle:
        assert (bundle.header.formats.head, bundle.header.formats.token_inputs) == ("int8", "int4")
        run = bundle.section("token_inputs").run  # the embeddings are rows of the head in RAM
    token, said = 7, []
    with opened(tmp_path / "m.flash", 0.5, 128) as model:
        for _ in range(16):
            (logits,) = model.forward(np.array([token]), np.array([0]))
            assert np.isfinite(logits).all() and logits.std() > 0.5
            token = int(logits.argmax())
            said.append(token)
        assert len(set(said)) > 8
        assert model.card.table_bytes == len({7, *said[:-1]}) * run


def test_blocks_of_six_bits_lengthen_as_they_should() -> None:
    weights = gguf.dequantize(mixture.blocks(np.random.default_rng(0), (256, 256), Kind.Q6_K, 2.0), Kind.Q6_K)
    assert weights.std() == pytest.approx(2 / 16, rel=0.05) and abs(weights.mean()) < 0.02 / 8
