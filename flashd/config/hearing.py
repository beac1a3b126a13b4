"""Settings of what hears: the microphone's program, and what understands speech."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from flashd.config.fields import Absolute, Positive, Size, Strict
from flashd.system.memory import MIB, parse_size

RATE = 16_000
"""Samples a second."""

SAMPLE_BYTES = 2

MICROPHONE_BYTES = 6 * MIB
"""What arecord takes of its own, and aplay."""

Command = Annotated[list[str], msgspec.Meta(min_length=1)]


class Recogniser(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What makes text of speech."""


class Program(Recogniser, tag="program", frozen=True, kw_only=True):
    """A program that gets a WAV file on standard input and prints what was said."""

    command: Command
    """The program and its arguments. It may open its standard input as /dev/stdin, and seek in it."""


class Sherpa(Recogniser, tag="sherpa", frozen=True, kw_only=True):
    """sherpa-onnx, which keeps a model in RAM all the time. It needs the voice extra."""

    model: Literal["moonshine", "whisper", "zipformer", "zipformer-ctc", "sense-voice"]
    """The kind of model."""
    folder: Absolute
    """The folder with the model's files, called as in sherpa-onnx's collection of models."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    """Processors that it uses while it works."""
    language: Annotated[str, msgspec.Meta(pattern="^[a-z]{2,3}$", description="a language, such as en")] | None = None
    """The language of speech, for whisper and sense-voice. Without this key they guess."""

    def __post_init__(self) -> None:
        if self.language is not None and self.model not in ("whisper", "sense-voice"):
            raise ValueError(f"a model of kind {self.model} knows one language: leave out language")


AnyRecogniser = Program | Sherpa


class Listener(Strict, frozen=True, kw_only=True):
    """What hears that somebody speaks: sherpa-onnx in a process of its own. It needs the voice extra."""

    memory: Size
    """RAM that it may take, such as 96M. flashd takes it from its own memory."""
    vad: Absolute | None = None
    """The file of Silero's detector of speech, silero_vad.onnx. Without this key it is the silero-vad package's."""
    pause: Annotated[float, msgspec.Meta(ge=0.2, le=5)] = 0.8
    """Seconds of silence that end what is said."""
    spotter: Absolute | None = None
    """The folder of a model that spots keywords, called as in sherpa-onnx's collection. Wake words need it."""
    threshold: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.25
    """How sure the spotter must be of a wake word. With more it misses more, and takes less for one that is none."""
    tone: Command | None = None
    """The program that plays a short tone when a wake word was heard, such as [aplay, -q].

    flashd writes a WAV file to its standard input. If this key is missing, flashd plays nothing.
    """

    @property
    def limit(self) -> int:
        """Bytes that it may have."""
        return parse_size(self.memory)


class Hearing(Strict, frozen=True, kw_only=True):
    """How speech is recorded and understood for triggers of kind talk. Nothing of it is kept on the card."""

    # kinds of devices that systemd is to allow, as DeviceAllow= names them
    needs: ClassVar[tuple[str, ...]] = ("char-alsa",)
    recogniser: AnyRecogniser
    """What understands speech."""
    memory: Size
    """RAM that the recogniser may take, such as 200M.

    flashd takes it from its own memory, so the model gets less. A recogniser that wants more fails.
    """
    microphone: Command = msgspec.field(
        default_factory=lambda: ["arecord", "-q", "-t", "raw", "-f", "S16_LE", "-r", str(RATE), "-c", "1"]
    )
    """The program that records.

    It writes samples of 16 bits to standard output, 16,000 a second, of one channel and without a header, until it is
    ended.
    """
    most: Annotated[float, msgspec.Meta(ge=1, le=60)] = 15.0
    """Seconds that are recorded at the most."""
    timeout: Positive = 60.0
    """Seconds after which the recogniser is ended."""
    listener: Listener | None = None
    """What hears wake words and the end of speech. Without this key nothing listens but while a button is held."""

    @property
    def limit(self) -> int:
        """Bytes that the recogniser may have."""
        return parse_size(self.memory)

    @property
    def recorded(self) -> int:
        """Bytes that are recorded at the most."""
        return round(self.most * RATE) * SAMPLE_BYTES

    @property
    def held(self) -> int:
        """Bytes that hearing may take in all; what is recorded is there twice while it is understood."""
        listener = self.listener.limit if self.listener else 0
        tone = MICROPHONE_BYTES if self.listener and self.listener.tone else 0
        return self.limit + listener + 2 * self.recorded + MICROPHONE_BYTES + tone
