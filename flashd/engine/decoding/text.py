"""Text to tokens and back: the tokenizer, the chat template, and answers as whole characters up to a stop string."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import wcwidth

from flashd.bundle.token_bytes import TokenBytes
from flashd.bundle.tokenizer_json import ids_of, read
from flashd.engine.decoding.overlap import overlap
from flashd.engine.decoding.reasoning.thoughts import closed
from flashd.engine.decoding.tools.calls import Call, Tool
from flashd.errors import DataError, PromptTooLong, UsageError
from flashd.system.freed_memory import give_back_freed_memory

BREAK = "\ue000\ue001\ue000"
"""Private-use characters. They split text at places where a control token must not form."""

JOINER = "\u200d"
"""It joins emoji to one."""

REGIONAL = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
"""Letters of which two are a flag."""

LONGEST_EMOJI = 32
"""Characters of an emoji with all that belongs to it."""

PIECE, LOST_AT_A_CUT = 8192, 16
"""A long text's tokens are counted in pieces of PIECE characters. A cut adds at most LOST_AT_A_CUT tokens."""

GROWS, LONGEST_GROWN = 16, 2 << 20
"""A tokenizer that may make a text more than GROWS times as long has shorter pieces. No text may become longer than
LONGEST_GROWN characters: the tokenizer holds some 20 bytes for each."""

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. Raises UsageError for a role that is not one of ROLES."""

    role: str
    content: str
    calls: tuple[Call, ...] = ()  # what the assistant called
    call: str = ""  # the id of the call that a tool's message answers
    name: str = ""  # the tool's

    def __post_init__(self) -> None:
        # templates put the role between control tokens: any other text could forge one
        if self.role not in ROLES:
            raise UsageError(f"role {self.role!r} is not known; allowed are {', '.join(ROLES)}")


class TextTokenizer:
    """Turns text into numbers of tokens, with the tokenizers library.

    A stranger's text is text that somebody else wrote, such as a question. It must not form control tokens.

    Args:
        tokenizer_json: the bundle's tokenizer.json.
        bos: the token that begins a text, if the model has one.
        add_bos: whether `bos` begins each text.
        eos: the tokens that end an answer; the first is the model's own.

    Raises DataError if the bundle's tokenizer cannot be read.
    """

    def __init__(self, tokenizer_json: bytes, bos: int | None, add_bos: bool, eos: Sequence[int] = ()) -> None:
        try:
            self._tokenizer, growth = read(tokenizer_json)
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        except (ValueError, DataError) as error:
            raise DataError(f"the bundle's tokenizer cannot be read ({error}); pack it again") from error
        self._piece = PIECE * GROWS // max(GROWS, growth)
        self._first = [bos] if add_bos and bos is not None else []
        # the texts that chat templates know by these names
        self.bos_token, self.eos_token = self.spelt(bos), self.spelt(next(iter(eos), None))
        self.unk_token = str(getattr(self._tokenizer.model, "unk_token", None) or "")
        self.ends = tuple(map(self.spelt, eos))
        added = self._tokenizer.get_added_tokens_decoder()
        self._controls = [t.content for t in added.values() if t.special]
        self._added = {token.content: number for number, token in added.items()}
        give_back_freed_memory()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. What spells a control token becomes one: do not use this for a stranger's text."""
        return self._first + ids_of(self._tokenizer, text)

    def encode_answer(self, text: str) -> list[int]:
        """The tokens of a text that a model says. It has no `bos` and no control tokens."""
        return self.encode_plain(text)[len(self._first) :]

    def encode_plain(self, text: str) -> list[int]:
        """The tokens of a stranger's text. What spells a control token stays text."""
        return self.encode_guarded(self.guarded(text))

    def guarded(self, text: str) -> str:
        """A stranger's text, made ready for a template.

        BREAK splits whatever spells a control token, or could spell one together with what follows. Other text is
        left as it is.
        """
        text = text.replace(BREAK, "")
        for control in self._controls:
            text = text.replace(control, control[0] + BREAK + control[1:])
        begun = any(text.endswith(control[:n]) for control in self._controls for n in range(1, len(control)))
        return text + BREAK if begun else text

    def encode_guarded(self, text: str) -> list[int]:
        """The tokens of a text with guarded parts. What spells a control token outside of these parts becomes one."""
        parts = text.split(BREAK)
        ids = [i for p in parts for i in ids_of(self._tokenizer, p)]
        # many templates begin with this token themselves
        return ids if self._first and ids[:1] == self._first else self._first + ids

    def pieces(self, text: str) -> list[str | int]:
        """A text that a template spells, with the numbers of the added tokens in it in place of what spells them."""
        names = sorted(self._added, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return [self._added.get(part, part) for part in parts if part]

    def check_length(self, texts: Sequence[str], room: int) -> None:
        """Raises PromptTooLong if long texts have more than `room` tokens, however a template joins them.

        They are counted in pieces, because the tokenizer holds some 500 bytes for each token of a text.
        """
        size = self._piece
        parts = [text[i : i + size] for text in texts for i in range(0, len(text), size)]
        if sum(map(len, parts)) <= size:
            return
        tokens = grown = 0
        for part in parts:
            tokens += max(0, len(ids_of(self._tokenizer, part)) - LOST_AT_A_CUT)
            grown += self._grown(part)
            if tokens > room or grown > LONGEST_GROWN:
                raise PromptTooLong(None, room)

    def _grown(self, text: str) -> int:
        """How many characters the tokenizer's first steps make of a text."""
        steps = self._tokenizer.normalizer
        return len(steps.normalize_str(text) if steps is not None else text)

    def spelt(self, token: int | None) -> str:
        """The text of a token as a template spells it. Empty for None."""
        return (self._tokenizer.id_to_token(token) or "") if token is not None else ""


class ChatTemplate:
    """A model's chat template in Jinja's sandbox. Raises DataError if it is broken or reaches out of the sandbox."""

    def __init__(self, source: str) -> None:
        from flashd.system.chat_template import chat_template, chat_values
        from flashd.system.template import TemplateFails

        self._template, self._values, self._error = chat_template(source), chat_values, TemplateFails
        try:
            self._template.names()
        except TemplateFails as error:
            raise DataError(f"the bundle's chat template is broken: {error}") from error

    def render(
        self, messages: Sequence[Message], bos_token: str = "", eos_token: str = "", unk_token: str = "", *,
        tools: Sequence[Tool] = (), prompt: bool = True, think: bool = False, guard: Callable[[str], str] = str,
    ) -> str:  # fmt: skip
        """The text of some messages. Raises DataError if the template fails.

        Args:
            messages: the conversation.
            bos_token: the text of the token that begins a text; so `eos_token` and `unk_token`.
            tools: what the next answer may call.
            prompt: whether the text ends with the beginning of the next answer.
            think: whether the model may think before it answers.
            guard: is given each text that a stranger wrote.
        """
        turns, listed = _turns(messages, guard), [_function(tool, guard) for tool in tools]
        try:
            return self._template.render(self._values(turns, bos_token, eos_token, unk_token, listed, prompt, think))
        except self._error as error:
            raise DataError(f"the bundle's chat template fails: {error}") from error

    def encode(
        self, messages: Sequence[Message], tokenizer: TextTokenizer, tools: Sequence[Tool] = (), think: bool = False
    ) -> list[int]:
        """The tokens of the rendered messages. Only what the template itself spells becomes a control token."""
        t = tokenizer
        text = self.render(messages, t.bos_token, t.eos_token, t.unk_token, tools=tools, think=think, guard=t.guarded)
        return tokenizer.encode_guarded(text if think else closed(text))


def _turns(messages: Sequence[Message], guard: Callable[[str], str]) -> list[dict[str, Any]]:
    """Messages as templates know them.

    Calls are numbered anew, with nine digits: some templates refuse ids of another form, and so a talk has the same
    tokens whatever its client calls them.
    """
    ids: dict[str, str] = {}
    turns = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": guard(message.content)}
        for call in message.calls:
            number = ids.setdefault(call.id, f"{len(ids) + 1:09d}")
            said = {"name": call.name, "arguments": _guarded(json.loads(call.arguments), guard)}
            turn.setdefault("tool_calls", []).append({"id": number, "type": "function", "function": said})
        if message.role == "tool":
            number = ids.setdefault(message.call, f"{len(ids) + 1:09d}")
            turn |= {"tool_call_id": number, "name": guard(message.name)}
        turns.append(turn)
    return turns


def _function(tool: Tool, guard: Callable[[str], str]) -> dict[str, Any]:
    """A tool as templates know it."""
    said = {"name": tool.name, "description": tool.description, "parameters": tool.described}
    return {"type": "function", "function": _guarded(said, guard)}


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """A JSON value whose texts are guarded."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, list):
        return [_guarded(item, guard) for item in value]
    return {guard(key): _guarded(item, guard) for key, item in value.items()} if isinstance(value, dict) else value


class Detokenizer:
    """Turns tokens into text. It holds bytes back until they form whole characters, and an emoji until it is whole.

    An emoji may be several characters: a family is three people with joiners between them, a flag two letters.
    `shown`: the bytes of some tokens, if not those of `token_bytes`.
    """

    def __init__(self, token_bytes: TokenBytes, shown: Mapping[int, bytes] | None = None) -> None:
        self._token_bytes, self._shown = token_bytes, shown or {}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # the last emoji, to which more may belong

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that can be shown now."""
        text = self._held + self._decoder.decode(self._shown.get(token) or self._token_bytes[token])
        self._held = _last_emoji(text)
        return text.removesuffix(self._held)

    def finish(self, cut: bool = False) -> str:
        """The text that was held back.

        Bytes that form no character become U+FFFD. If the answer was cut here, they are left out, and so is half an
        emoji.
        """
        held, self._held = self._held, ""
        if cut:
            return "" if held in REGIONAL else held.rstrip(JOINER)
        return held + self._decoder.decode(b"", final=True)


def _last_emoji(text: str) -> str:
    """The emoji that a text ends with, as far as it has come. Empty if the text ends with something else."""
    if text.isascii():
        return ""
    last = list(wcwidth.iter_graphemes(text[-LONGEST_EMOJI:]))[-1]
    return last if unicodedata.category(last[0]) == "So" else ""


class StopStrings:
    """Ends a text before the first of some strings. It holds back text that might begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes more text. Returns (the text that can be shown now, whether a stop string has come).

        The stop string that is complete first ends the text. Of those complete at the same character it is the
        longest.
        """
        shown = ""
        for character in text:
            self._held += character
            complete = max((len(s) for s in self._stops if self._held.endswith(s)), default=0)
            if complete:
                shown, self._held = shown + self._held[:-complete], ""
                return shown, True
            cut = len(self._held) - max((overlap(self._held, s) for s in self._stops), default=0)
            shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """The text that was held back and is not a stop string after all."""
        held, self._held = self._held, ""
        return held
