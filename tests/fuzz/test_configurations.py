"""Configurations and updates' manifests of any kind: refused in one line, or of use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from device.appliance import _request, check
from device.needed_devices import needed_devices
from device.tools.toolbox import calling
from flashd.config.settings import LONGEST, Settings, load, parse, pins
from flashd.errors import ConfigError, DataError, FlashdError
from flashd.update.folder import Folder
from flashd.update.manifest import MANIFEST, Manifest, manifest_bytes, parse_manifest
from tests.fuzz.conftest import one_line, tries

pytestmark = pytest.mark.slow

EXAMPLE = (Path(__file__).parents[2] / "deploy" / "flashd.example.yaml").read_text("utf-8")
PLAIN = re.sub(r"^#.*\n| +#.*", "", EXAMPLE, flags=re.MULTILINE)
PARTS = [part for part in re.split(r"^(?=[a-z])", PLAIN, flags=re.MULTILINE) if part.strip()]
"""The example's keys with their values, each as text. A list is one part: see `few`."""

WORDS = st.sampled_from(sorted(set(re.findall(r"[\w.-]+", EXAMPLE))))
ODD = st.sampled_from(
    [
        "{{", "}}", "{%", "&a ", "*a", "<<: ", "? ", "!!python/name:os.system ", "!!bool ", "!!int ", "!!timestamp ",
        "!!omap ", "! ", "\n", "\t", "- ", ": ", "--- ", "...", "[", "]", "{", "}", "'", '"', "|\n", ">-\n", "=",
        ".nan", "-.inf", "1e999", "9" * 5000, "0x", "0b_", "1:60", "2001-99-99", "2001-01-01", "yes", "~", "null",
        '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', '"a\\nb"', "\x85", "\u2028", "\ufeff", "\U0001f331", "%YAML 9.9",
        "{{ 9 ** 9 }}", "{{ sensors['a'] }}", "{% include 'a' %}",
    ]
)  # fmt: skip
NEW = st.text(max_size=8) | ODD | WORDS


def configured(text: str) -> Settings | None:
    """What the daemon, `flashd allow` and a trigger do with a configuration; None where it is refused."""
    try:
        settings = parse(text, check=check)
    except ConfigError as error:
        one_line(error)
        assert str(error).startswith("flashd.yaml, line ")
        return None
    needed_devices(settings), pins(settings)
    for trigger in settings.triggers:
        msgspec.json.encode(_request(trigger, trigger.prompt, calling(settings.tools, trigger.tools)))
    msgspec.json.encode(settings)
    return settings


def few(part: str, data: st.DataObject) -> str:
    """A list with some of its entries: each trigger's template is tried in a process of its own."""
    head, *entries = re.split(r"^(?=  - )", part, flags=re.MULTILINE)
    kept = data.draw(st.lists(st.sampled_from(entries), max_size=2, unique=True)) if entries else []
    return head + "".join(kept) if kept or not entries else ""


def bent(text: str, data: st.DataObject) -> str:
    for _ in range(data.draw(st.integers(0, 3))):
        at, gone = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 20))
        text = text[:at] + data.draw(NEW) + text[at + gone :]
    return text


@tries(150)
@given(st.data())
def test_the_example_bent(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(PARTS), max_size=5, unique=True))
    configured(bent("".join(few(part, data) for part in parts), data))


KEYS = st.sampled_from(sorted(set(re.findall(r"\b([a-z_0-9]+):", EXAMPLE))))
LEAVES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | WORDS | st.text(max_size=10)
    | st.binary(max_size=3)
)  # fmt: skip
TREES = st.dictionaries(
    st.sampled_from(sorted(Settings.__struct_fields__)),
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | LEAVES, inner, max_size=6),
        max_leaves=12,
    ),
    max_size=4,
)


@tries(150)
@given(TREES, st.booleans())
def test_anything_in_a_yaml_file(tree: Any, flow: bool) -> None:
    configured(yaml.dump(tree, allow_unicode=flow, default_flow_style=flow))


@tries(150)
@given(st.text(st.characters(codec=None), max_size=60) | st.lists(NEW, max_size=30).map("".join))
def test_any_text(text: str) -> None:
    configured(text)


def read_manifest(folder: Path) -> Manifest:
    """The manifest, of a stick whose signature was right."""
    with Folder.at(folder) as stick:
        return parse_manifest(stick, manifest_bytes(stick))


UPDATE = f"needs: '0.1'\nbundle: {{file: new.flash, sha256: '{'0' * 64}'}}\nconfiguration: {{file: a, sha256: x}}\n"


@tries(150)
@given(st.data())
def test_manifests(tmp_path: Path, data: st.DataObject) -> None:
    text = bent(UPDATE, data).encode("utf-8", "surrogatepass") + data.draw(st.binary(max_size=3))
    (tmp_path / MANIFEST).write_bytes(text)
    try:
        read_manifest(tmp_path)
    except FlashdError as error:
        one_line(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\na: !!bool maybe", "line 2: tags are not allowed"),
        ("a: !!int ''", "line 1: tags are not allowed"),
        ("a: !!timestamp x", "line 1: tags are not allowed"),
        ("? [a]\n: b", "line 1: a key is a word"),
        ('model: "a\\0b"', "line 1: a character that no text has"),
        ('memory: 1G\nmodel: "\\ud800"', "line 2: a character that no text has"),
        ('\n\nmodel: "\\UFFFFFFFF"', "line 3: an escape that is no character"),
        ("\nmodel: 2001-99-99", "line 2: month must be in 1..12"),
        ("\ncontext: " + "9" * 5000, "line 2: Exceeds the limit"),
        ("model: " + "[" * 5000, "line 1: lists and mappings are too deep"),
        ("0\r:", "line 2: "),
        ("0\r\r0:", "line 3: "),
        ('"a\\nb": 1', "line 1: 'a\\nb' is not known"),
        ('sensors: [{kind: light, pin: 1, name: "a\\n"}]', "line 1: sensor 'a\\n', name: expected a name"),
    ],
)
def test_found_by_the_fuzzer(text: str, words: str) -> None:
    """Each of these once was another exception than ConfigError, had no line or more than one, or was taken."""
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert words in str(error.value)
    one_line(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("needs: !!bool maybe", "line 1: tags are not allowed"),
        (f"needs: '{'9' * 5000}'", "line 1: needs: expected a version"),
        ("needs: '0.1'\nneeds: '99'", "line 2: needs is given twice"),
        ("a: &a [1]\nb: *a", "line 2: aliases are not allowed"),
    ],
)
def test_found_in_manifests(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=words):
        read_manifest(tmp_path)


def test_a_file_that_is_no_configuration_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "flashd.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=f"more than {LONGEST} bytes"):
        load(tmp_path / "flashd.yaml")


def test_a_part_of_the_example_is_taken() -> None:
    """So that none of the above passes because nothing ever works."""
    for part in PARTS:
        assert configured(part if "sensors" not in part else PLAIN) is not None, part
