"""Tokenizers and configurations that are made to take all memory or time: one line, and little of either."""

from __future__ import annotations

import base64
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.bundle.tokenizer_json import check_numbers, checked_growth
from flashd.config import settings
from flashd.engine.decoding.schemas import Schemas
from flashd.engine.decoding.text import TextTokenizer
from flashd.errors import ConfigError, DataError, PromptTooLong
from flashd.pack.pack import pack
from tests import tiny, tiny_folder
from tests.fuzz.test_files import header_of, signed_again

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
APART = {"type": "NFKC"}, {"type": "Replace", "pattern": {"String": "\u0644"}, "content": "\ufdfa"}
"""One letter of U+FDFA's eighteen becomes U+FDFA again."""
ENDLESS = {"type": "Split", "pattern": {"Regex": "(a|a|aa|a)+$"}, "behavior": "Isolated", "invert": False}


def precompiled(charsmap: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Of this process; a child has a limit of its own as well."""
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + (400 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder.write(tmp_path / "folder", tiny.write(tmp_path / "m.gguf", "qwen2"))


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""
"""Runs a command in a small process. The peak of a child includes its parent's memory, and pytest's may be large."""


def asked(bundle: Path, prompt: str) -> tuple[int, list[str], int]:
    """What `flashd ask` ends with and says, and the MiB that it and its children took."""
    command = [sys.executable, "-m", "flashd", "ask", "--model", str(bundle), "--max-tokens", "2", prompt]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True,
        env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    code, mib = map(int, done.stdout.split())
    return code, done.stderr.splitlines(), mib


def with_tokenizer(whole: bytes, **values: Any) -> bytes:
    """A bundle whose tokenizer is another, every checksum right: whoever forges one can count too."""
    header, bent = msgspec.convert(header_of(whole), Header), bytearray(whole)
    section = next(s for s in header.sections if s.name == "tokenizer")
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    new = json.dumps({"version": "1.0", "added_tokens": [], "model": model, **values}).encode()
    bent[section.offset : section.end] = new.ljust(section.length)
    return signed_again(bent, header)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 27}}, "makes a text 128 times as long"),
        ({"pre_tokenizer": ENDLESS}, "the tokenizer fails on a text"),
        ({"normalizer": DOUBLE | {"content": "a" * 900}}, "makes a text 900 times as long"),
        ({"normalizer": DOUBLE | {"content": "\U00010000" * 20}}, "makes a text 80 times as long"),
        ({"normalizer": {"type": "Sequence", "normalizers": APART * 5}}, "makes a text 242 times as long"),
        ({"normalizer": precompiled(b"\0\0\0\0abc\0" + b"d" * 70 + b"\0")}, "makes a text 70 times as long"),
        ({"normalizer": precompiled(b"\1")}, "a tokenizer that is none (Precompiled: "),
        ({"normalizer": {"type": "Fivefold"}}, "'Fivefold' is not a step that is known"),
    ],
)
def test_a_bundle_s_tokenizer(tmp_path: Path, tiny_bundle: Path, values: dict[str, Any], words: str) -> None:
    path = tmp_path / "m.flash"
    path.write_bytes(with_tokenizer(tiny_bundle.read_bytes(), **values))
    code, said, mib = asked(path, "a" * 40 + "b")
    assert code == os.EX_DATAERR and len(said) == 1 and words in said[0], said
    assert mib < 400


def test_a_text_that_grows_is_counted_in_short_pieces() -> None:
    """As long as is allowed, of letters that are no tokens: nothing else would say that the text is too long."""
    model = {"type": "BPE", "vocab": {"b": 0}, "merges": []}
    data = json.dumps({"model": model, "normalizer": DOUBLE | {"content": "a" * 64}}).encode()
    made = TextTokenizer(data, None, False)
    made.check_length(["a" * 20_000], 10)
    with pytest.raises(PromptTooLong):
        made.check_length(["a" * 40_000], 10)


def test_a_bundle_s_tokenizer_that_pads_each_text(tmp_path: Path, tiny_bundle: Path) -> None:
    pad = {"strategy": {"Fixed": 1 << 28}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    path = tmp_path / "m.flash"
    path.write_bytes(
        with_tokenizer(tiny_bundle.read_bytes(), padding=pad | {"pad_type_id": 0, "pad_token": "a"}),
    )
    code, said, mib = asked(path, "ab")
    assert code == 0 and mib < 400, said


@pytest.mark.parametrize(("number", "words"), [(1 << 28, "a token has the number 268435456"), (0, "")])
def test_a_token_s_number_and_schemas(tmp_path: Path, tiny_bundle: Path, number: int, words: str) -> None:
    path = tmp_path / "m.flash"
    model = {"type": "BPE", "vocab": {"a": number, "b": 1}, "merges": []}
    path.write_bytes(with_tokenizer(tiny_bundle.read_bytes(), model=model))
    with Bundle(path) as bundle, pytest.raises(DataError, match=f"its tokenizer follows no schema .{words}"):
        Schemas(bundle)


def test_a_token_s_number_is_no_room_for_as_many(folder: Path, tmp_path: Path) -> None:
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["model"]["vocab"]["zz"] = 1 << 28
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    with pytest.raises(DataError, match="a token has the number 268435456"):
        pack(folder, tmp_path / "out.flash", "int4")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_attention_heads": 1 << 31, "head_dim": 64}, "2147483648 heads"),
        ({"head_dim": 1 << 34}, "heads of 17179869184 "),
        ({"intermediate_size": -(1 << 51)}, "an FFN of -2251799813685248 neurons makes no model"),
        ({"intermediate_size": 1 << 62}, "an FFN of 4611686018427387904 neurons makes no model"),
        ({"num_hidden_layers": 1 << 40}, "layers; 1 to 1024 are possible"),
        ({"rope_scaling": {"rope_type": "llama3"}, "head_dim": 1 << 33}, "numbers; 65536 at the most"),
        ({"sliding_window": 4, "max_window_layers": -(1 << 62)}, ""),
    ],
)
def test_a_folder_s_configuration(folder: Path, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    changed(folder / "config.json", **values)
    try:
        pack(folder, tmp_path / "out.flash", "int4")
    except DataError as error:
        assert words in str(error) and len(str(error).splitlines()) == 1
    else:
        assert not words


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["deep", "long"])
def test_a_folder_s_files(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    with (folder / name).open("wb") as file:
        file.write(b'{"a":' * 100_000) if kind == "deep" else file.truncate(1 << 40)
    with pytest.raises(DataError, match=name) as error:
        pack(folder, tmp_path / "out.flash", "int4")
    assert len(str(error.value).splitlines()) == 1


WITH_LITTLE = """
import sys
from pathlib import Path
from flashd.pack import pack as packing
from flashd.system.child import Limits

packing.READING = Limits(seconds=20, memory=8 << 20)
packing.pack(Path(sys.argv[1]), Path(sys.argv[2]), "int4")
"""
"""Packs in a small process. What pytest has freed but not given back may be enough to read much without a limit."""


def test_what_takes_too_much_all_the_same_is_ended(folder: Path, tmp_path: Path) -> None:
    """Nobody knows all bombs: reading what a model says of itself has a limit."""
    names = {f"token{i:060}": i for i in range(100_000)}
    changed(folder / "tokenizer_config.json", odd=names)
    command = [sys.executable, "-c", WITH_LITTLE, str(folder), str(tmp_path / "out.flash")]
    said = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()[-1]
    assert "DataError" in said
    assert "takes more than 20 s or 8 MiB to read" in said or "not a tokenizer that is read" in said


def test_a_configuration_of_many_keys_is_not_read_to_its_end() -> None:
    text = "".join(f"key{i}: 1\n" for i in range(90_000))
    with pytest.raises(ConfigError, match="line 5000: more than 10000 keys and values"):
        settings.parse(text)


def test_real_tokenizers_are_within_bounds(packed: dict[str, Path]) -> None:
    with Bundle(packed["int4"]) as bundle:
        data = bundle.read("tokenizer")
        assert checked_growth(data) <= 12
        check_numbers(data, bundle.header.model.vocabulary)
