"""Settings of what hears: the microphone's program, and what understands speech."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from flashd.config.fields import Positive, Size, Strict
from flashd.system.memory import MIB, parse_size

RATE = 16_000
"""Samples a second."""

SAMPLE_BYTES = 2

MICROPHONE_BYTES = 6 * MIB
"""What arecord takes of its own."""

Command = Annotated[list[str], msgspec.Meta(min_length=1)]


class Recogniser(Strict, tag_field="kind", frozen=True, kw_only=True):
    """What makes text of speech."""


class Program(Recogniser, tag="program", frozen=True, kw_only=True):
    """A program that gets a WAV file on standard input and prints what was said."""

    command: Command
    """The program and its arguments. It may open its standard input as /dev/stdin, and seek in it."""


AnyRecogniser = Program


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
        return self.limit + 2 * self.recorded + MICROPHONE_BYTES
