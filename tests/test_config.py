"""flashd.yaml: an error names the line, the key and what is allowed; no text makes it fail in another way."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.appliance import check
from flashd.config.devices import AnyOutput, AnySensor, AnyTrigger, Button
from flashd.config.settings import Settings, load, parse
from flashd.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "deploy" / "flashd.example.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("context: 1024\nmodle: x", "line 2: 'modle' is not known; allowed are model, memory,"),
        ("answer:\n  max_tokens: many", "line 2: answer.max_tokens: expected a whole number"),
        ("context: 3", "line 1: context: expected `int` >= 16"),
        (
            "triggers:\n- kind: buton\n  name: a",
            "line 2: triggers[0].kind: 'buton' is not known; allowed are button,",
        ),
        (
            "triggers:\n- kind: button\n  name: a\n  prompt: p\n  pin: 99",
            "line 5: triggers[0].pin: expected `int` <= 63",
        ),
        ("triggers:\n- {kind: button, name: a, prompt: p}", "line 2: triggers[0]: 'pin' is missing"),
        (
            "serial:\n- name: c\n  port: x\n  mode: robot",
            "line 4: serial[0].mode: 'robot' is not known; allowed are human, machine",
        ),
        ("triggers:\n- {kind: manual, name: a, prompt: p, choose: [x]}", "line 2: triggers[0]: choose needs two"),
        (
            "triggers:\n- {kind: manual, name: a, prompt: p, choose: [yes, no]}",
            "triggers[0].choose[0]: expected a text; quote",
        ),
        (
            "triggers:\n- {kind: manual, name: a, prompt: p, json_schema: {}}",
            "line 2: triggers[0].json_schema: trigger 'a' has one, which needs schemas: true",
        ),
        (
            "triggers:\n- kind: near\n  name: a\n  prompt: p\n  sensor: s\n  below: 1",
            "line 5: triggers[0].sensor: trigger 'a' needs a distance sensor called 's'",
        ),
        ("triggers:\n- {kind: schedule, name: a, prompt: p}", "every: SECONDS or at: 'HH:MM'"),
        ("outputs:\n- {kind: led, pin: 3}\n- {kind: buzzer, pin: 3}", "line 3: outputs[1]: pin 3 is used twice"),
        ("mute_pin: 3\noutputs: [{kind: led, pin: 3}]", "line 2: outputs[0]: pin 3 is used twice"),
        (
            "triggers:\n- {kind: button, name: a, pin: 3, prompt: p}\n"
            "- {kind: button, name: b, pin: 3, prompt: p, press: long, pull_up: false}",
            "line 3: triggers[1]: pin 3 is used twice",
        ),
        ("serial: [{name: a, port: x},\n {name: a, port: y}]", "line 2: serial[1].name: two serial are called 'a'"),
        ("context: 512\nmemory: 512Q", "line 2: memory: expected a size, such as 512M or 1.5G"),
        ("context: 512\nmemory: 0.0M", "line 2: memory: expected a size, such as 512M or 1.5G"),
        ("triggers:\n- {kind: manual, name: A, prompt: p}", "line 2: triggers[0].name: expected a name: a small"),
        (
            "triggers:\n- {kind: schedule, name: a, prompt: p, at: '7:30'}",
            "triggers[0].at: expected a time of day in quotes, such as '07:30'",
        ),
        ("sensors: [{kind: ds18b20, name: a, id: '10-1'}]", "sensors[0].id: expected 28- and twelve digits"),
        ("a: &x [1]\nb: *x", "line 2: aliases are not allowed"),
        ("memory: 1G\nmemory: 2G", "line 2: memory is given twice"),
        ("a: [", "line 1: "),
        ("\tx: 1", "line 1: "),
        ("7", "line 1: expected keys with their values"),
        ("memory: 512", "line 1: memory: expected a size, such as 512M"),
        ('memory: "512"', "line 1: memory: expected a size, such as 512M"),
        (
            "triggers:\n- {kind: schedule, name: a, prompt: p, at: 17:30}",
            "line 2: triggers[0].at: expected a time of day in quotes, such as '07:30'",
        ),
        ("triggers:\n- {kind: schedule, name: a, prompt: p, every: 1h}", "triggers[0].every: expected a number"),
        ("serial: /dev/ttyUSB0", "line 1: serial: expected a list: lines that begin with -"),
        ("serial:\nmemory: 1G", "line 1: serial: expected a list: lines that begin with -; or leave the key out"),
        ("outputs: [{kind: led, pin: GPIO17}]", "outputs[0].pin: expected a whole number"),
        ("triggers: [{kind: manual, name: a, prompt: {{ now }} it is}]", "line 1: a key is a word; put a text that"),
        (
            "triggers:\n- kind: manual\n  name: a\n  prompt: Note: hot?",
            "line 4: a text with a colon: put it in quotes",
        ),
        ("!!python/object/apply:os.system [ls]", "line 1: tags are not allowed"),
    ],
)
def test_errors_name_line_key_and_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert str(error.value).startswith("flashd.yaml") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{{ sensors.soil }", "is no template"),
        ("{{ weather }}", "names 'weather'; there are sensors, now,"),
        ("{{ sensors.moon }}", "no sensor is called 'moon'; there are none"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_wrong_template_is_found_before_it_is_needed(prompt: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"line 4: triggers\[0\]\.prompt: trigger 'a'") as error:
        parse(f"triggers:\n- kind: manual\n  name: a\n  prompt: {prompt!r}", check=check)
    assert words in str(error.value)


def test_one_button_may_have_three_kinds_of_press() -> None:
    entry = "{{kind: button, name: {0}, pin: 4, press: {0}, prompt: p}}"
    text = "triggers: [" + ", ".join(entry.format(p) for p in ("short", "long", "double")) + "]"
    triggers = parse(text).triggers
    assert [t.press for t in triggers if isinstance(t, Button)] == ["short", "long", "double"]


def keys(kind: Any) -> set[str]:
    """Every key of a struct and of what it holds."""
    found: set[str] = set()
    for one in [kind, *typing.get_args(kind)]:
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            for name, inner in typing.get_type_hints(one).items():
                found |= {name} | keys(inner)
        elif one is not kind:
            found |= keys(one)
    return found


def test_the_example_is_right_and_names_every_key_and_kind() -> None:
    settings = load(EXAMPLE, check)
    assert settings.triggers and settings.sensors and settings.outputs
    text = EXAMPLE.read_text("utf-8")
    wanted = keys(Settings)
    assert {"hold", "gap", "bounce", "most", "active_high", "address", "below", "keep"} <= wanted
    assert not [key for key in sorted(wanted) if not re.search(rf"\b{key}\b", text)]
    for union in (AnySensor, AnyTrigger, AnyOutput):
        tags = [str(one.__struct_config__.tag) for one in typing.get_args(union)]
        assert not [tag for tag in tags if f"kind: {tag}" not in text]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: this file is not there; copy what you need of /etc"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 \(byte 7\)"):
        load(tmp_path / "latin.yaml")


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_fails_in_another_way(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert str(error).startswith("flashd.yaml")


KEYS = st.sampled_from([*Settings.__struct_fields__, "kind", "name", "pin", "prompt", "x"])
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100) | st.sampled_from(["button", "led", "a", "512M"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(TREES)
def test_no_tree_fails_in_another_way(tree: object) -> None:
    import yaml

    try:
        parse(yaml.safe_dump(tree))
    except ConfigError as error:
        assert str(error).startswith("flashd.yaml")
