"""Model files that cannot be packed: each is refused in one line, and nothing is left behind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import RowKind
from flashd.errors import DataError, InputMissing
from flashd.pack.families.properties import model_of
from flashd.pack.families.registry import family_of
from flashd.pack.pack import pack
from flashd.pack.sources.gguf import GgufModel, GgufTensor
from tests import tiny
from tests.goldens.models import GOLDENS
from tests.pack.test_tokenizer import Changed


def refused(tmp_path: Path, source: Path, match: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error, match=match) as caught:
        pack(source, tmp_path / "out.flash", "int4")
    assert "\n" not in str(caught.value)
    assert not [p for p in os.listdir(tmp_path) if "out.flash" in p]  # noqa: PTH208


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.2, 0.5, 0.999])
def test_a_file_cut_anywhere(tmp_path: Path, share: float) -> None:
    whole = tiny.write(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    refused(tmp_path, tmp_path / "cut.gguf", "download it again")


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 1000)
    refused(tmp_path, tmp_path / "x.gguf", "not a whole GGUF file")


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "none.gguf", "no such file", InputMissing)


def test_an_unknown_architecture_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "m.gguf", "mamba")
    refused(tmp_path, source, r"architecture 'mamba' is not supported; known are .*llama, .*qwen2")


def test_a_tensor_that_has_no_place_is_named(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "m.gguf")
    source.write_bytes(source.read_bytes().replace(b"blk.1.ffn_norm.weight", b"blk.1.ffn_rome.weight"))
    refused(tmp_path, source, r"tensor 'blk\.1\.ffn_rome\.weight' has no place in 'llama'")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_grids_are_those_of_the_file(tmp_path: Path, kind: Kind) -> None:
    tensor = GgufModel(tiny.write(tmp_path / "m.gguf", kind=kind)).tensor("blk.0.ffn_gate.weight")
    grid = tensor.grid()
    assert grid is not None
    scale, centre = (part[:, :, None] for part in grid)
    levels = (tensor.rows().reshape(*grid[0].shape, 32) - centre) / np.where(scale == 0, 1, scale)
    assert np.abs(levels - np.rint(levels)).max() < 2e-2
    most = 128 if kind == Kind.Q8_0 else 8
    assert np.rint(levels).min() >= -most and np.rint(levels).max() <= most - 1


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.F16])
def test_a_matrix_of_a_stack_is_read_as_it_is_alone(tmp_path: Path, kind: Kind) -> None:
    values = np.random.default_rng(0).standard_normal((3, 8, 64)).astype(np.float32)
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_tensor("stack", gguf.quantize(values.reshape(24, 64), kind).reshape(3, 8, -1), raw_dtype=kind)
    for i, matrix in enumerate(values):
        w.add_tensor(f"alone.{i}", gguf.quantize(matrix, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    model = GgufModel(tmp_path / "m.gguf")
    for i in range(3):
        one, alone = model.tensor("stack").matrix(i), model.tensor(f"alone.{i}")
        assert one.shape == alone.shape == (8, 64) and one.bits == alone.bits
        for which in (slice(None), np.array([6, 1])):
            assert np.array_equal(one.rows(which), alone.rows(which))
            grids = one.grid(which), alone.grid(which)
            assert (grids[0] is None) == (grids[1] is None) == (kind == Kind.F16)
            for a, b in zip(grids[0] or (), grids[1] or (), strict=True):
                assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"expert_used_count": 7}, "a token uses 7 experts of 6, which makes no model"),
        ({"expert_used_count": 0}, "a token uses 0 experts of 6, which makes no model"),
        (
            {"expert_gating_func": 9},
            r"scores of kind 9 .*expert_gating_func.* known are 1 \(softmax\), 2 \(sigmoid\)",
        ),
        ({"expert_count": 5}, r"ffn_gate_inp.weight' has the shape \(6, 64\), but the model needs \(5, 64\)"),
        ({"expert_count": 7}, r"ffn_gate_inp.weight' has the shape \(6, 64\), but the model needs \(7, 64\)"),
        ({"expert_count": 0}, "has no place in 'qwen3moe'"),
        ({"expert_feed_forward_length": 70}, "has 40 neurons, but the model needs 96"),
        ({"expert_shared_count": 1}, "an expert that every token uses .* is not supported for 'qwen3moe' yet"),
        ({"attention.clamp_kqv": 8.0}, "a bound on queries, keys and values"),
    ],
)
def test_a_mixture_whose_numbers_do_not_fit(tmp_path: Path, keys: dict[str, Any], match: str) -> None:
    golden = GOLDENS["qwen3moe"]
    refused(tmp_path, replace(golden, keys=golden.keys | keys).write(tmp_path / "m.gguf"), match)


def test_a_mixture_of_a_family_that_has_none(tmp_path: Path) -> None:
    golden = GOLDENS["qwen3"]
    source = replace(golden, keys=golden.keys | {"expert_count": 6}).write(tmp_path / "m.gguf")
    refused(tmp_path, source, "a mixture of experts is not supported for 'qwen3' yet")


def test_q4_k_grids_match_the_package_s_own_dequantisation() -> None:
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (3, 2 * 144), dtype=np.uint8)
    for block in (0, 144):  # sane float16 steps
        raw[:, block : block + 4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    reader = gguf.ReaderTensor("t", Kind.Q4_K, np.array([512, 3]), 1536, 864, 0, raw, None)  # type: ignore[arg-type]
    tensor = GgufTensor(reader)
    grid = tensor.grid()
    assert grid is not None
    live = grid[0] > 0
    levels = (tensor.rows().reshape(3, 16, 32) - grid[1][:, :, None]) / np.where(live, grid[0], 1)[:, :, None]
    assert np.abs(levels - np.rint(levels))[live].max() < 1e-2
    assert levels[live].min() >= -8.01 and levels[live].max() <= 7.01


def test_the_source_is_named_and_digested(tiny_bundle: Path) -> None:
    import hashlib

    with Bundle(tiny_bundle) as bundle:
        source = bundle.header.source
    file = tiny_bundle.with_name(source.name)
    assert source.nbytes == file.stat().st_size
    assert source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_type_of_another_program_s_is_told_from_damage(tmp_path: Path) -> None:
    data = bytearray(tiny.write(tmp_path / "m.gguf").read_bytes())
    # behind the name: how many axes, the axes, the type
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[at : at + 4] = (36).to_bytes(4, "little")  # bitnet.cpp's I2_S
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(DataError, match=r"a type that is not read .*36.* is not"):
        GgufModel(tmp_path / "m.gguf")


@pytest.mark.parametrize(("kind", "rows", "warned"), [
    (Kind.Q5_0, "int4", True), (Kind.Q8_0, "int4", True), (Kind.Q5_0, "int8", False), (Kind.Q4_1, "int4", False),
    (Kind.BF16, "int4", False),
])  # fmt: skip
def test_who_packs_five_bits_into_four_is_told_what_keeps_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Kind, rows: RowKind, warned: bool
) -> None:
    pack(tiny.write(tmp_path / "m.gguf", kind=kind), tmp_path / "m.flash", rows)
    what = "most weights are of types that int4 rows round; --rows int8 keeps them"
    said = f"{tmp_path}/m.gguf: {what}"
    assert [r.getMessage() for r in caplog.records] == [said] * warned


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.key_length", 1 << 30), ("attention.key_length", 0), ("rope.dimension_count", 64),
        ("rope.dimension_count", 0), ("block_count", float("nan")), ("embedding_length", float("inf")),
    ],
)  # fmt: skip
def test_a_number_that_makes_no_model(tmp_path: Path, key: str, value: float) -> None:
    source = Changed(tiny.write(tmp_path / "m.gguf"), {f"llama.{key}": value})
    with pytest.raises(DataError):
        model_of(source, family_of(source))
