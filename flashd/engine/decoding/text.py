"""Text to tokens and back: chat template, tokenizer, and the stream of answers in whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from flashd.bundle.token_bytes import TokenBytes
from flashd.errors import DataError, PromptTooLong, UsageError
from flashd.system.freed_memory import give_back_freed_memory

BREAK = "\ue000\ue001\ue000"
"""Private-use characters that part text where a control token must not form."""

PART, LOST_AT_A_CUT = 8192, 16
"""Characters of a long text whose tokens are counted at once, and the tokens that two parts might have in common."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. Raises UsageError for a role that is none of ROLES."""

    role: str
    content: str

    def __post_init__(self) -> None:
        # templates put the role between control tokens: any other text could forge one
        if self.role not in ROLES:
            raise UsageError(f"role {self.role!r} is not known; allowed are {', '.join(ROLES)}")


class Encoder:
    """Text to token ids, through the tokenizers library.

    Raises DataError where the bundle's tokenizer cannot be read.
    """

    def __init__(self, tokenizer_json: bytes, bos: int | None, add_bos: bool, eos: Sequence[int] = ()) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except ValueError as error:
            raise DataError(f"the bundle's tokenizer cannot be read ({error}); pack it again") from error
        self._first = [bos] if add_bos and bos is not None else []
        # what templates call so; the model's own end is the first of its ends
        self.bos_token, self.eos_token = self._spelt(bos), self._spelt(next(iter(eos), None))
        self.unk_token = str(getattr(self._tokenizer.model, "unk_token", None) or "")
        self._controls = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        give_back_freed_memory()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Control tokens in it are tokens: give it no text of a stranger's."""
        return self._first + list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of a text that a model says: no token that begins a text, and none that controls."""
        return self.encode_plain(text)[len(self._first) :]

    def encode_plain(self, text: str) -> list[int]:
        """The tokens of a stranger's text as it stands: what spells a control token is only text."""
        return self.encode_guarded(self.guarded(text))

    def guarded(self, text: str) -> str:
        """A stranger's text to put into a template: what spells a control token in it, or might with what
        follows, is broken up by BREAK. Other text is left as it is."""
        text = text.replace(BREAK, "")
        for control in self._controls:
            text = text.replace(control, control[0] + BREAK + control[1:])
        begun = any(text.endswith(control[:n]) for control in self._controls for n in range(1, len(control)))
        return text + BREAK if begun else text

    def encode_guarded(self, text: str) -> list[int]:
        """The tokens of a text with guarded parts: the control tokens outside of them are tokens."""
        parts = text.split(BREAK)
        ids = [i for p in parts for i in self._tokenizer.encode(p, add_special_tokens=False).ids]
        # many a template begins with the token itself
        return ids if self._first and ids[:1] == self._first else self._first + ids

    def check_length(self, texts: Sequence[str], room: int) -> None:
        """Raises PromptTooLong where long texts have more than `room` tokens, however they are put together.

        They are counted in parts: the tokenizer holds some 500 bytes for each token of what it is given at once.
        """
        parts = [text[i : i + PART] for text in texts for i in range(0, len(text), PART)]
        if sum(map(len, parts)) <= PART:
            return
        tokens = 0
        for part in parts:
            tokens += max(0, len(self._tokenizer.encode(part, add_special_tokens=False).ids) - LOST_AT_A_CUT)
            if tokens > room:
                raise PromptTooLong(None, room)

    def _spelt(self, token: int | None) -> str:
        return (self._tokenizer.id_to_token(token) or "") if token is not None else ""


class ChatTemplate:
    """A model's chat template in Jinja's sandbox. Raises DataError where it is broken or reaches out."""

    def __init__(self, source: str) -> None:
        from flashd.system.chat_template import chat_template, chat_values
        from flashd.system.template import TemplateFails

        self._template, self._values, self._error = chat_template(source), chat_values, TemplateFails
        try:
            self._template.names()
        except TemplateFails as error:
            raise DataError(f"the bundle's chat template is broken: {error}") from error

    def render(
        self, messages: Sequence[Message], bos_token: str = "", eos_token: str = "", unk_token: str = ""
    ) -> str:
        """The text that asks the model for the next answer."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._template.render(self._values(turns, bos_token, eos_token, unk_token))
        except self._error as error:
            raise DataError(f"the bundle's chat template fails: {error}") from error

    def encode(self, messages: Sequence[Message], encoder: Encoder) -> list[int]:
        """The tokens of the rendered messages, in which only the template's own control tokens count."""
        guarded = [Message(m.role, encoder.guarded(m.content)) for m in messages]
        return encoder.encode_guarded(self.render(guarded, encoder.bos_token, encoder.eos_token, encoder.unk_token))


class Detokenizer:
    """Tokens to text, holding back bytes until they make whole characters."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """What may be shown now that `token` has come."""
        return self._decoder.decode(self._token_bytes[token])

    def finish(self) -> str:
        """What was held back; bytes that make no character become U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Ends a text before the first of some strings, holding back what might begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop string has come).

        The stop string that is complete first ends the text, the longest of those that are complete together.
        """
        shown = ""
        for character in text:
            self._held += character
            complete = max((len(s) for s in self._stops if self._held.endswith(s)), default=0)
            if complete:
                shown, self._held = shown + self._held[:-complete], ""
                return shown, True
            cut = len(self._held) - max((self._overlap(s) for s in self._stops), default=0)
            shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """The length of the longest end of the held text that `stop` begins with."""
        return next(
            (n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0
        )
