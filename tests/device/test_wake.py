"""Wake words and the end of speech: the real sherpa-onnx on a spotter of tones, and Silero's real detector."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import signal
import time
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gpiozero.pins.mock import MockFactory

from device.appliance import Appliance
from device.controls import Shown
from device.hearing import ears, listener, listener_process, talk
from device.hearing.listener import Listener
from device.hearing.recogniser import NotHeard
from device.hearing.tone import HERTZ, SECONDS, Tone
from device.hearing.tone import sound as sound_of_tone
from flashd.check_config import check
from flashd.config.hearing import RATE
from flashd.config.hearing import Listener as Settings
from flashd.config.settings import parse
from flashd.daemon.job import State
from flashd.daemon.jobs import Jobs
from flashd.errors import ConfigError
from tests.daemon.fake_worker import Clerk
from tests.device.conftest import press
from tests.device.tones import silence, spoken, spotter, tones
from tests.waiting import wait

Make = Callable[..., Appliance]

hears = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sherpa_onnx", "silero_vad"))) or not shutil.which("espeak-ng"),
    reason="needs the voice extra, pip install --no-deps silero-vad, and Debian's espeak-ng",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return spotter(tmp_path / "spotter")


def awake(
    folder: Path, sound: bytes, how: str = "wake: [▁LOW ▁HIGH]", listens: str = "memory: 192M, pause: 0.4"
) -> str:
    """A configuration whose microphone gives some sound once, at ten times its speed, and is still from then on."""
    speaks(folder, sound)
    pieces = f"for i in $(seq 400); do head -c 6400; sleep 0.02; done < {folder}/sound"
    once = f"echo $$ >> {folder}/starts; if mkdir {folder}/given 2>/dev/null; then {pieces}; fi; exec sleep 60"
    return f"""
mute_pin: 9
hearing:
  memory: 64M
  microphone: [sh, -c, "{once}"]
  recogniser: {{kind: program, command: [sh, -c, 'cp /dev/stdin {folder}/got.wav; echo turn on the light']}}
  listener: {{{listens}, spotter: {folder}}}
triggers:
  - {{kind: talk, name: ask, {how}}}
outputs: [{{kind: rgb, red: 5, green: 6, blue: 7}}]
"""


def speaks(folder: Path, sound: bytes) -> None:
    """The microphone gives this when it is started next."""
    (folder / "sound").write_bytes(sound)
    if (folder / "given").exists():
        (folder / "given").rmdir()


def starts(folder: Path) -> list[str]:
    """The processes of the microphone's program so far."""
    return (folder / "starts").read_text().split() if (folder / "starts").exists() else []


def heard_seconds(folder: Path) -> float:
    return ((folder / "got.wav").stat().st_size - 44) / (2 * RATE)


@hears
@pytest.mark.slow
@pytest.mark.voice
def test_what_follows_a_wake_word_is_asked(
    pins: MockFactory, appliance: Make, clerk: Clerk, folder: Path, tmp_path: Path
) -> None:
    """The silence behind what was said is not recorded. A button on the same trigger works."""
    said = spoken("turn on the light")
    sound = silence(1) + tones(4000, 300) + silence(2) + tones(300, 4000) + said + silence(30)
    tone = f"memory: 192M, pause: 0.4, tone: [sh, -c, 'cat > {folder}/tone.wav']"
    one = appliance(awake(folder, sound, "wake: [▁HIGH ▁HIGH, ▁LOW ▁HIGH], pin: 4, bounce: 0", tone))
    shown: list[Shown] = []
    one.watch_shown(shown.append)
    wait(lambda: clerk.answered)
    (job,) = clerk.answered
    assert job.request.turns[-1].content == "turn on the light" and job.request.source == "trigger:ask"
    assert [s.phase for s in shown][:3] == ["idle", "listening", "understanding"]
    assert len(said) / (2 * RATE) - 0.7 < heard_seconds(folder) < len(said) / (2 * RATE) + 0.7
    assert (folder / "tone.wav").read_bytes() == sound_of_tone()
    wait(lambda: len(starts(folder)) == 2)
    speaks(folder, said)
    pins.pin(4).drive_low()
    wait(lambda: one.status().phase == "listening")
    time.sleep(ears.LEAST_SECONDS)
    pins.pin(4).drive_high()
    wait(lambda: len(clerk.answered) == 2)
    assert heard_seconds(folder) == pytest.approx(len(said) / (2 * RATE))


def test_a_tone_is_a_tone_and_its_failure_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tone = Tone(["sh", "-c", f"cat > {tmp_path}/heard.wav; exit 3"])
    for _ in range(2):
        tone.play()
        wait(lambda: not tone._playing.locked())
    assert [record.message.split(";")[0] for record in caplog.records] == ["tone: sh ended with 3"]
    with wave.open(f"{tmp_path}/heard.wav") as file:
        samples = np.frombuffer(file.readframes(RATE), "<i2")
    assert len(samples) == round(SECONDS * RATE) and samples[0] == samples[-1] == 0
    assert np.argmax(np.abs(np.fft.rfft(samples))) * RATE / len(samples) == pytest.approx(HERTZ, abs=7)


@hears
@pytest.mark.slow
@pytest.mark.voice
def test_a_muted_board_listens_for_no_word(pins: MockFactory, appliance: Make, jobs: Jobs, folder: Path) -> None:
    """Muting ends the microphone's program. A word stops the answer that is still being made, as a press does."""
    one = appliance(awake(folder, tones(300, 4000) + spoken("turn on the light") + silence(2)))
    clerk = Clerk(jobs, words=["A long ", "answer."], paced=True)
    wait(lambda: jobs.running and len(starts(folder)) == 2)
    press(pins.pin(9), 0.1)
    wait(lambda: one.muted and not Path(f"/proc/{starts(folder)[1]}").exists())
    (folder / "given").rmdir()
    time.sleep(3 * talk.LOOK_SECONDS)
    assert len(starts(folder)) == 2
    press(pins.pin(9), 0.1)
    wait(lambda: jobs.recent(2)[-1].state is State.CANCELLED)
    clerk.close()


@hears
@pytest.mark.slow
@pytest.mark.voice
def test_a_tap_records_until_speech_ends(
    pins: MockFactory, appliance: Make, clerk: Clerk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or until another tap. If nobody speaks, that is said, and nothing is asked."""
    said = spoken("turn on the light")
    one = appliance(awake(folder, said + silence(30), "pin: 4, bounce: 0, tap: true", "memory: 192M"))
    shown: list[Shown] = []
    one.watch_shown(shown.append)
    press(pins.pin(4), 0.05)
    wait(lambda: clerk.answered)
    assert heard_seconds(folder) < len(said) / (2 * RATE) + 1.2
    speaks(folder, said[: len(said) // 4 * 2])  # in the middle of a word, so no end of speech comes before the tap
    press(pins.pin(4), 0.05)
    wait(lambda: one.status().phase == "listening" and (folder / "given").exists())
    time.sleep(0.2)
    press(pins.pin(4), 0.05)
    wait(lambda: len(clerk.answered) == 2)
    speaks(folder, silence(listener.SPEAKS_WITHIN + 1))
    press(pins.pin(4), 0.05)
    wait(lambda: "nobody spoke within 5 s" in [s.notice for s in shown])
    assert len(clerk.answered) == 2


@hears
@pytest.mark.slow
@pytest.mark.voice
def test_what_goes_wrong_is_logged_and_tried_again(
    pins: MockFactory, appliance: Make, clerk: Clerk, folder: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(talk, "AGAIN_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    sound = tones(300, 4000) + spoken("turn on the light") + silence(2)
    text = awake(folder, sound).replace("exec sleep 60", "exec sleep 0.2")
    one = appliance(text)
    shown: list[Shown] = []
    one.watch_shown(shown.append)
    wait(lambda: len(clerk.answered) == 1)
    wait(lambda: Shown("error", "the microphone gives nothing: sh") in shown)
    assert one._ears is not None and one._ears._listener is not None
    process = one._ears._listener._process
    assert process is not None
    assert f"Max data size             {192 << 20} " in Path(f"/proc/{process.pid}/limits").read_text()
    os.kill(process.pid, signal.SIGKILL)
    (folder / "given").rmdir()
    wait(lambda: "sherpa-onnx ended: it may use 192M of RAM" in caplog.text)
    (folder / "given").rmdir()
    wait(lambda: len(clerk.answered) == 2)
    assert caplog.text.count("the microphone gives nothing") == 1
    assert [s.notice for s in shown].count("the microphone gives nothing: sh") == 1


@hears
@pytest.mark.voice
def test_a_word_that_the_spotter_cannot_spell_is_named(folder: Path) -> None:
    one = Listener(Settings(memory="192M", spotter=str(folder)), ["▁LOW ▁MIDDLE"])
    with pytest.raises(NotHeard, match="the spotter cannot spell '▁LOW ▁MIDDLE': its model has no token '▁MIDDLE'"):
        one.word(tones(300), lambda: True, anew=True)
    one.close()


def test_words_are_spelled_by_the_model_s_own_pieces(tmp_path: Path) -> None:
    """Those of sherpa-onnx's English spotter are capitals."""
    sentencepiece = pytest.importorskip("sentencepiece")
    with io.BytesIO() as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["HEY BOARD", "HEY BOARD", "HELLO WORLD", "HELLO"]), model_writer=model,
            vocab_size=20, model_type="bpe", hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        bpe, tokens = tmp_path / "bpe.model", tmp_path / "tokens.txt"
        bpe.write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(bpe))
    tokens.write_text("".join(f"{pieces.id_to_piece(i)} {i}\n" for i in range(len(pieces)) if i))
    (spelled,) = listener_process._spelled(["hey board"], str(tokens), str(bpe))
    assert spelled.replace(" ", "") == "▁HEY▁BOARD" and " " in spelled
    with pytest.raises(SystemExit, match="the spotter cannot spell 'hey you': its model has no token"):
        listener_process._spelled(["hey you"], str(tokens), str(bpe))


HEARING = "hearing: {memory: 8M, recogniser: {kind: program, command: [x]}"
SPOTS = HEARING + ", listener: {memory: 8M, spotter: /nowhere}}\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEARING + "}\ntriggers: [{kind: talk, name: a}]", "has pin, wake or both"),
        (SPOTS + "triggers: [{kind: talk, name: a, wake: [b], tap: true}]", "tap needs pin"),
        (SPOTS + "triggers: [{kind: talk, name: a, wake: ['']}]", "wake has an empty word"),
        (HEARING + "}\ntriggers: [{kind: talk, name: a, pin: 4, tap: true}]", "tap: .*needs `hearing.listener`"),
        (
            HEARING + ", listener: {memory: 8M}}\ntriggers: [{kind: talk, name: a, wake: [b]}]",
            "line 2: trigger 'a', wake: wake words need `hearing.listener` with `spotter`",
        ),
        (SPOTS + "triggers: [{kind: talk, name: a, wake: [b, b]}]", "the wake word 'b' is there twice"),
        (HEARING + ", listener: {memory: 1K}}", "hearing.listener.memory: '1K' is not a size"),
        (HEARING + ", listener: {memory: 8M, pause: 9}}", "pause.*5"),
    ],
)
def test_a_wrong_configuration_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse(text)


def test_files_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a listener's memory is a part of hearing's."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "silero_vad" else name)
    text = "model: /nowhere\n" + SPOTS.replace("{memory: 8M, spotter: /nowhere", f"{{memory: 8M, spotter: {tmp_path}")
    hearing = parse(text).hearing
    assert hearing is not None and hearing.held == (8 << 20) * 2 + 2 * 15 * 32_000 + (6 << 20)
    with pytest.raises(ConfigError, match=r"hearing\.listener: the silero-vad package is not installed"):
        parse(text, check=check)
    text = text.replace("spotter", f"vad: {tmp_path}/vad.onnx, spotter")
    with pytest.raises(ConfigError, match=r"vad\.onnx: this file is not there"):
        parse(text, check=check)
    (tmp_path / "vad.onnx").touch()
    with pytest.raises(ConfigError, match=r"a spotter has the files encoder\*\.onnx.*; not all are there"):
        parse(text, check=check)
    for name in ("encoder-epoch-12.int8.onnx", "decoder-epoch-12.onnx", "joiner-epoch-12.int8.onnx", "tokens.txt"):
        (tmp_path / name).touch()
    parse(text, check=check)
