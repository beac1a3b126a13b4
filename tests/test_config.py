"""flashd.yaml: an error names the line, the key and what is allowed; no text makes it fail in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.appliance import check
from flashd.config import Button, Settings, load, parse
from flashd.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "deploy" / "flashd.example.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("context: 1024\nmodle: x", "line 2: 'modle' is not known; allowed are model, memory,"),
        ("answer:\n  max_tokens: many", "line 2: answer.max_tokens: expected `int`"),
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
            "line 4: serial[0].mode: 'robot' is not allowed; allowed are",
        ),
        ("triggers:\n- {kind: manual, name: a, prompt: p, choose: [x]}", "line 2: triggers[0]: choose needs two"),
        (
            "triggers:\n- {kind: manual, name: a, prompt: p, choose: [yes, no]}",
            "triggers[0].choose[0]: expected a text; quote",
        ),
        ("triggers: [{kind: manual, name: a, prompt: p, json_schema: {}}]", "which needs schemas: true"),
        ("triggers:\n- {kind: near, name: a, prompt: p, sensor: s, below: 1}", "needs a distance sensor called 's'"),
        ("triggers:\n- {kind: schedule, name: a, prompt: p}", "every: SECONDS or at: 'HH:MM'"),
        ("outputs:\n- {kind: led, pin: 3}\n- {kind: buzzer, pin: 3}", "pin 3 is used twice"),
        ("mute_pin: 3\noutputs: [{kind: led, pin: 3}]", "pin 3 is used twice"),
        ("serial: [{name: a, port: x}, {name: a, port: y}]", "two serial are called 'a'"),
        ("a: &x [1]\nb: *x", "line 1: aliases are not allowed"),
        ("memory: 1G\nmemory: 2G", "line 2: memory is given twice"),
        ("a: [", "line 1: "),
        ("\tx: 1", "line 1: "),
        ("7", "line 1: expected `object`, got `int`"),
        ("!!python/object/apply:os.system [ls]", "line 1: could not determine a constructor"),
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
        ("{{ sensors.moon }}", "has no attribute 'moon'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_wrong_template_is_found_before_it_is_needed(prompt: str, words: str) -> None:
    settings = parse(f"triggers: [{{kind: manual, name: a, prompt: {prompt!r}}}]")
    with pytest.raises(ConfigError, match="trigger 'a'") as error:
        check(settings)
    assert words in str(error.value)


def test_one_button_may_have_three_kinds_of_press() -> None:
    entry = "{{kind: button, name: {0}, pin: 4, press: {0}, prompt: p}}"
    text = "triggers: [" + ", ".join(entry.format(p) for p in ("short", "long", "double")) + "]"
    triggers = parse(text).triggers
    assert [t.press for t in triggers if isinstance(t, Button)] == ["short", "long", "double"]


def test_the_example_is_right_and_names_every_key() -> None:
    settings = load(EXAMPLE)
    check(settings)
    text = EXAMPLE.read_text("utf-8")
    missing = [name for name in Settings.__struct_fields__ if f"{name}:" not in text]
    assert not missing


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 \(byte 7\)"):
        load(tmp_path / "latin.yaml")


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


@given(TREES)
def test_no_tree_fails_in_another_way(tree: object) -> None:
    import yaml

    try:
        parse(yaml.safe_dump(tree))
    except ConfigError as error:
        assert str(error).startswith("flashd.yaml")
