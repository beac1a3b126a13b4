"""Text to tokens and back: chat template, tokenizer, and the stream of answers in whole characters."""

from __future__ import annotations

import codecs
import ctypes
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from flashd.bundle.token_bytes import TokenBytes
from flashd.errors import DataError


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. role: system, user or assistant."""

    role: str
    content: str


class Encoder:
    """Text to token ids, through the tokenizers library.

    Raises DataError where the bundle's tokenizer cannot be read.
    """

    def __init__(self, tokenizer_json: bytes, bos: int | None, add_bos: bool) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except ValueError as error:
            raise DataError(f"the bundle's tokenizer cannot be read ({error}); pack it again") from error
        self._first = [bos] if add_bos and bos is not None else []
        give_back_freed_memory()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Control tokens in it are tokens: give it no text of a stranger's."""
        return self._first + list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with(self, template: str, contents: dict[str, str]) -> list[int]:
        """The tokens of `template` with each key of `contents` in it replaced by its value.

        A value cannot forge control tokens: where it spells one, it is encoded apart and as plain text.
        """
        forged = [k for k, v in contents.items() if self._spells_control(v)]
        text = template
        for key, value in contents.items():
            if key not in forged:
                text = text.replace(key, value)
        tokens, rest = list(self._first), text
        for key in forged:
            before, _, rest = rest.partition(key)
            tokens += self._plain(before) + self._harmless(contents[key])
        return tokens + self._plain(rest)

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _spells_control(self, text: str) -> bool:
        return any(t.content in text for t in self._tokenizer.get_added_tokens_decoder().values() if t.special)

    def _harmless(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        try:
            return self._plain(text)
        finally:
            self._tokenizer.encode_special_tokens = False


def give_back_freed_memory() -> None:
    """Returns the C library's free pages to the kernel.

    Loading a vocabulary of 151,000 tokens leaves 98 MiB resident, of which 51 are free: on a small board
    that is an eighth of the budget.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


class ChatTemplate:
    """A model's chat template in Jinja's sandbox. Raises DataError where it is broken or reaches out."""

    def __init__(self, source: str) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._error: type[Exception] = jinja2.TemplateError
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"the bundle's chat template is broken: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The text that asks the model for the next answer."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, bos_token="", eos_token="")
        except (self._error, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(f"the bundle's chat template fails: {error}") from error

    def encode(self, messages: Sequence[Message], encoder: Encoder) -> list[int]:
        """The tokens of the rendered messages, in which only the template's own control tokens count."""
        contents = {f"\ue000{secrets.token_hex(8)}\ue001": m.content for m in messages}
        marked = [Message(m.role, key) for m, key in zip(messages, contents, strict=True)]
        return encoder.encode_with(self.render(marked), contents)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


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
        """(what may be shown, whether a stop string has come)."""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(s) for s in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
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
