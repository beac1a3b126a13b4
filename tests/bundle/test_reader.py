"""Hostile bundles: each rule of the format has a named error, and no damaged byte reaches an answer."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashd.bundle import file
from flashd.bundle.errors import (
    BadSection,
    DamagedHeader,
    DamagedRun,
    NewerVersion,
    NotABundle,
    OlderVersion,
    TruncatedBundle,
)
from flashd.bundle.file import CardFile, Patience
from flashd.bundle.prefix import PREFIX, VERSION, digest, next_page
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.errors import CardError, DataError, InputMissing


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_bundle, tmp_path / "copy.flash"))


def rewrite(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Changes the JSON header and signs it again: an attacker can compute a digest too."""
    data = path.read_bytes()
    length = PREFIX.unpack(data[: PREFIX.size])[2]
    header = msgspec.json.decode(data[PREFIX.size : PREFIX.size + length])
    change(header)
    body = msgspec.json.encode(header)
    prefix = PREFIX.pack(*PREFIX.unpack(data[: PREFIX.size])[:2], len(body), digest(body), len(data))
    path.write_bytes(prefix + body + data[PREFIX.size + len(body) :])


def _twice(header: Any) -> None:
    """An empty section in front of one that is called like it."""
    first = header["sections"][0]
    header["sections"].insert(0, {**first, "length": 0})


def _strange(header: Any) -> None:
    """An empty section of a name that the format does not know, behind the others."""
    last = header["sections"][-1]
    pages = -(-(last["offset"] + last["length"]) // 4096) * 4096
    first = last["first"] + -(-last["length"] // last["run"])
    header["sections"].append({"name": "graph.ffn", "offset": pages, "length": 0, "run": 1 << 20, "first": first})


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"none\.flash"):
        Bundle(tmp_path / "none.flash")


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100), b"\x93FLASHD"])
def test_another_kind_of_file_is_no_bundle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.flash").write_bytes(content)
    with pytest.raises(NotABundle):
        Bundle(tmp_path / "x.flash")


def test_versions(copy: Path) -> None:
    poke(copy, 8, struct.pack("<I", VERSION + 1))
    with pytest.raises(NewerVersion, match="update flashd"):
        Bundle(copy)
    poke(copy, 8, struct.pack("<I", 0))
    with pytest.raises(OlderVersion, match="pack it again"):
        Bundle(copy)


@pytest.mark.parametrize("cut", [1, 4096, 1 << 19])
def test_a_file_cut_short_is_seen_at_once(copy: Path, cut: int) -> None:
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size - cut)
    with pytest.raises(TruncatedBundle, match="copy the bundle again"):
        Bundle(copy)


def test_a_header_that_claims_to_be_huge(copy: Path) -> None:
    poke(copy, 12, struct.pack("<I", 0xFFFFFFFF))
    with pytest.raises(DamagedHeader):
        Bundle(copy)


@given(st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_of_the_header_is_found(tiny_bundle: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(tiny_bundle.read_bytes())
    length = PREFIX.unpack(raw[: PREFIX.size])[2]
    bit = data.draw(st.integers(0, 8 * (PREFIX.size + length) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    (tmp_path / "flipped.flash").write_bytes(raw)
    with pytest.raises(DataError):
        Bundle(tmp_path / "flipped.flash").close()


@given(st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_of_a_section_is_found(tiny_bundle: Path, tmp_path: Path, data: st.DataObject) -> None:
    with Bundle(tiny_bundle) as bundle:
        sections = [*bundle.header.sections, bundle.header.checksums]
    raw = bytearray(tiny_bundle.read_bytes())
    section = data.draw(st.sampled_from(sections))
    bit = data.draw(st.integers(8 * section.offset, 8 * section.end - 1))
    raw[bit // 8] ^= 1 << bit % 8
    (tmp_path / "flipped.flash").write_bytes(raw)
    with pytest.raises(DamagedRun, match=r"checksums|damaged at byte"), Bundle(tmp_path / "flipped.flash") as bundle:
        bundle.verify()


NARROWED = {
    "int3": [1, 1, 1], "int2": [2, 2, 2], "tokens": 9, "perplexity_exact": 5, "perplexity": 5.1, "divergence": 0.1,
}  # fmt: skip


SHARED = {"neurons": 33, "weighed": False}
DELTA_NET = {
    "kind": "gated_delta_net", "taps": 4, "key_heads": 2, "value_heads": 2, "key_dim": 16, "value_dim": 16,
}  # fmt: skip
EXPERTS = {"count": 7, "used": 8, "scores": "softmax", "normalised": True}


def _set(*path: str | int, to: object) -> Callable[[dict[str, object]], None]:
    def change(header: dict[str, object]) -> None:
        at: object = header
        for key in path[:-1]:
            at = at[key]  # type: ignore[index]
        at[path[-1]] = to  # type: ignore[index]

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_set("model", "hidden", to=-64), DamagedHeader),
        (_set("model", "hidden", to="64"), DamagedHeader),
        (_set("model", "hidden", to=65), DamagedHeader),
        (_set("model", "attention_scale", to=3.4028235677973366e38), DamagedHeader),
        (_set("model", "embedding_scale", to=1e300), DamagedHeader),
        (_set("model", "hidden", to=1 << 50), DamagedHeader),
        (_set("model", "layers", to=1000), DamagedHeader),
        (_set("model", "vocabulary", to=1 << 20), BadSection),
        (_set("model", "kv_heads", to=3), DamagedHeader),
        (_set("model", "group_neurons", to=0), DamagedHeader),
        (_set("model", "group_neurons", to=33), DamagedHeader),
        (_set("model", "group_neurons", to=128), DamagedHeader),
        (_set("model", "group_neurons", to=224), BadSection),
        (_set("model", "experts", to=EXPERTS), DamagedHeader),
        (_set("model", "experts", to=EXPERTS | {"count": 2, "used": 1}), DamagedHeader),
        (_set("model", "experts", to=EXPERTS | {"count": 1, "used": 1, "shared": SHARED}), DamagedHeader),
        (_set("model", "recurrent", to=[DELTA_NET | {"value_heads": 3}]), DamagedHeader),
        (_set("model", "recurrent", to=[DELTA_NET | {"value_dim": 8}]), DamagedHeader),
        (_set("model", "attention_scale", to=0), DamagedHeader),
        (_set("model", "layer_kinds", 0, to=1), DamagedHeader),
        (_set("model", "attention", 0, "rope", to=1), DamagedHeader),
        (_set("model", "norms", to=["attention", "hat"]), DamagedHeader),
        (_set("model", "norms", to=["attention", "ffn", "ffn_branch", "final"]), BadSection),
        (_set("model", "biases", to=["inputs"]), BadSection),
        (_set("model", "positions", to=7), BadSection),
        (_set("formats", "ffn", to="int2"), DamagedHeader),
        (_set("formats", "ffn", to="int8"), BadSection),
        (_set("narrowed", to=NARROWED | {"int3": [1, 1]}), DamagedHeader),
        (_set("narrowed", to=NARROWED | {"int3": [5, 1, 1], "int2": [4, 2, 2]}), DamagedHeader),
        (_set("narrowed", to=NARROWED | {"int2": [2, 2, 1000]}), DamagedHeader),
        (_set("narrowed", to=NARROWED), BadSection),
        (_set("sections", 0, "offset", to=1 << 40), BadSection),
        (_set("sections", 0, "offset", to=4097), BadSection),
        (_set("sections", 0, "length", to=1 << 40), BadSection),
        (_set("sections", 0, "first", to=7), BadSection),
        (_set("sections", 0, "run", to=0), DamagedHeader),
        (_set("sections", 1, "offset", to=0), BadSection),
        (_set("sections", to=[]), BadSection),
        (_twice, BadSection),
        (_set("checksums", "length", to=8), BadSection),
        (_set("text", to=None), DamagedHeader),
        (_set("text", "eos", to=[1 << 40]), DamagedHeader),
        (_set("text", "bos", to=262), DamagedHeader),
    ],
)
def test_a_forged_header_is_refused_by_rule(
    copy: Path, change: Callable[[dict[str, object]], None], error: type[DataError]
) -> None:
    rewrite(copy, change)
    with pytest.raises(error):
        Bundle(copy)


def test_a_section_that_the_format_does_not_know_is_refused_by_name(copy: Path) -> None:
    rewrite(copy, _strange)
    with pytest.raises(BadSection, match=r"section 'graph\.ffn' is not known"):
        Bundle(copy)


def test_a_group_that_does_not_share_out_a_layer_is_refused_in_words(copy: Path) -> None:
    rewrite(copy, _set("model", "group_neurons", to=128))
    with pytest.raises(DamagedHeader, match="224 neurons do not make whole groups of 128"):
        Bundle(copy)


def test_an_expert_is_whole_groups(copy: Path) -> None:
    rewrite(copy, _set("model", "experts", to=EXPERTS | {"count": 2, "used": 1}))
    with pytest.raises(DamagedHeader, match="224 neurons do not share out to 2 experts in groups"):
        Bundle(copy)


@pytest.mark.parametrize("name", ["tokenizer", "layer.1.vectors"])
def test_runs_are_as_long_as_the_format_says(copy: Path, name: str) -> None:
    """With a checksum for each byte, all of them right, a small file would take hours to verify."""
    data = copy.read_bytes()
    with Bundle(copy) as bundle:
        header = bundle.header
    sections, table = [], b""
    for section in header.sections:
        run = 1 if section.name == name else section.run
        sections.append(msgspec.structs.replace(section, run=run, first=len(table) // 8))
        starts = range(section.offset, section.end, run)
        table += b"".join(digest(data[i : min(i + run, section.end)]).to_bytes(8, "little") for i in starts)
    end = next_page(len(data))
    checksums = msgspec.structs.replace(header.checksums, offset=end, length=len(table), first=len(table) // 8)
    sealed = f"{digest(table):016x}"
    forged = msgspec.structs.replace(header, sections=sections, checksums=checksums, checksums_digest=sealed)
    prefix = codec.encode(forged, end + len(table))
    copy.write_bytes(prefix + data[len(prefix) :] + bytes(end - len(data)) + table)
    with pytest.raises(BadSection, match=f"'{name}' has runs of 1 bytes, not 1048576"):
        Bundle(copy)


def test_a_file_that_shrinks_while_open_is_a_card_error(copy: Path) -> None:
    with Bundle(copy) as bundle:
        with copy.open("r+b") as file:
            file.truncate(bundle.section("head").offset + 10)
        with pytest.raises(CardError, match="was it replaced"):
            bundle.rows("head")


def test_a_damaged_embedding_row_is_found_before_it_is_used(copy: Path) -> None:
    with Bundle(copy) as bundle:
        section, form = bundle.section("head"), bundle.header.row_format("head")
    poke(copy, section.offset + 37 * form.nbytes + 5, b"\xaa\x55\xaa\x55")
    with Bundle(copy) as bundle:
        assert bundle.table_rows("head", np.array([31, 48])).shape == (2, 64)
        with pytest.raises(DamagedRun, match=r"'head' is damaged.*run 2"):
            bundle.table_rows("head", np.array([37]))


@pytest.mark.parametrize(("kernel", "expected"), [(4096, (20480, 24576)), (16384, (16384, 32768))])
def test_what_is_forgotten_is_whole_pages_of_the_kernel(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, kernel: int, expected: tuple[int, int]
) -> None:
    forgotten = list[tuple[int, int]]()

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            forgotten.append((offset, offset + length))

    monkeypatch.setattr(file, "KERNEL_PAGE", kernel)
    opened = CardFile(tiny_bundle, Patience())
    try:
        monkeypatch.setattr(os, "posix_fadvise", advise)
        opened.forget(20480, 4096)
        opened.forget(20490, 1)
        opened.forget(expected[0], expected[1] - expected[0])
    finally:
        opened.close()
    # the kernel keeps a page of which only a part is named
    assert forgotten == [expected] * 3
