"""Push to talk: mock pins, a microphone that is a file, recognisers that are programs."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gpiozero.pins.mock import MockFactory

from device.appliance import Appliance
from device.controls import Shown
from device.demo import Cable
from device.hearing import ears
from device.hearing.by_program import ByProgram
from device.hearing.by_sherpa import BySherpa, made_of
from device.hearing.recogniser import NotHeard, wav, words
from device.needed_devices import needed_devices
from device.outputs.output import Phase
from flashd.check_config import check
from flashd.config.hearing import Hearing, Program, Sherpa
from flashd.config.settings import parse
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from flashd.errors import ConfigError, InputMissing
from tests.daemon.fake_worker import Clerk
from tests.device.conftest import Terminal, press
from tests.device.tones import recogniser, spoken, tones, word_errors
from tests.waiting import wait

Make = Callable[..., Appliance]

SPEAK = r"while printf '\000\001\000\002'; do sleep 0.01; done"
"""A microphone's program: sound, until it is ended."""

HELD = 0.15
"""Seconds that count as a press to talk here."""


@pytest.fixture(autouse=True)
def people_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ears, "TAIL_SECONDS", 0.02)
    monkeypatch.setattr(ears, "LEAST_SECONDS", HELD - 0.05)


def talk(microphone: str = SPEAK, recogniser: str = "cat > /dev/null; echo turn on the light", more: str = "") -> str:
    """A configuration with a talk trigger on pin 4, and shell programs that record and recognise."""
    return f"""
hearing:
  memory: 64M
  microphone: [sh, -c, "{microphone.replace(chr(92), chr(92) * 2)}"]
  recogniser: {{kind: program, command: [sh, -c, '{recogniser}']}}
  {more}
triggers: [{{kind: talk, name: ask, pin: 4, bounce: 0, prompt: "Somebody said: {{{{ heard }}}}"}}]
outputs: [{{kind: rgb, red: 5, green: 6, blue: 7}}]
"""


def shown_by(one: Appliance) -> list[Shown]:
    shown: list[Shown] = []
    one.watch_shown(shown.append)
    return shown


def test_what_is_said_while_a_button_is_held_is_asked(
    pins: MockFactory, appliance: Make, jobs: Jobs, clerk: Clerk, tmp_path: Path
) -> None:
    """Its program gets a WAV file, which it may open by a name."""
    got = tmp_path / "got.wav"
    one = appliance(talk(recogniser=f'cp /dev/stdin {got}; echo; echo " turn on  the light"; echo [noise]'))
    shown = shown_by(one)
    colours: list[tuple[int, ...]] = []
    one.watch_shown(lambda _: colours.append(tuple(int(pins.pin(n).state) for n in (5, 6, 7))))
    press(pins.pin(4), HELD)
    wait(lambda: clerk.answered)
    (job,) = clerk.answered
    assert job.request.turns[-1].content == "Somebody said: turn on the light"
    assert job.request.source == "trigger:ask"
    phases = [s.phase for s in shown]
    assert phases[:3] == ["idle", "listening", "understanding"]
    assert "heard: turn on the light" in [s.notice for s in shown]
    data = got.read_bytes()
    samples = (len(data) - 44) // 2
    assert data[:4] == b"RIFF" and data[8:12] == b"WAVE" and data[44:48] == b"\0\1\0\2"
    assert 10 < samples < 16_000


def test_a_muted_microphone_is_cut(pins: MockFactory, appliance: Make, jobs: Jobs, tmp_path: Path) -> None:
    """A press records nothing while it is muted, and muting ends a recording, whose sound is dropped."""
    alive, understood = tmp_path / "alive", tmp_path / "understood"
    text = talk(microphone=f"echo $$ > {alive}; {SPEAK}", recogniser=f"touch {understood}; echo x")
    one = appliance("mute_pin: 9" + text)
    press(pins.pin(9), 0.1)
    press(pins.pin(4), HELD)
    assert one.muted and not alive.exists()
    press(pins.pin(9), 0.1)
    pins.pin(4).drive_low()
    wait(lambda: one.status().phase == "listening" and alive.exists() and alive.read_text())
    press(pins.pin(9), 0.1)
    wait(lambda: not Path(f"/proc/{alive.read_text().strip()}").exists())
    wait(lambda: one.status().phase == "muted")
    pins.pin(4).drive_high()
    time.sleep(0.2)
    assert not understood.exists() and jobs.waiting == 0


def test_a_press_stops_the_answer_and_a_tap_does_no_more(
    pins: MockFactory, appliance: Make, jobs: Jobs, tmp_path: Path
) -> None:
    appliance(talk())
    clerk = Clerk(jobs, words=["A long ", "answer."], paced=True)
    press(pins.pin(4), HELD)
    wait(lambda: jobs.running)
    press(pins.pin(4), 0.02)
    wait(lambda: jobs.recent(1)[0].state is State.CANCELLED)
    time.sleep(0.2)
    assert jobs.waiting == 0 and not jobs.running and len(jobs.recent(9)) == 1
    clerk.close()


@pytest.mark.parametrize(
    ("records", "recogniser", "more", "said"),
    [
        ("echo arecord: audio open error: No such device >&2", "", "",
         "the microphone gives nothing: arecord: audio open error: No such device"),
        (r"head -c 90000 /dev/zero; sleep 9", "", "", "the microphone gives silence; alsamixer shows whether it is"),
        (SPEAK, "exit 3", "", "the recogniser failed with 3: sh; it may use 64M of RAM"),
        (SPEAK, "sleep 60", "timeout: 0.2", "the recogniser took more than 0.2 s: sh"),
        (SPEAK, "exec 1>&-; sleep 60", "timeout: 0.2", "the recogniser took more than 0.2 s: sh"),
        (SPEAK, "yes", "", "the recogniser prints more than text: sh"),
        (SPEAK, "echo [BLANK_AUDIO]", "", "nothing was understood in"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_a_sentence(
    records: str, recogniser: str, more: str, said: str,
    pins: MockFactory, appliance: Make, jobs: Jobs, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """To people each time, in the log once; and the next press works as before."""
    caplog.set_level(logging.INFO)
    shown = shown_by(appliance(talk(records, recogniser, more)))
    for count in range(2 if "3" in recogniser else 1):
        press(pins.pin(4), HELD)
        wait(lambda count=count: len([s for s in shown if s.notice.startswith(said)]) == count + 1)  # type: ignore[misc]
    assert caplog.text.count(said) == 1
    assert (Phase.ERROR in [s.phase for s in shown]) is said.startswith("the")
    assert jobs.waiting == 0


def test_a_recogniser_that_takes_too_much_memory_fails() -> None:
    """So the budget holds: the plan counts what hearing may take."""
    hearing = parse(talk()).hearing
    assert hearing is not None
    assert hearing.held == (64 << 20) + 2 * 15 * 32_000 + (6 << 20)
    greedy = ["python3", "-c", "import sys; sys.stdin.buffer.read(); x = bytearray({} << 20); print('heard')"]

    def heard(mib: int) -> str:
        command = [part.format(mib) for part in greedy]
        return ByProgram(Program(command=command), hearing).recognise(wav(bytes(32_000)), lambda: True)

    assert words(heard(8)) == "heard"
    with pytest.raises(NotHeard, match="the recogniser failed with 1: python3; it may use 64M of RAM"):
        heard(100)


def test_a_recording_is_bounded(pins: MockFactory, appliance: Make, clerk: Clerk, tmp_path: Path) -> None:
    """It is understood while the button is still held."""
    got = tmp_path / "got.wav"
    appliance(talk("cat /dev/urandom", f"cp /dev/stdin {got}; echo heard", "most: 1"))
    pins.pin(4).drive_low()
    wait(lambda: clerk.answered)
    assert got.stat().st_size == 44 + 32_000


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "triggers: [{kind: talk, name: a, pin: 4}]",
            "trigger 'a', kind: a trigger of kind talk needs `hear",
        ),
        (
            "hearing: {memory: 1K, recogniser: {kind: program, command: [x]}}",
            "hearing.memory: '1K' is not a size",
        ),
        ("hearing: {memory: 1M, recogniser: {kind: program, command: []}}", "command"),
        ("hearing: {memory: 1M, most: 61, recogniser: {kind: program, command: [x]}}", "most.*60"),
        ("hearing: {memory: 1M, recogniser: {kind: magic, command: [x]}}", "kind"),
    ],
)
def test_a_wrong_configuration_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse(text)


def test_the_sandbox_opens_the_sound_card_and_a_reload_keeps_the_planned_memory(
    pins: MockFactory, appliance: Make
) -> None:
    assert needed_devices(parse(talk())) == ["char-alsa", "char-gpiochip"]
    one = appliance(talk())
    one.reload(parse(talk().replace("64M", "640M")))
    assert one.settings.hearing is not None and one.settings.hearing.memory == "64M"
    other = appliance("triggers: []")
    with pytest.raises(ConfigError, match="hearing is new, and its memory is planned at a start: restart flashd"):
        other.reload(parse(talk()))


def test_a_console_shows_what_is_heard(
    pins: MockFactory, appliance: Make, clerk: Clerk, cable: Cable, terminal: Terminal
) -> None:
    appliance(talk() + f"serial: [{{name: c, port: {cable.ours}}}]")
    terminal.expect("> ")
    press(pins.pin(4), HELD)
    terminal.expect("(listening)")
    terminal.expect("(heard: turn on the light)")
    terminal.expect("> ")


@pytest.mark.voice
def test_sherpa_understands_in_a_process_that_keeps_to_its_memory(tmp_path: Path) -> None:
    """The real sherpa-onnx. The process stays; if it is killed or nobody waits any longer, another one goes on."""
    pytest.importorskip("sherpa_onnx")
    settings = Sherpa(model="zipformer-ctc", folder=str(recogniser(tmp_path / "tones")), threads=1)
    heard_by = BySherpa(settings, hearing_with(settings, "192M"))
    assert heard_by.recognise(wav(tones(300, 4000, 300)), lambda: True) == "LOW HIGH LOW"
    process = heard_by._process
    assert process is not None and heard_by.recognise(wav(tones(4000)), lambda: True) == "HIGH"
    assert heard_by._process is process
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert f"Max data size             {192 << 20} " in limits
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(NotHeard, match="sherpa-onnx ended"):
        heard_by.recognise(wav(tones(300)), lambda: True)
    assert heard_by.recognise(wav(tones(300)), lambda: True) == "LOW"
    with pytest.raises(NotHeard):
        heard_by.recognise(wav(tones(300)), lambda: False)
    assert heard_by.recognise(wav(tones()), lambda: True) == ""
    heard_by.close()
    little = BySherpa(settings, hearing_with(settings, "8M"))
    with pytest.raises(NotHeard, match="sherpa-onnx ended: "):
        little.recognise(wav(tones(300)), lambda: True)


def hearing_with(settings: Sherpa, memory: str) -> Hearing:
    return Hearing(memory=memory, recogniser=settings)


def test_a_model_s_files_are_found_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the models in sherpa-onnx's collection have them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    wanted = Sherpa(model="whisper", folder=str(tmp_path), language="en")
    for name in ("tiny.en-encoder.onnx", "tiny.en-encoder.int8.onnx", "tiny.en-decoder.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(InputMissing, match=r"a model of kind whisper has the files \*encoder\*\.onnx"):
        made_of(wanted)
    file = f"hearing: {{memory: 90M, recogniser: {{kind: sherpa, model: whisper, folder: {tmp_path}}}}}"
    with pytest.raises(ConfigError, match=r"line 1: hearing.recogniser: .*not all are there"):
        parse(file, check=check)
    (tmp_path / "tiny.en-tokens.txt").touch()
    make, arguments = made_of(wanted)
    assert (make, arguments.pop("num_threads"), arguments.pop("language")) == ("from_whisper", 2, "en")
    assert {name: Path(path).name for name, path in arguments.items()} == {
        "encoder": "tiny.en-encoder.int8.onnx", "decoder": "tiny.en-decoder.onnx", "tokens": "tiny.en-tokens.txt",
    }  # fmt: skip


SENTENCES = "turn on the light", "what is the temperature", "how are you today"
MOST_WRONG = 1
"""Words. Each of them was right when this was written; with no grammar, not one was."""


@pytest.mark.slow
@pytest.mark.voice
@pytest.mark.skipif(
    not all(map(shutil.which, ("espeak-ng", "pocketsphinx_continuous", "arecord"))),
    reason="needs Debian's espeak-ng, pocketsphinx, pocketsphinx-en-us and alsa-utils",
)
def test_speech_comes_through_alsa_and_is_understood(
    pins: MockFactory, appliance: Make, clerk: Clerk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """espeak-ng speaks into a file, ALSA's file plugin gives it to arecord, and pocketsphinx understands it."""
    grammar, sound, alsa = tmp_path / "sentences.gram", tmp_path / "sound.raw", tmp_path / "asound.conf"
    grammar.write_text(f"#JSGF V1.0; grammar s; public <s> = {' | '.join(SENTENCES)};")
    alsa.write_text(
        "</usr/share/alsa/alsa.conf>\n"
        f"pcm.!default {{ type file; slave.pcm null; file /dev/null; infile {sound}; format raw }}"
    )
    monkeypatch.setenv("ALSA_CONFIG_PATH", str(alsa))
    command = ["pocketsphinx_continuous", "-infile", "/dev/stdin", "-logfn", "/dev/null", "-jsgf", str(grammar)]
    one = appliance(f"""
hearing: {{memory: 256M, most: 4, recogniser: {{kind: program, command: {json.dumps(command)}}}}}
triggers: [{{kind: talk, name: ask, pin: 4, bounce: 0}}]
""")
    for count, sentence in enumerate(SENTENCES, 1):
        sound.write_bytes(spoken(sentence))
        pins.pin(4).drive_low()
        wait(lambda: one.status().phase == "understanding")
        pins.pin(4).drive_high()
        wait(lambda count=count: len(clerk.answered) == count)  # type: ignore[misc]
    heard = [job.request.turns[-1].content for job in clerk.answered]
    assert sum(map(word_errors, SENTENCES, heard)) <= MOST_WRONG, heard


def test_word_errors_are_counted() -> None:
    assert word_errors("turn on the light", "turn the lights on") == 3
    assert word_errors("a b", "") == 2 and word_errors("", "a") == 1 and word_errors("a b c", "a b c") == 0
