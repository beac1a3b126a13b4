"""Answers of a model that says in which channel it speaks, as gpt-oss does in OpenAI's harmony format.

    <|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>

What is not final is told apart as other families tell their thoughts apart: between <think> and </think>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flashd.bundle.header import Channels
from flashd.bundle.token_bytes import TokenBytes
from flashd.engine.decoding.text import Detokenizer

FINAL = "final"
OPENS, CLOSES = "<think>\n", "\n</think>\n\n"


class ChannelWords:
    """A Detokenizer that leaves out what the control tokens frame, and says what is a thought."""

    def __init__(self, token_bytes: TokenBytes, channels: Channels) -> None:
        self._token_bytes, self._channels = token_bytes, channels
        self._words = Detokenizer(token_bytes)
        self._head: Detokenizer | None = None  # while the name of a channel is said
        self._name = ""
        self._thinks = False

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that can be shown now."""
        c = self._channels
        if token in (c.start, c.end):
            self._head, self._name = Detokenizer(self._token_bytes), ""
            return self._words.finish(cut=True)
        if token == c.channel:
            ended = "" if self._head else self._words.finish(cut=True)
            self._head, self._name = Detokenizer(self._token_bytes), ""
            return ended
        if token == c.message:
            return self._begun()
        if self._head is None:
            return self._words.push(token)
        self._name += self._head.push(token)
        return ""

    def finish(self, cut: bool = False) -> str:
        """The text that was held back, see Detokenizer.finish. Thoughts that were cut stay open."""
        return self._words.finish(cut)

    def _begun(self) -> str:
        """A message begins: what its channel opens, or closes."""
        self._head = None
        thinks = self._name.split()[:1] != [FINAL]  # behind the name may stand whom it is for
        before, self._thinks = self._thinks, thinks
        if thinks == before:
            return "\n\n" if thinks else ""
        return OPENS if thinks else CLOSES


def words(
    token_bytes: TokenBytes, channels: Channels | None, shown: Mapping[int, bytes] | None = None
) -> Detokenizer | ChannelWords:
    """What turns the tokens of an answer into text. `shown`: see Detokenizer; it has the tokens that frame channels,
    if a grammar says what is in them."""
    return ChannelWords(token_bytes, channels) if channels and not shown else Detokenizer(token_bytes, shown)


def answering(prompt: Sequence[int], channels: Channels | None) -> list[int]:
    """A prompt whose answer follows at once, without thoughts: a grammar or choices say what comes."""
    if channels is None or list(prompt[-len(channels.opens) :]) != channels.opens:
        return list(prompt)
    return [*prompt, *channels.final]


def without_thoughts(text: str) -> str:
    """What the model said, as it is told it again: without the thoughts in front of it."""
    return text.split(CLOSES, 1)[1] if text.startswith(OPENS) and CLOSES in text else text
