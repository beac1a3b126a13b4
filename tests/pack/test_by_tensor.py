"""What pack does without --rows: each matrix has the bits that keep what its tensors have in the model's file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle.errors import DamagedHeader
from flashd.bundle.header import Header
from flashd.bundle.prefix import digest
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.bundle.rows.kinds import RowKind
from flashd.engine.planning import parts, unpacked
from flashd.engine.planning.plan import make_plan, smallest
from flashd.pack.pack import pack
from tests.engine.test_paths import all_logits, opened, tokens_of
from tests.goldens.models import GOLDENS, TOKENS
from tests.pack import variants
from tests.pack.test_cases import PERPLEXITIES
from tests.pack.variants import TEXT
from tests.reference import Floats, kl, relative

FINER = {
    "layer.0.down", "layer.1.inputs", "layer.0.qkv", "layer.1.output",
}  # fmt: skip
"""Of the model with mixed types: what has a tensor of more bits than int4 rows keep."""


def header_of(path: Path) -> Header:
    with Bundle(path) as bundle:
        return bundle.header


def logits(path: Path, pinned: float | None, tokens: list[int], chunk: int = 16) -> Floats:
    with opened(path, pinned, 400, "float32") as model:
        return all_logits(model, tokens, chunk)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model of mixed types, packed with several --rows, or "" for none."""
    folder = tmp_path_factory.mktemp("mixed")
    model = variants.retyped(variants.BASE, folder / "m.gguf", variants.mixed)
    asked: dict[str, RowKind | None] = {"": None, "f16": "f16", "int4": "int4"}
    for name, rows in asked.items():
        pack(model, folder / f"{name}.flash", rows)
    return {name: folder / f"{name}.flash" for name in asked}


def test_each_matrix_has_the_bits_that_keep_it(mixed: dict[str, Path]) -> None:
    header = header_of(mixed[""])
    assert (header.formats.ffn, header.formats.attention, header.formats.head) == ("int4", "int4", "int8")
    assert set(header.formats.finer) == FINER and header.formats.words == "int4 and int8"
    assert [(header.group_of(i).row.kind, header.group_of(i).column.kind) for i in range(2)] == [
        ("int4", "int8"), ("int8", "int4"),
    ]  # fmt: skip
    tokens = tokens_of(mixed[""], TEXT.read_text())[:100]
    exact = logits(mixed["f16"], 0.0, tokens)
    kept, rounded = (kl(exact, logits(mixed[rows], 0.0, tokens)) for rows in ("", "int4"))
    assert kept < 1e-4 < 50 * kept < rounded
    lost = exact[:-1] - exact[:-1].max(1, keepdims=True)
    lost = np.log(np.exp(lost).sum(1)) - lost[np.arange(len(lost)), tokens[1:]]
    # llama.cpp rounds what goes into its products to 8 bits
    assert np.exp(lost.mean()) == pytest.approx(PERPLEXITIES["mixed"]["llama.cpp"], rel=5e-3)


def test_all_paths_multiply_them_alike(mixed: dict[str, Path]) -> None:
    tokens = tokens_of(mixed[""], TEXT.read_text())[:24]
    paged = logits(mixed[""], 0.0, tokens)
    assert relative(logits(mixed[""], 0.5, tokens, chunk=1), paged) == 0
    assert relative(logits(mixed[""], None, tokens), paged) < 2e-4
    with opened(mixed[""], None, 400, "int8") as model:
        assert kl(all_logits(model, tokens, 16), paged) < 1e-3


def test_the_plan_counts_each_layer_as_it_is(mixed: dict[str, Path]) -> None:
    header = header_of(mixed[""])
    model = msgspec.structs.replace(header.model, neurons=header.model.group_neurons << 12)  # else it fits in any RAM
    large, m = msgspec.structs.replace(header, model=model), model
    sizes = [unpacked.group_kept(large.group_of(i)) for i in range(2)]
    least = smallest(large, 40, 0)
    for room in (0, sizes[0], sum(sizes), 300 * sum(sizes)):
        made = make_plan(large, memory=least + room, context=40, threads=1, base=0)
        assert not made.resident and made.group_bytes == tuple(sizes)
        pinned = sum(n * size for n, size in zip(made.pinned, sizes, strict=True))
        assert made.parts["pinned neurons"] == pinned and bool(pinned) == bool(room)
        assert made.memory - sizes[0] - sizes[1] < made.total <= made.memory or room > 2 * sum(sizes)
        assert made.card_bytes == sum(large.group_of(i).nbytes * (m.groups - made.pinned[i]) for i in range(2))
    whole = make_plan(large, memory=1 << 40, context=40, threads=1, base=0, arithmetic="float32")
    held = [parts.group_held(large.group_of(i), "float32") for i in range(2)]
    layers = [parts.attention_held(large, "float32", range(i, i + 1)) + m.groups * held[i] for i in range(2)]
    head = parts.head_held(large, m.vocabulary, "float32")
    assert whole.parts["constant weights"] == sum(layers) + head


def test_experts_and_first_layers_without_them_go_by_tensor_too(tmp_path: Path) -> None:
    model = GOLDENS["lfm2moe"].write(tmp_path / "f16.gguf")

    def kind(name: str, shape: tuple[int, ...]) -> Kind | None:
        fits = len(shape) > 1 and shape[-1] % 32 == 0 and "conv.conv" not in name and "gate_inp" not in name
        return Kind.Q4_0 if fits and not name.startswith("blk.2.ffn_up") else None

    model = variants.retyped(model, tmp_path / "m.gguf", kind)
    by_tensor, exact = pack(model, tmp_path / "m.flash", None), pack(model, tmp_path / "e.flash", "f16")
    # rows of 40 and of 200 weights are no whole blocks, so down is float16 in the file
    downs = {f"layer.{i}.down" for i in (1, 2, 3)}
    assert set(by_tensor.formats.finer) == {"leading", "layer.2.inputs"} | downs
    assert by_tensor.leading_groups["layer.0.leading"].kind == "int8" and exact.formats.finer == ()
    tokens = TOKENS.tolist()
    for pinned in (0.0, 0.5):
        assert (
            relative(logits(tmp_path / "m.flash", pinned, tokens), logits(tmp_path / "e.flash", 0.0, tokens)) < 0.02
        )


@pytest.mark.parametrize(
    ("kind", "rows"), [(None, "int8"), (Kind.Q4_1, "int4"), (Kind.Q4_0, "int4"), (Kind.Q8_0, "int8")]
)
def test_a_file_of_one_type_has_one_kind_of_rows(tmp_path: Path, kind: Kind | None, rows: RowKind) -> None:
    def every(name: str, shape: tuple[int, ...]) -> Kind | None:
        return kind if len(shape) > 1 else None

    formats = pack(variants.retyped(variants.BASE, tmp_path / "m.gguf", every), tmp_path / "m.flash", None).formats
    assert (formats.ffn, formats.attention, formats.head, formats.finer) == (rows, rows, rows, ())


@pytest.mark.parametrize(
    ("finer", "match"),
    [
        (["layer.9.qkv"], "'layer.9.qkv' is not a matrix that may have finer rows"),
        (["head"], "'head' is not a matrix that may have finer rows"),
        (["layer.0.qkv", "layer.0.qkv"], "named twice"),
    ],
)
def test_a_header_that_names_another_matrix_is_refused(mixed: dict[str, Path], finer: list[str], match: str) -> None:
    said = msgspec.json.decode(msgspec.json.encode(header_of(mixed[""])))
    said["formats"]["finer"] = finer
    body = msgspec.json.encode(said)
    with pytest.raises(DamagedHeader, match=match):
        codec.decode_header(body, digest(body), mixed[""].stat().st_size)
