"""Models of the families that were added last, split files and templates, bent by hypothesis: a line, never a trace.

Keys, shapes and types of tensors are changed one by one, so that a case gets past the file's format to the code that
reads its family. What is taken is packed to the end.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.errors import FlashdError
from flashd.pack.pack import pack
from flashd.system.child import Limits
from tests import tiny
from tests.fuzz.conftest import TRIES, tries
from tests.fuzz.test_files import NUMBERS
from tests.fuzz.test_strangers import PIECES, TEMPLATE, bent, text_of, tried
from tests.goldens import folders
from tests.goldens.models import GOLDENS, HERE
from tests.pack import variants

pytestmark = pytest.mark.slow

LIMITS = Limits(seconds=60, memory=600 << 20, says=True)

NAMES = [name for name in GOLDENS if (HERE / f"{name}.json").is_file()]
LAST = ["qwen35", "qwen35moe", "qwen3next", "gpt-oss", "lfm2moe", "ernie4_5-moe", "gemma4", "glm4-flash"]
"""Those that are read by code of their own; a night of fuzzing takes all."""

SOME = st.sampled_from(NAMES if TRIES else LAST)

VALUES: st.SearchStrategy[Any] = (
    NUMBERS.filter(lambda n: 0 <= n < 1 << 32) | st.floats(width=32) | st.booleans() | st.text(max_size=9)
    | st.sampled_from(["none", "linear", "yarn", "longrope", "spiral", "gelu", "silu", 0.0, float("nan"), 1e38, None])
    | st.lists(st.integers(0, 1 << 20), min_size=1, max_size=6) | st.lists(st.booleans(), min_size=1, max_size=6)
    | st.lists(st.floats(width=32), min_size=1, max_size=4)
)  # fmt: skip
"""Of a GGUF's keys; None: the key is left out."""

NEW_KEYS = [
    "rope.scaling.type", "rope.scaling.factor", "rope.dimension_sections", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.temperature_scale", "expert_group_count",
    "expert_group_used_count", "leading_dense_block_count", "nextn_predict_layers", "attention.shared_kv_layers",
    "full_attention_interval", "expert_shared_feed_forward_length", "rope.scaling.original_context_length",
    "ssm.group_count", "unknown",
]  # fmt: skip
"""That a file may have beside its own, below its architecture's name."""

Tensors = dict[str, tuple[Any, gguf.GGMLQuantizationType]]


@cache
def fields_of(path: Path) -> tuple[dict[str, tuple[Any, ...]], Tensors]:
    """A file's keys with their values and types, and its tensors with theirs."""
    reader = gguf.GGUFReader(path)
    fields = {
        field.name: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.")
    }
    return fields, {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}


def write(path: Path, fields: dict[str, tuple[Any, ...]], changes: dict[str, Any], tensors: Tensors) -> None:
    w = gguf.GGUFWriter(path, str(fields["general.architecture"][0]))
    for name, field in fields.items():
        if name not in changes and name != "general.architecture":
            w.add_key_value(name, *field)
    for name, value in changes.items():
        tiny.add_key(w, name, value)
    for name, (values, kind) in tensors.items():
        w.add_tensor(name, values, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@st.composite
def other_tensors(draw: st.DrawFn, tensors: Tensors) -> Tensors:
    """Some tensors left out, cut, turned, of another type, not finite, or under another's name."""
    out = dict(tensors)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(out)))
        values, kind = out.pop(name)
        match draw(st.sampled_from(["none", "cut", "turned", "flat", "name", "nan", "type"])):
            case "cut":
                out[name] = values[: draw(st.integers(1, max(1, len(values) - 1)))], kind
            case "turned" if kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32):
                out[name] = np.ascontiguousarray(values.T), kind
            case "flat":
                out[name] = values.reshape(-1, *values.shape[2:]) if values.ndim > 1 else values[None], kind
            case "name":
                names = ["x.weight", "blk.9.ffn_up.weight", f"{name}.bias", "rope_freqs.weight"]
                out[draw(st.sampled_from(names))] = values, kind
            case "nan" if kind == gguf.GGMLQuantizationType.F32:
                out[name] = np.full_like(values, np.nan), kind
            case "type" if values.ndim > 1 and kind == gguf.GGMLQuantizationType.F16 and not values.shape[-1] % 32:
                other = draw(st.sampled_from([gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0]))
                out[name] = gguf.quantize(values.astype(np.float32), other), other
    return out


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("goldens")


def file_of(goldens: Path, name: str) -> Path:
    path = goldens / f"{name}.gguf"
    return path if path.exists() else GOLDENS[name].write(path)


def folder_of(goldens: Path, name: str) -> Path:
    path = goldens / name
    return path if path.exists() else folders.write(path, name, file_of(goldens, name))


@tries(10)
@given(SOME, st.data())
def test_files_of_the_last_families(goldens: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    fields, tensors = fields_of(file_of(goldens, name))
    before = f"{fields['general.architecture'][0]}."
    own = [key for key in fields if key.startswith(before)]
    keys = st.sampled_from(own) | st.sampled_from([f"{before}{key}" for key in NEW_KEYS])
    changes = data.draw(st.dictionaries(keys, VALUES, max_size=2))
    path = tmp_path / "m.gguf"
    write(path, fields, changes, data.draw(other_tensors(tensors)))
    tried(lambda: pack(path, tmp_path / "m.flash", None), LIMITS)


@tries(10)
@given(SOME, st.data())
def test_folders_of_the_last_families(goldens: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder_of(goldens, name), copy)
    config = bent(json.loads((copy / "config.json").read_text()), data)
    (copy / "config.json").write_bytes(text_of(config))
    tried(lambda: pack(copy, tmp_path / "m.flash", None), LIMITS)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    return variants.write(folder / "m.gguf", {}, parts=3).parent


@tries(10)
@given(st.data())
def test_split_files(split: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Parts overwritten, cut, exchanged, missing, or of another set."""
    parts = {path.name: bytearray(path.read_bytes()) for path in sorted(split.iterdir())}
    names = sorted(parts)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(names))
        match data.draw(st.sampled_from(["count", "bytes", "cut", "exchange", "missing", "empty"])):
            case "count":  # split.no, split.count and split.tensors.count are small numbers behind their names
                key = data.draw(st.sampled_from([b"split.no", b"split.count", b"split.tensors.count"]))
                at = parts[name].find(key)
                if at >= 0:
                    new = data.draw(NUMBERS.map(lambda n: (n % (1 << 32)).to_bytes(4, "little")))
                    parts[name][at + len(key) + 4 : at + len(key) + 4 + len(new)] = new
            case "bytes":
                at = data.draw(st.integers(0, min(4000, max(0, len(parts[name]) - 1))))
                new = data.draw(st.binary(min_size=1, max_size=8))
                parts[name][at : at + len(new)] = new
            case "cut":
                del parts[name][data.draw(st.integers(0, len(parts[name]))) :]
            case "exchange":
                other = data.draw(st.sampled_from(names))
                parts[name], parts[other] = parts[other], parts[name]
            case "missing":
                parts[name] = bytearray()
            case "empty":
                parts[name] = bytearray(b"GGUF")
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name, raw in parts.items():
        if raw:
            (copy / name).write_bytes(raw)
    tried(lambda: pack(copy / names[0], tmp_path / "m.flash", "f16"), LIMITS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variants.write_folder(tmp_path_factory.mktemp("plain") / "whole", {})


@tries(10)
@given(st.data())
def test_templates_wherever_a_folder_keeps_them(plain: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(plain, copy)
    texts = st.just(TEMPLATE) | PIECES | PIECES.map(lambda piece: TEMPLATE + piece)
    names = st.sampled_from(["default", "tool_use", "", 3])
    named = st.fixed_dictionaries({"name": names, "template": texts | st.none()})
    kept: st.SearchStrategy[Any] = texts | st.lists(named, max_size=3) | st.none() | st.integers()
    stated = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_bytes(text_of({**stated, "chat_template": data.draw(kept)}))
    (copy / "additional_chat_templates").mkdir()
    for name in data.draw(
        st.lists(st.sampled_from(["chat_template.json", "chat_template.jinja", "more"]), max_size=3)
    ):
        text = data.draw(texts).encode("utf-8", "surrogatepass")
        match name:
            case "chat_template.json":
                (copy / name).write_bytes(
                    text_of({"chat_template": data.draw(kept)}) if data.draw(st.booleans()) else text
                )
            case "chat_template.jinja":
                (copy / name).write_bytes(text)
            case _:
                (
                    copy / "additional_chat_templates" / data.draw(st.sampled_from(["default.jinja", "x.jinja"]))
                ).write_bytes(text)
    tried(lambda: pack(copy, tmp_path / "m.flash", "f16"), Limits(90, 600 << 20, says=True))


def test_the_wholes_are_packed_as_they_are(goldens: Path, split: Path, tmp_path: Path) -> None:
    """So that none of the above passes because nothing ever works."""
    name = LAST[0]
    fields, tensors = fields_of(file_of(goldens, name))
    write(tmp_path / "m.gguf", fields, {}, tensors)
    for path in (tmp_path / "m.gguf", folder_of(goldens, name), sorted(split.iterdir())[0]):
        pack(path, tmp_path / "m.flash", None)
    with pytest.raises(FlashdError):
        pack(sorted(split.iterdir())[1], tmp_path / "m.flash", None)
