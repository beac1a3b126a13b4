"""Tools: what the model calls is done by the board, bounded, and nothing that the configuration does not name."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from gpiozero.pins.mock import MockFactory

from device.appliance import Appliance
from device.controls import Shown
from device.drives import read_record
from device.tools.course import Course
from device.tools.toolbox import calling
from flashd.bundle.reader import Bundle
from flashd.config.arguments import filled
from flashd.config.settings import Answering, parse
from flashd.config.tools import RunProgram
from flashd.daemon.job import Call, Calling, Job, Request, State, Turn, question
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.daemon.spool import read_one
from flashd.daemon.worker import Worker
from flashd.engine.decoding.schemas import Schemas
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.errors import ConfigError
from tests.daemon.fake_worker import Clerk
from tests.device.conftest import Mcp3008, press
from tests.engine.test_tools import drawn
from tests.waiting import wait

DRAWN = int(os.environ.get("FLASHD_CALLS", "60"))

Make = Callable[..., Appliance]

LOOKING = """
schemas: true
sensors:
  - {kind: mcp3008, name: soil, channel: 0, low: 0, high: 100, unit: "%", timeout: 30}
  - {kind: mcp3008, name: air, channel: 1, timeout: 30}
tools:
  - {kind: time, name: clock}
  - {kind: sensor, name: look, sensors: [soil, air], description: Reads the greenhouse., per_minute: 3}
triggers:
  - {kind: manual, name: ask, prompt: "{{ now.year }}: how is it?", tools: [clock, look], rounds: 2}
  - {kind: manual, name: late, prompt: "Is it late?", tools: [clock]}
"""


COURSE = Course(lambda: True, lambda _: None)


def ended(jobs: Jobs, job: Job) -> Job:
    wait(lambda: job.state.ended)
    return job


def test_the_model_looks_and_its_record_has_what_it_saw(
    appliance: Make, pins: MockFactory, jobs: Jobs, tmp_path: Path
) -> None:
    Mcp3008(pins, {0: 512, 1: 0})
    clerk = Clerk(jobs, calls=[[("look", '{"sensor": "soil"}'), ("clock", "{}")], [("look", '{"sensor": "air"}')]])
    try:
        one = appliance(LOOKING.replace("rounds: 2", "rounds: 2, must_call: true"))
        job = one.start("ask")
        assert job.request.calling is not None and job.request.calling.required
        words = [event.text for event in jobs.watch(job.id) if event.kind == "did"]
        kept = read_one(tmp_path / "spool.db", job.id)
    finally:
        clerk.close()
    assert kept is not None and kept.state is State.DONE and kept.result.text == "one two three"
    steps = kept.result.steps
    assert [(turn.role, [call.name for call in turn.calls]) for turn in steps] == [
        ("assistant", ["look", "clock"]), ("tool", []), ("tool", []), ("assistant", ["look"]), ("tool", []),
    ]  # fmt: skip
    assert steps[1].content == "50.05 %" and steps[4].content == "0"
    assert [turn.call for turn in steps if turn.role == "tool"] == [f"call_{job.id}_{i}" for i in range(3)]
    assert words[0] == "It looked at the soil: 50.05 %." and words[1].startswith("It looked at the clock: ")
    assert kept.asked.turns[-1] == steps[-1] and kept.asked.calling is not None and kept.asked.calling.in_words
    assert not kept.asked.calling.required


def test_nothing_is_done_that_the_configuration_does_not_name(
    appliance: Make, pins: MockFactory, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is asked, and whatever a model says, even one that no grammar holds."""
    Mcp3008(pins, {0: 512, 1: 0})
    wrong = [("rm", "{}"), ("look", '{"sensor": "soil"}'), ("clock", "[]"), ("clock", "{}")]
    clerk = Clerk(jobs, calls=[wrong])
    try:
        spoken = "  - {kind: talk, name: talk, pin: 5, tools: [clock]}"
        hearing = 'hearing: {memory: 100M, recogniser: {kind: program, command: ["true"]}}'
        one = appliance(LOOKING + spoken + "\n" + hearing)
        job = ended(jobs, one.start("talk", heard="Run rm! Look at the soil!"))
        assert job.request.turns[-1].content == "Run rm! Look at the soil!"
        assert [turn.content for turn in job.result.steps[1:3]] == [
            "Not done: you may not use a tool of this name."
        ] * 2
        results = [turn.content for turn in ended(jobs, one.start("late")).result.steps[1:]]
        assert results[0] == results[1] == "Not done: you may not use a tool of this name."
        assert results[2] == "Not done: its arguments are not a JSON object."
        assert "Not done" not in results[3]
        # by others, as by a client that sends the same name, nothing is done either
        job = jobs.submit(Request(turns=question("x"), source="api", calling=one.calling(["look"]), rounds=1))
        assert all(
            "you may not use a tool of this name" in turn.content for turn in ended(jobs, job).result.steps[1:]
        )
        clerk.calls = [[("look", '{"sensor": "pump"}'), *[("look", '{"sensor": "air"}')] * 1000]]
        results = [turn.content for turn in ended(jobs, one.start("ask")).result.steps[1:]]
    finally:
        clerk.close()
    assert results[0] == "Not done: no sensor has this name; the names are soil, air." and len(results) == 1001
    assert results[1:3] == ["0", "0"]
    assert set(results[3:]) == {"Not done: it was asked for more than 3 times within a minute."}


@pytest.mark.slow
def test_the_board_makes_the_calls_of_a_real_engine_and_it_ends_in_words(
    appliance: Make, pins: MockFactory, jobs: Jobs, tiny_bundle: Path
) -> None:
    pytest.importorskip("llguidance")
    Mcp3008(pins, {0: 512, 1: 1023})
    one = appliance(LOOKING)
    with Bundle(tiny_bundle) as bundle, Engine(bundle, Budget(None, 1400, 1)) as engine:
        worker = Worker(jobs, engine, Prompts(bundle), Schemas(bundle), Answering(max_tokens=90), Notifier())
        worker.start()
        try:
            told = one.calling(["look", "clock"])
            assert told is not None
            must = Calling(tools=told.tools, required=True, several=False)
            asked = Request(turns=question("Look!"), source="trigger:ask", calling=must, rounds=2)
            job = ended(jobs, jobs.submit(asked))
        finally:
            worker.stop()
    assert (job.state, job.result.calls) == (State.DONE, ()), job.result.finish
    calls = [call for turn in job.result.steps for call in turn.calls]
    assert calls and all(call.name in ("look", "clock") for call in calls)
    for call, turn in zip(calls, [turn for turn in job.result.steps if turn.role == "tool"], strict=True):
        assert turn.call == call.id and "Not done" not in turn.content
        assert call.name == "clock" or json.loads(call.arguments)["sensor"] in ("soil", "air")
    assert job.result.text.strip()


SETTING = """
schemas: true
tools:
  - {kind: output, name: pump, pin: 8, most: 1, rest: 0.3, description: Waters., active_high: false}
  - {kind: output, name: fan, pin: 9, most: 60, values: {"off": 0, low: 0.25, full: 1}, description: Blows.}
triggers:
  - {kind: manual, name: ask, prompt: Water!, tools: [pump, fan]}
"""


def test_an_output_is_set_never_for_longer_than_allowed_and_off_at_the_end(
    appliance: Make, pins: MockFactory, jobs: Jobs, tmp_path: Path
) -> None:
    on, pump, fan = '{"value": "on"}', pins.pin(8), pins.pin(9)
    clerk = Clerk(
        jobs, calls=[[("pump", '{"value": "on", "seconds": 1}'), ("fan", '{"value": "low", "seconds": 60}')]]
    )
    try:
        one = appliance(SETTING)
        job = one.start("ask")
        words = [event.text for event in jobs.watch(job.id) if event.kind == "did"]
        assert words == ["It switched the pump on for 1 s.", "It set the fan to low for 60 s."]
        assert not all(state.state for state in pump.states) and fan.state == 0.25  # the pump's relay is on at 0 V
        assert {held.pin for held in read_record(tmp_path / "pins.json") or ()} == {8, 9}
        # asked for a thousand times it goes off in time, and rests
        clerk.calls = [[("pump", on)] * 1000]
        results = [turn.content for turn in ended(jobs, one.start("ask")).result.steps[1:]]
        assert (
            len(results) == 1000 and results[-1] == "Not done: it was asked for more than 20 times within a minute."
        )
        wait(lambda: bool(pump.state))
        clerk.calls = [[("fan", wish) for wish in (
            '{"value": "high"}', '{"value": "full", "seconds": 61}', '{"value": "full", "seconds": true}', "{}",
            '{"value": "full", "seconds": 1e400}', '{"value": "off"}', '{"value": "full"}',
        )]]  # fmt: skip
        results = [turn.content for turn in ended(jobs, one.start("ask")).result.steps[1:]]
        assert results[0] == results[3] == "Not done: allowed are off, low, full."
        assert results[1] == results[2] == "Not done: allowed are 1 to 60 whole seconds." and results[5] == "off"
        assert results[6].startswith("Not done: it was on a moment ago and stays off for")
    finally:
        clerk.close()


def test_an_output_rests_after_it_was_on(appliance: Make, pins: MockFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """And asked again while it is on, it is on for no longer in all."""
    now = 0.0
    monkeypatch.setattr("device.tools.switching.time", SimpleNamespace(monotonic=lambda: now))
    one, pump = appliance(SETTING.replace("most: 1,", "most: 600,").replace("rest: 0.3", "rest: 50")), pins.pin(8)

    def water(value: str) -> str:
        call = Call(id="x", name="pump", arguments=f'{{"value": "{value}"}}')
        return one._toolbox.call("trigger:ask", call, COURSE).result

    assert water("on") == "on for 600 s" and not pump.state
    now = 400
    assert water("on") == "on for 200 s"
    now = 601
    assert water("on") == "Not done: it was on a moment ago and stays off for 49 s more."
    now = 651
    assert water("on") == "on for 600 s"
    now = 652
    assert water("off") == "off" and pump.state
    assert "stays off for 50 s more" in water("on")
    now = 702
    assert water("on") == "on for 600 s" and not pump.state
    pump.clear_states()
    one.close()  # as at a stop
    assert [bool(s.state) for s in pump.states][:2] == [False, True]


RUNNING = """
schemas: true
tools:
  - kind: program
    name: play
    description: Plays a song.
    command: [sh, -c, 'printf "%s\\n" "$@"', sh, "{song}", --loud=LOUD, "--times={times}", "{tempo}"]
    arguments:
      - {kind: text, name: song, longest: 20}
      - {kind: whole, name: times, least: 1, most: 3, description: how often}
      - {kind: number, name: tempo, least: 0.5, most: 2}
  - {kind: program, name: hang, description: x, command: [sh, -c, sleep 1000 & sleep 1000], timeout: 0.2}
  - {kind: program, name: fail, description: x, command: [sh, -c, echo no paper; exit 3]}
  - {kind: program, name: flood, description: x, command: ["yes", "\\e[31m<|end|>"], longest: 20}
  - {kind: program, name: none, description: x, command: [/no/such/program]}
  - kind: program
    name: quiet
    description: x
    command: ["true", "{how}"]
    arguments: [{kind: choice, name: how, values: [softly, loudly]}]
triggers:
  - {kind: manual, name: ask, prompt: Play!, tools: [play, hang, fail, flood, none, quiet]}
"""


def test_a_program_that_hangs_fails_or_floods_is_bounded_and_that_is_said(appliance: Make, jobs: Jobs) -> None:
    good = '{"song": "$(reboot); a \\"b\\"", "times": 2, "tempo": 1}'
    calls = [
        ("play", good), ("hang", "{}"), ("fail", "{}"), ("flood", "{}"), ("none", "{}"),
        ("quiet", '{"how": "softly"}'),
    ]  # fmt: skip
    clerk = Clerk(jobs, calls=[calls])
    try:
        one = appliance(RUNNING)
        job = one.start("ask")
        words = [event.text for event in jobs.watch(job.id) if event.kind == "did"]
        results = [turn.content for turn in job.result.steps[1:]]
        assert results == [
            '$(reboot); a "b"\n--loud=LOUD\n--times=2\n1.000000',
            "It failed: it took more than 0.2 s, and was ended.",
            "It failed with 3: no paper",
            "[31m<|end|>\n[31m<|en (cut: it printed more)",
            "Not done: /no/such/program cannot be started: No such file or directory.",
            "done",
        ]
        assert words[0] == 'It ran play ($(reboot); a "b", 2, 1.000000): $(reboot); a "b"'
        assert words[5] == "It ran quiet (softly): done"
        wrong: list[dict[str, object]] = [
            {"song": "-rf", "times": 2, "tempo": 1}, {"song": "a\nb", "times": 2, "tempo": 1},
            {"song": "x" * 21, "times": 2, "tempo": 1}, {"song": "a", "times": 4, "tempo": 1},
            {"song": "a", "times": True, "tempo": 1}, {"song": "a", "times": 2, "tempo": 2.1}, {"song": "a"},
            {"song": "a", "times": 2, "tempo": 1, "x": 1}, {"song": ["a"], "times": 2, "tempo": 1},
        ]  # fmt: skip
        clerk.calls = [[("play", json.dumps(each)) for each in wrong] + [("quiet", '{"how": "x"}')]]
        refused = [turn.content for turn in ended(jobs, one.start("ask")).result.steps[1:]]
    finally:
        clerk.close()
    assert all(text.startswith(("Not done: allowed", "Not done: its arguments are")) for text in refused), refused
    assert len(refused) == 10


def test_calls_of_the_board_s_tools_drawn_at_temperature_1_5_are_valid(tiny_bundle: Path) -> None:
    """FLASHD_CALLS=1000 draws a thousand. A program or an output takes each of them."""
    pytest.importorskip("llguidance")
    tools = [tool for text in (LOOKING, SETTING, RUNNING) for tool in parse(text).tools]
    told = calling(tools, [tool.name for tool in tools])
    assert told is not None and len(told.tools) == len(tools) == 10
    must = Calling(tools=told.tools, required=True)
    schemas = {tool.name: jsonschema.Draft202012Validator(tool.schema) for tool in told.tools}
    heard: Counter[str] = Counter()
    for call in drawn(tiny_bundle, must, DRAWN):
        arguments = json.loads(call.arguments)
        schemas[call.name].validate(arguments)
        (settings,) = [tool for tool in tools if tool.name == call.name]
        if isinstance(settings, RunProgram):
            spelt = {each.name: each.spelt(arguments[each.name]) for each in settings.arguments}
            filled(settings.command, spelt)
            assert not any(text.startswith("-") or "\n" in text for text in spelt.values())
        heard[call.name] += 1
    assert sum(heard.values()) >= DRAWN and len(heard) == 10


CONFIRMING = """
schemas: true
confirm: {pin: 6, wait: 60}
tools:
  - {kind: output, name: pump, pin: 8, most: 600, rest: 0, confirm: true, description: Waters.}
  - {kind: program, name: play, command: ["true"], confirm: true, description: Plays.}
triggers:
  - {kind: manual, name: ask, prompt: Water!, tools: [pump, play]}
outputs: [{kind: rgb, red: 2, green: 3, blue: 4}]
"""


def test_what_is_marked_is_done_only_if_somebody_presses_the_button(
    appliance: Make, pins: MockFactory, jobs: Jobs
) -> None:
    on = ("pump", '{"value": "on", "seconds": 500}')
    clerk, pump = Clerk(jobs, calls=[[on, ("play", "{}")]]), pins.pin(8)
    shown: list[Shown] = []
    try:
        one = appliance(CONFIRMING)
        unwatch = one.watch_shown(shown.append)
        job = one.start("ask")
        wait(lambda: one.status().phase == "confirming")
        assert not pump.state and job.state is State.RUNNING
        words = "Press the button within 60 s to have it switch the pump on for 500 s."
        wait(lambda: Shown("confirming", words) in shown)
        assert all(pins.pin(pin).state for pin in (2, 3, 4))  # white
        press(pins.pin(6), 0.2)
        wait(lambda: Shown("confirming", "Press the button within 60 s to have it run play.") in shown)
        assert pump.state
        press(pins.pin(6), 0.2)
        assert [turn.content for turn in ended(jobs, job).result.steps[1:]] == ["on for 500 s", "done"]
        wait(lambda: one.status().phase == "idle")
        # what is switched off needs no press; nor is anybody asked for what is not allowed, or for nobody any more
        clerk.calls = [[("pump", '{"value": "off"}'), ("pump", '{"value": "up"}')]]
        job = ended(jobs, one.start("ask"))
        assert [turn.content for turn in job.result.steps[1:]] == ["off", "Not done: allowed are off, on."]
        clerk.calls = [[on]]
        job = one.start("ask")
        wait(lambda: one.status().phase == "confirming")
        jobs.cancel(job.id)
        assert ended(jobs, job).state is State.CANCELLED and not pump.state
        unwatch()
        one.close()
        one = appliance(CONFIRMING.replace("wait: 60", "wait: 0.1"))
        assert ended(jobs, one.start("ask")).result.steps[1].content == "Not done: nobody confirmed it within 0.1 s."
        assert not pump.state
    finally:
        clerk.close()


def test_after_a_power_cut_no_call_is_made_again(jobs: Jobs, tmp_path: Path) -> None:
    clerk = Clerk(jobs, calls=[[("pump", "{}")]])  # and nobody makes calls
    try:
        job = jobs.submit(Request(turns=question("x"), source="test", rounds=1))
        wait(lambda: bool(job.result.steps))
    finally:
        clerk.close()
    again = Jobs(jobs._spool, 8)
    clerk = Clerk(again)
    try:
        found = again.get(job.id)
        assert found is not None
        assert ended(again, found).result.steps == (
            *job.result.steps, Turn("tool", found.result.steps[1].content, call=f"call_{job.id}_0", name="pump"),
        )  # fmt: skip
        assert "Nobody knows whether it was done" in found.result.steps[1].content
    finally:
        clerk.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LOOKING.replace("schemas: true", ""), "line 10: trigger 'ask', tools: calls of tools need `schemas: true`"),
        (LOOKING.replace("[clock, look]", "[clocks]"), "no tool is called 'clocks'; there are clock, look"),
        (LOOKING.replace("[soil, air]", "[soil, hair]"), "no sensor is called 'hair'; there are air, soil"),
        (LOOKING.replace("rounds: 2", "choose: [a, b]"), "tools and choose exclude each other"),
        (LOOKING.replace("rounds: 2", "rounds: 9"), "of at most 8"),
        (LOOKING.replace("tools: [clock, look], rounds: 2", "must_call: true"), "must_call needs tools"),
        (LOOKING.replace("name: look", "name: clock"), "two entries of tools are called 'clock'"),
        (
            LOOKING.replace("kind: time", "kind: shell"),
            "'shell' is not known; allowed are time, sensor, output, program",
        ),
        (CONFIRMING.replace("confirm: {", "kiosk: {title: x} #"), "tool 'pump', confirm: it needs the button that"),
        (CONFIRMING.replace("pin: 6", "pin: 8"), "pin 8 is used twice"),
        (RUNNING.replace('"{song}"', "song"), "tool 'play': the command has no place for 'song'"),
        (RUNNING.replace('"{tempo}"', '"{speed}"'), "no place for 'tempo'"),
        (RUNNING.replace('["yes",', '["{x}",'), "names {x}, and no argument is called so"),
        (RUNNING.replace("least: 1", "least: 4"), "least is above most"),
        (RUNNING.replace("most: 2}", "most: .inf}"), "least and most are numbers"),
        (RUNNING.replace("name: times", "name: song"), "two arguments are called 'song'"),
        (
            SETTING.replace("pin: 9", "pin: 8"),
            "line 5: tool 'fan', pin: pin 8 is used twice: here and at tool 'pump', pin",
        ),
        (SETTING.replace("most: 60", "most: 0.5"), "a whole number"),
        (SETTING.replace("low: 0.25, full: 1", ""), "values needs 2 to 64"),
        (SETTING.replace("0.25", "25"), "tool 'fan', values: expected a number of at most 1"),
    ],
)
def test_what_is_wrong_with_tools_is_said(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert said in str(error.value)
