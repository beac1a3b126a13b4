"""What every kind of recogniser offers."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Callable

from flashd.config.hearing import RATE, SAMPLE_BYTES
from flashd.errors import FlashdError

MOST_TEXT = 4096
"""Characters that are taken of what a recogniser prints."""

NOTE = re.compile(r"[\[(<][^\])>]*[\])>]")
"""What is not speech, as recognisers write it: [BLANK_AUDIO], (wind), <sil>."""


class NotHeard(FlashdError):
    """Nothing was understood. The text is a sentence for whoever spoke."""


class NothingSaid(NotHeard):
    """Everything works, and there were no words."""


class Recogniser:
    """Makes text of speech. It is called by one thread at a time.

    A kind of recogniser is a subclass, made from its settings and those of hearing.
    """

    def recognise(self, sound: bytes, wanted: Callable[[], bool]) -> str:
        """What was said, in one line.

        Args:
            sound: a WAV file: 16 bits, 16,000 samples a second, one channel.
            wanted: whether anybody waits for it. If nobody does, the text means nothing.

        Raises NotHeard if it fails or takes too long.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what it holds."""


def wav(samples: bytes) -> bytes:
    """The file that recognisers are given."""
    with io.BytesIO() as file:
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(SAMPLE_BYTES)
            sound.setframerate(RATE)
            sound.writeframes(samples)
        return file.getvalue()


def words(printed: str) -> str:
    """What was said of what a recogniser prints: one line, without notes of noises."""
    spoken = NOTE.sub(" ", printed[:MOST_TEXT])
    return " ".join("".join(c if c.isprintable() else " " for c in spoken).split())
