"""flashd.yaml: an error names the line, the key and what is allowed; no text makes it fail in another way."""

from __future__ import annotations

import json
import re
import typing
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.appliance import check
from device.triggers import next_time
from flashd.config import plain_yaml
from flashd.config.arguments import AnyArgument
from flashd.config.devices import AnyOutput, AnySensor, AnyTrigger, Button, Schedule
from flashd.config.fields import Pin
from flashd.config.json_schema import schema_text
from flashd.config.pins import pins_in
from flashd.config.settings import Settings, load, parse, pins
from flashd.config.tools import AnyTool
from flashd.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "deploy" / "flashd.example.yaml"
SCHEMA = EXAMPLE.parent / "flashd.schema.json"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "context: 1024\nmodle: x",
            "line 2: 'modle' is not known; allowed are model, draft, memory, context, threads, arithmetic, kv, card, "
            "answer, api, spool, kiosk, updates, mute_pin, hearing, schemas, snapshots, serial, sensors, triggers, "
            "outputs, confirm, tools",
        ),
        (
            "answer:\n  max_tokens: many",
            "line 2: answer.max_tokens: expected a whole number",
        ),
        (
            "context: 3",
            "line 1: context: expected a whole number of at least 16",
        ),
        (
            "triggers:\n- kind: buton\n  name: a",
            "line 2: trigger 'a', kind: 'buton' is not known; allowed are button, talk, motion, door, near, "
            "rotary, schedule, manual",
        ),
        (
            "triggers:\n- kind: button\n  name: a\n  prompt: p\n  pin: 99",
            "line 5: trigger 'a', pin: expected a GPIO line's number from 0 to 63, such as 17 or GPIO17",
        ),
        (
            "triggers:\n- {kind: button, name: a, prompt: p}",
            "line 2: trigger 'a': 'pin' is missing",
        ),
        (
            "serial:\n- name: c\n  port: x\n  mode: robot",
            "line 4: serial 'c', mode: 'robot' is not known; allowed are human, machine",
        ),
        (
            "triggers:\n- {kind: manual, name: a, prompt: p, choose: [x]}",
            "line 2: trigger 'a': choose needs two different answers or more",
        ),
        (
            "triggers:\n- {kind: manual, name: a, prompt: p, choose: [yes, no]}",
            "line 2: trigger 'a', choose[0]: expected a text; quote it: YAML takes yes, no, on and off for "
            "true and false",
        ),
        (
            "triggers:\n- {kind: manual, name: a, prompt: p, json_schema: {}}",
            "line 2: trigger 'a', json_schema: answers of a schema need `schemas: true` in the file",
        ),
        (
            "triggers:\n- kind: near\n  name: a\n  prompt: p\n  sensor: s\n  below: 1",
            "line 5: trigger 'a', sensor: no distance sensor is called 's'; there are none",
        ),
        (
            "triggers:\n- {kind: schedule, name: a, prompt: p}",
            "line 2: trigger 'a': a schedule has either every: SECONDS or at: HH:MM",
        ),
        (
            "outputs:\n- {kind: led, pin: 3}\n- {kind: buzzer, pin: 3}",
            "line 3: outputs[1] (buzzer), pin: pin 3 is used twice: here and at outputs[0] (led), pin",
        ),
        (
            "mute_pin: 3\noutputs: [{kind: led, pin: 3}]",
            "line 2: outputs[0] (led), pin: pin 3 is used twice: here and at mute_pin",
        ),
        (
            "triggers:\n- {kind: button, name: a, pin: 3, prompt: p}\n- {kind: button, name: b, pin: 3, "
            "prompt: p, press: long, pull_up: false}",
            "line 3: trigger 'b', pin: pin 3 is used twice: here and at trigger 'a', pin",
        ),
        (
            "serial: [{name: a, port: x},\n {name: a, port: y}]",
            "line 2: serial 'a', name: two entries of serial are called 'a'",
        ),
        (
            "context: 512\nmemory: 512Q",
            "line 2: memory: expected a size, such as 512M or 1.5G",
        ),
        (
            "context: 512\nmemory: 0.0M",
            "line 2: memory: expected a size, such as 512M or 1.5G",
        ),
        (
            "triggers:\n- {kind: manual, name: A, prompt: p}",
            "line 2: trigger 'A', name: expected a name: a small letter, then up to 31 small letters, "
            "digits, - and _",
        ),
        (
            "sensors: [{kind: ds18b20, name: a, id: '10-1'}]",
            "line 1: sensor 'a', id: expected a thermometer's name in /sys/bus/w1/devices: 28-, 10-, 22-, "
            "3b- or 42- and twelve digits 0 to f",
        ),
        (
            "a: &x [1]\nb: *x",
            "line 2: aliases are not allowed",
        ),
        (
            "memory: 1G\nmemory: 2G",
            "line 2: memory is given twice",
        ),
        (
            "a: [",
            "line 1: a list or mapping that is not closed: put a ] behind it, and commas in it",
        ),
        (
            "\tx: 1",
            "line 1: a tab before the text: use spaces",
        ),
        (
            "7",
            "line 1: expected keys with their values",
        ),
        (
            "memory: 512",
            "line 1: memory: expected a size, such as 512M or 1.5G",
        ),
        (
            'memory: "512"',
            "line 1: memory: expected a size, such as 512M or 1.5G",
        ),
        (
            "triggers:\n- {kind: schedule, name: a, prompt: p, every: 1h}",
            "line 2: trigger 'a', every: expected a number",
        ),
        (
            "serial: /dev/ttyUSB0",
            "line 1: serial: expected a list: lines that begin with -",
        ),
        (
            "serial:\nmemory: 1G",
            "line 1: serial: expected a list: lines that begin with -; or leave the key out",
        ),
        (
            "triggers: [{kind: manual, name: a, prompt: {{ now }} it is}]",
            "line 1: a key is a word; put a text that begins with a brace in quotes",
        ),
        (
            "triggers:\n- kind: manual\n  name: a\n  prompt: Note: hot?",
            "line 4: a text with a colon: put it in quotes",
        ),
        (
            "!!python/object/apply:os.system [ls]",
            "line 1: tags are not allowed",
        ),
        (
            "triggers:\n- {kind: schedule, name: a, prompt: p, at: '25:30'}",
            "line 2: trigger 'a', at: expected a time of day, such as 07:30",
        ),
        (
            "triggers:\n- {kind: schedule, name: a, prompt: p, at: 730}",
            "line 2: trigger 'a', at: expected a time of day, such as 07:30",
        ),
        (
            "answer:\n\tmax_tokens: 5",
            "line 2: a tab before the text: use spaces",
        ),
        (
            "answer:\n    max_tokens: 5\n   top_k: 3",
            "line 3: 3 spaces before the key, its neighbours have 4",
        ),
        (
            "answer:\n  max_tokens: 5\n   top_k: 3",
            "line 3: 3 spaces before the key, its neighbours have 2",
        ),
        (
            "answer:\n  max_tokens: 5\n top_k: 3",
            "line 3: 1 space before the key, its neighbours have 2",
        ),
        (
            "triggers:\n  - kind: manual\n    name: a\n   prompt: p",
            "line 4: 3 spaces before the key, its neighbours have 4",
        ),
        (
            "triggers:\n  - kind: manual\n    name: a\n   - kind: manual\n     name: b",
            "line 4: 3 spaces before the -, its neighbours have 2",
        ),
        (
            "memory: 1G\n context: 512",
            "line 2: 1 space before the key, its neighbours have 0",
        ),
        (
            "  memory: 1G\ncontext: 512",
            "line 2: no spaces before the key, its neighbours have 2",
        ),
        (
            "kiosk:\n  title: 'x\nmemory: 1G\n",
            "line 2: a quote that is not closed: put ' at its end",
        ),
        (
            "kiosk:\n  presets: [a, b\nmemory: 1G\n",
            "line 2: a list or mapping that is not closed: put a ] behind it, and commas in it",
        ),
        (
            "triggers:\n- {kind: manual,\n   prompt: Hot?, name: a}",
            "line 3: a text with a ? before a comma or a bracket: put it in quotes",
        ),
        (
            "memory 1G\ncontext: 3",
            "line 1: a line that is neither `key: value` nor an entry that begins with `- `",
        ),
        (
            "context: 1024\nmemory 512M",
            "line 2: a line that is neither `key: value` nor an entry that begins with `- `",
        ),
        (
            "kiosk:\n  title: @home",
            "line 2: a text that begins with @: put it in quotes",
        ),
        (
            "kiosk:\n  title: `x`",
            "line 2: a text that begins with `: put it in quotes",
        ),
        (
            "kiosk:\n  title: 'Ask' me",
            "line 2: more than one value: if it is one text, put it in quotes",
        ),
        (
            "a: 1\n---\nb: 2",
            "line 2: a second document: remove the line that begins with ---",
        ),
        (
            'kiosk:\n  title: "C:\\quit"',
            "line 2: a \\ in double quotes: put the text in single quotes",
        ),
        (
            "kiosk:\n  title: a\u0007",
            "line 2: a character that no text has (U+0007): remove it",
        ),
        (
            "kiosk: {title:\n\t\tx}",
            "line 2: a tab before the text: use spaces",
        ),
        (
            "context: 01024",
            "line 1: context: expected a whole number with no 0 before it: 1024",
        ),
        (
            "answer: {min_p: 1}",
            "line 1: answer.min_p: expected a number below 1",
        ),
        (
            "answer: {temperature: -1}",
            "line 1: answer.temperature: expected a number of at least 0",
        ),
        (
            "outputs: [{kind: speech, command: []}]",
            "line 1: outputs[0] (speech), command: expected a list with 1 or more entries",
        ),
        (
            "outputs: [{kind: led, pin: 017}]",
            "line 1: outputs[0] (led), pin: write 17 and not 017: YAML takes a number that begins with 0 "
            "for an octal one",
        ),
        (
            "outputs: [{kind: led, pin: 018}]",
            "line 1: outputs[0] (led), pin: write 18 and not 018: YAML takes a number that begins with 0 "
            "for an octal one",
        ),
        (
            "outputs: [{kind: led, pin: BOARD11}]",
            "line 1: outputs[0] (led), pin: BOARD11 is a place on the header; on a Raspberry Pi it is "
            "GPIO17: write 17",
        ),
        (
            "outputs: [{kind: led, pin: 'J8:11'}]",
            "line 1: outputs[0] (led), pin: J8:11 is a place on the header; on a Raspberry Pi it is GPIO17: write 17",
        ),
        (
            "outputs: [{kind: led, pin: BOARD1}]",
            "line 1: outputs[0] (led), pin: BOARD1 is a place on the header that has no GPIO line",
        ),
        (
            "outputs: [{kind: led, pin: GPIO64}]",
            "line 1: outputs[0] (led), pin: expected a GPIO line's number from 0 to 63, such as 17 or GPIO17",
        ),
        (
            "outputs: [{kind: led, pin: -1}]",
            "line 1: outputs[0] (led), pin: expected a GPIO line's number from 0 to 63, such as 17 or GPIO17",
        ),
        (
            "outputs: [{kind: led, pin: yes}]",
            "line 1: outputs[0] (led), pin: expected a GPIO line's number from 0 to 63, such as 17 or GPIO17",
        ),
        (
            "outputs: [{kind: led, pin: [1]}]",
            "line 1: outputs[0] (led), pin: expected a GPIO line's number from 0 to 63, such as 17 or GPIO17",
        ),
        (
            "api: {loopback: 0.0.0.0}",
            "line 1: api.loopback: expected a port alone, such as 8080: flashd listens on 127.0.0.1 and on "
            "no other address, since whoever reaches the port may ask and read everything. From another "
            "machine: ssh -L 8080:127.0.0.1:8080 BOARD. A page for phones on the local network, with a PIN: "
            "api.network",
        ),
        (
            "api: {loopback: '0.0.0.0:8080'}",
            "line 1: api.loopback: expected a port alone, such as 8080: flashd listens on 127.0.0.1 and on "
            "no other address, since whoever reaches the port may ask and read everything. From another "
            "machine: ssh -L 8080:127.0.0.1:8080 BOARD. A page for phones on the local network, with a PIN: "
            "api.network",
        ),
        (
            "api:\n  network: {port: 8088}",
            "line 2: api.network: 'code' is missing",
        ),
        (
            "api:\n  network:\n    port: 8088\n    code: 12345",
            "line 4: api.network.code: expected the PIN of the page: 6 to 12 digits",
        ),
        (
            "api: {network: {port: 8088, code: 456789}}",
            "line 1: api.network.code: everybody tries this PIN first: take another one",
        ),
        (
            "api: {network: {port: 8088, code: '000000'}}",
            "line 1: api.network.code: everybody tries this PIN first: take another one",
        ),
        (
            "api:\n  loopback: 8080\n  network: {code: 493817, port: 8080}",
            "line 3: api.network.port: port 8080 is api.loopback's: take another one",
        ),
        (
            "api: {network: {port: 0.0.0.0, code: 493817}}",
            "line 1: api.network.port: expected a whole number",
        ),
        (
            "api: {socket: run.sock}",
            "line 1: api.socket: expected a path that begins with /",
        ),
        (
            "sensors: [{kind: light, name: sun, pin: 4}]\ntriggers:\n- kind: manual\n  name: ask\n  "
            "prompt: p\n  choose: [x, y]\n  drive: {pin: 4, answer: x}",
            "line 7: trigger 'ask', drive.pin: pin 4 is used twice: here and at sensor 'sun', pin",
        ),
        (
            "sensors: [{kind: distance, name: d, echo: 4, trigger: 4}]",
            "line 1: sensor 'd', trigger: pin 4 is used twice: here and at sensor 'd', echo",
        ),
        (
            "sensors: [{kind: distance, name: wall, echo: 4, trigger: 5}]\ntriggers:\n- kind: near\n  "
            "name: a\n  prompt: p\n  sensor: s\n  below: 1",
            "line 6: trigger 'a', sensor: no distance sensor is called 's'; there are wall",
        ),
        (
            "sensors: [{kind: light, name: sun, pin: 4}]\ntriggers:\n- kind: near\n  "
            "name: a\n  prompt: p\n  sensor: sun\n  below: 1",
            "line 6: trigger 'a', sensor: 'sun' is of kind light, and near takes a sensor of kind distance; "
            "there are none",
        ),
        (
            "outputs: [{kind: hook, command: [x], event: ended}]",
            "line 1: outputs[0] (hook), event: 'ended' is not known; allowed are accepted, cancelled, "
            "done, failed, started",
        ),
        (
            "triggers:\n- name: a\n  prompt: p",
            "line 2: trigger 'a': 'kind' is missing",
        ),
    ],
)
def test_errors_name_line_key_and_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert str(error.value) == f"flashd.yaml, {words}"


def test_pins_and_times_as_people_write_them() -> None:
    for written in ("17", "'17'", "GPIO17", "gpio17", "BCM17"):
        assert pins(parse(f"outputs: [{{kind: led, pin: {written}}}]")) == [17]
    for written, hour in (("07:30", 7), ("'07:30'", 7), ("17:30", 17), ("7:30", 7)):
        (trigger,) = parse(f"triggers: [{{kind: schedule, name: a, prompt: p, at: {written}}}]").triggers
        assert isinstance(trigger, Schedule) and trigger.at is not None
        assert next_time(datetime(2026, 1, 1), trigger.at) == datetime(2026, 1, 1, hour, 30)


@pytest.mark.parametrize("written", ["0493817", "'0493817'"])
def test_a_page_s_pin_in_quotes_or_without(written: str) -> None:
    network = parse(f"api: {{network: {{port: 8088, code: {written}}}}}").api.network
    assert network is not None and network.code == "0493817"
    assert valid(f"api: {{network: {{port: 8088, code: {written}}}}}")
    assert valid("api: {network: {port: 8088, code: 493817}}")


class Lid(msgspec.Struct):
    servo: Pin
    speed: int = 9


class Robot(msgspec.Struct):
    lids: list[Lid]
    left_motor: Pin | None = None
    leds: list[Pin] = []


def test_a_pin_is_found_by_its_type_and_not_by_its_name() -> None:
    robot = Robot([Lid(3), Lid(4)], left_motor=5, leds=[6])
    assert [(use.pin, use.path) for use in pins_in(robot)] == [
        (3, ("lids", 0, "servo")), (4, ("lids", 1, "servo")), (5, ("left_motor",)), (6, ("leds", 0)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{{ sensors.soil }", "it is not a Jinja template: "),
        ("{{ weather }}", "it names 'weather'; there are sensors, now, last, choice, distance"),
        ("{{ sensors.moon }}", "no sensor is called 'moon'; there are none"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_wrong_template_is_found_before_it_is_needed(prompt: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"line 4: trigger 'a', prompt: ") as error:
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
    for union in (AnySensor, AnyTrigger, AnyOutput, AnyTool, AnyArgument):
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


def valid(text: str) -> bool:
    return bool(jsonschema.Draft202012Validator(json.loads(schema_text())).is_valid(plain_yaml.parse(text).value))


def test_the_schema_for_editors_is_current() -> None:
    """And says how it is made anew if it is not."""
    command = "python -m flashd.config.json_schema deploy/flashd.schema.json"
    assert SCHEMA.read_text("utf-8") == schema_text(), f"run: {command}"


def test_the_schema_for_editors_knows_what_is_right() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))
    for file in (EXAMPLE, EXAMPLE.parent / "flashd.yaml"):
        text = file.read_text("utf-8")
        assert valid(text), file
        assert text.startswith(f"# yaml-language-server: $schema={SCHEMA.name}\n")
    assert valid("outputs: [{kind: led, pin: GPIO17}]") and valid("mute_pin: 17")
    for wrong in (
        "modle: x", "context: 3", "outputs: [{kind: led}]", "outputs: [{kind: lid, pin: 3}]", "mute_pin: 99",
        "outputs: [{kind: led, pin: BOARD11}]", "triggers: [{kind: button, name: a, prompt: p, pin: 3, press: soft}]",
        "api: {loopback: 0.0.0.0}",
    ):  # fmt: skip
        assert not valid(wrong), wrong


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
