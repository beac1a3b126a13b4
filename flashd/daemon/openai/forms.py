"""Answers in OpenAI's forms: whole or in pieces, of chats and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flashd.daemon.job import Job, Scored
from flashd.engine.decoding.tools.calls import Call


@dataclass(frozen=True)
class Piece:
    """A part of an answer, or all of it."""

    index: int  # which answer
    text: str = ""
    thoughts: str = ""  # what the model thought before it
    calls: Sequence[dict[str, Any]] = ()  # calls, or the parts of them that came
    scored: Sequence[Scored] | None = None  # the tokens of the text, if they were asked for
    at: int = 0  # characters of the answer before it
    first: bool = False
    reason: str | None = None  # why the answer ends with it


class Form(Protocol):
    """How the answers to one kind of request look."""

    whole: str  # the name of the object
    piece: str
    prompt: str  # the field that has the prompt

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole answer."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A part of an answer."""


class ChatForm:
    """The form of /v1/chat/completions."""

    whole, piece, prompt = "chat.completion", "chat.completion.chunk", "messages"

    def choice(self, piece: Piece) -> dict[str, Any]:
        content = piece.text or (None if piece.calls else "")
        more = self._thought(piece) | ({"tool_calls": list(piece.calls)} if piece.calls else {})
        return self._of(piece, "message", {"role": "assistant", "content": content, "refusal": None} | more)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        role = {"role": "assistant"} if piece.first else {}
        said = ({"content": piece.text} if piece.text or piece.first else {}) | self._thought(piece)
        return self._of(piece, "delta", role | said | ({"tool_calls": list(piece.calls)} if piece.calls else {}))

    def _thought(self, piece: Piece) -> dict[str, Any]:
        """The field that vLLM, llama.cpp and DeepSeek's API have for thoughts."""
        return {"reasoning_content": piece.thoughts} if piece.thoughts else {}

    def _of(self, piece: Piece, name: str, said: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": piece.index, name: said, "logprobs": self._logprobs(piece.scored), "finish_reason": piece.reason,
        }  # fmt: skip

    def _logprobs(self, scored: Sequence[Scored] | None) -> dict[str, Any] | None:
        if scored is None:
            return None
        content = [
            _token(s.token, s.logprob) | {"top_logprobs": [_token(token, logprob) for token, logprob in s.top]}
            for s in scored
        ]
        return {"content": content, "refusal": None}


class TextForm:
    """The form of /v1/completions."""

    whole, piece, prompt = "text_completion", "text_completion", "prompt"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return self.chunk(piece)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index, "text": piece.text, "logprobs": self._logprobs(piece.scored, piece.at),
            "finish_reason": piece.reason,
        }  # fmt: skip

    def _logprobs(self, scored: Sequence[Scored] | None, at: int) -> dict[str, Any] | None:
        if scored is None:
            return None
        offsets = []
        for s in scored:
            offsets.append(at)
            at += len(_spelt(s.token))
        return {
            "tokens": [_spelt(s.token) for s in scored],
            "token_logprobs": [s.logprob for s in scored],
            "top_logprobs": [{_spelt(token): logprob for token, logprob in s.top} for s in scored],
            "text_offset": offsets,
        }


def _spelt(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _spelt(token), "logprob": logprob, "bytes": list(token)}


def whole_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def part_of_call(index: int, call: Call, sent: int) -> dict[str, Any]:
    """What of a call was not sent yet; -1: nothing was."""
    if sent < 0:
        return {"index": index} | whole_call(call)
    return {"index": index, "function": {"arguments": call.arguments[sent:]}}


def reason(job: Job) -> str:
    return "tool_calls" if job.result.calls else "length" if job.result.cut else "stop"


def more(jobs: Sequence[Job]) -> Any:
    """What OpenAI's answers have no place for; a list if there are several answers."""
    said = [
        {
            "finish": job.result.finish, "forgotten": job.result.forgotten, "probabilities": job.result.probabilities,
            "figures": job.result.figures,
        }
        for job in jobs
    ]  # fmt: skip
    return said[0] if len(said) == 1 else said


def usage(jobs: Sequence[Job], of_each: int) -> dict[str, Any]:
    """What all answers cost. A prompt counts once, however many answers it has."""
    figures = [job.result.figures for job in jobs]
    reused = sum(int(f.get("reused_tokens", 0)) for f in figures[::of_each])
    prompt = sum(int(f.get("prompt_tokens", 0)) for f in figures[::of_each]) + reused
    said = sum(int(f.get("tokens", 0)) for f in figures)
    return {
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": reused},
    }  # fmt: skip
