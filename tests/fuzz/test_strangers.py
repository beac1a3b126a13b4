"""Tokenizers, templates and Hugging Face folders of any kind, each in a child with limits: a FlashdError in one line.

A case that takes more than its limits, or ends with another exception, fails.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.engine.decoding.text import ChatTemplate, Message
from flashd.engine.engine import Prompts
from flashd.errors import FlashdError
from flashd.pack.pack import _vocabulary
from flashd.system.child import Limits, in_child
from tests import tiny, tiny_folder
from tests.fuzz.conftest import one_line, tries
from tests.fuzz.test_files import NUMBERS, Whole, header_of, places, put, sign, signed_again

LIMITS = Limits(seconds=20, memory=400 << 20, says=True)
"""Of a case; a file of some hundred kilobytes has no business with more."""

STEP: st.SearchStrategy[Any] = st.sampled_from(
    [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "ab"},
        {"type": "Replace", "pattern": {"Regex": "(a|a|aa)+$"}, "content": ""},
        {"type": "Replace", "pattern": {}, "content": 7},
        {"type": "Prepend", "prepend": "a" * 9},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        {"type": "Split", "pattern": {"Regex": "(a|a|aa|a)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": True},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        {"type": "Replace", "pattern": {"String": "\u0644"}, "content": "\ufdfa"},
        {"type": "Precompiled", "precompiled_charsmap": "AQ=="},
        {"type": "NFKD"}, {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Sequence"}, {},
    ]
)  # fmt: skip
STEPS = st.lists(STEP, max_size=30).map(
    lambda steps: {"type": "Sequence", "normalizers": steps, "pretokenizers": steps}
)
ODD: st.SearchStrategy[Any] = (
    NUMBERS | st.none() | st.booleans() | st.floats() | st.text(max_size=9) | STEP | STEPS
    | st.sampled_from([[], {}, [[]], "\ud800", "a" * 5000, {"Fixed": 1 << 40}, ["a"] * 3, 1e308])
)  # fmt: skip


def tried(action: Callable[[], object], limits: Limits = LIMITS) -> None:
    """Fails unless the action ends in time, with little memory, and with a FlashdError if with any."""

    def inner() -> str | None:
        try:
            action()
        except FlashdError as error:
            one_line(error)
        return None

    in_child(inner, limits)


def bent(tree: Any, data: st.DataObject) -> Any:
    """A tree of JSON with other values in one to four places."""
    for _ in range(data.draw(st.integers(1, 4))):
        if isinstance(tree, dict | list) and (all_places := places(tree)):
            # those near the root matter, and most are deep in a vocabulary
            near = [place for place in all_places if len(place) < 3 or "vocab" not in place]
            put(
                tree,
                data.draw(st.sampled_from(near if data.draw(st.booleans()) else all_places)),
                deepcopy(data.draw(ODD)),
            )
    return tree


def text_of(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path) -> bytes:
    return Whole(tiny_bundle.read_bytes())


def cut_into_tokens(path: Path) -> None:
    with Bundle(path) as bundle:
        prompts = Prompts(bundle)
        prompts.tokens([Message("user", "the " + "a" * 40 + "b \u00e9\U0001f331\x00 <|end|>")], 400)
        prompts.choices(["yes", ""])


@tries(60)
@given(st.data())
def test_tokenizers(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Of a bundle, every checksum right."""
    header, new = msgspec.convert(header_of(whole), Header), bytearray(whole)
    section = next(s for s in header.sections if s.name == "tokenizer")
    text = text_of(bent(json.loads(whole[section.offset : section.end]), data))
    new[section.offset : section.end] = text[: section.length].ljust(section.length)
    path = tmp_path / "m.flash"
    path.write_bytes(signed_again(new, header))
    tried(lambda: cut_into_tokens(path))


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content | trim }}"
    "{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)
PIECES = st.text(max_size=6) | st.sampled_from(
    [
        "{{", "}}", "{%", "%}", "{% for i in range(10**9) %}", "{% endfor %}", "{{ 'a' * 10**9 }}",
        "{{ 9 ** 9 ** 9 }}", "{{ messages.__class__.__mro__ }}", "{{ ''.format.__globals__ }}",
        "{{ '%099999999d' % 1 }}", "{% include 'a' %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('x') }}", "{{ strftime_now('%Y' * 9) }}", "{{ messages | tojson(indent=10**9) }}",
        "{{ messages[9] }}", "{{ 1 / 0 }}", "{{ '\ud800' }}", "{% set a = a %}", "{{ [1] | map('upper') | list }}",
        "{{ namespace(a=1).a }}", "{% break %}", "{{ x.y.z }}", "(" * 300,
    ]
)  # fmt: skip


@tries(60)
@given(st.data())
def test_templates(data: st.DataObject) -> None:
    text = TEMPLATE
    for _ in range(data.draw(st.integers(1, 3))):
        at, gone = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        text = text[:at] + data.draw(PIECES) + text[at + gone :]
    # the template has a child of its own, whose limits these are not
    tried(lambda: ChatTemplate(text).render([Message("user", "hello")]), Limits(60, 400 << 20, says=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    return tiny_folder.write(root / "whole", tiny.write(root / "m.gguf"))


@tries(80)
@given(st.data())
def test_hugging_face_folders(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    name = data.draw(st.sampled_from(["config.json"] * 3 + ["tokenizer.json", "tokenizer_config.json", "weights"]))
    if name == "weights":
        path = copy / "model.safetensors"
        raw = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, 4000))
        new = data.draw(st.binary(min_size=1, max_size=8) | NUMBERS.map(lambda n: str(n).encode()))
        raw[at : at + len(new)] = new
        path.write_bytes(raw)
    else:
        path = copy / name
        path.write_bytes(text_of(bent(json.loads(path.read_text()), data)))
    tried(lambda: read(copy))


def read(path: Path) -> None:
    """What packing does with what a model says of itself."""
    _vocabulary(path, "int4", None, None)


@tries(40)
@given(st.data())
def test_weights_of_a_bundle(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Sections whose bytes are numbers, every checksum right: what is read of them may be nonsense, and no more."""
    header, new = msgspec.convert(header_of(whole), Header), bytearray(whole)
    numbers = [s for s in header.sections if not s.name.startswith(("graph", "token")) and s.length]
    section = data.draw(st.sampled_from(numbers))
    at = section.offset + data.draw(st.integers(0, section.length - 1))
    put_in = data.draw(st.binary(min_size=1, max_size=64) | st.just(b"\x00\x00\xc0\x7f" * 16))
    put_in = put_in[: section.end - at]
    new[at : at + len(put_in)] = put_in
    path = tmp_path / "m.flash"
    path.write_bytes(signed_again(new, header))

    def use() -> None:
        with Bundle(path) as bundle:
            bundle.verify()
            bundle.floats("vectors")
            bundle.rows("head", 8)
            for _ in bundle.groups(0, 2):
                continue

    tried(use)


def test_the_whole_is_read_as_it_is(whole: bytes, folder: Path, tmp_path: Path) -> None:
    """So that none of the above passes because nothing ever works."""
    path = tmp_path / "m.flash"
    path.write_bytes(sign(bytearray(whole), header_of(whole)))
    in_child(lambda: cut_into_tokens(path), LIMITS)
    in_child(lambda: read(folder), LIMITS)
    assert "hello" in ChatTemplate(TEMPLATE).render([Message("user", "hello")])
