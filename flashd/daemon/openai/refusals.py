"""Errors in the shape of OpenAI's API, and what is wrong with a body in words that say what is allowed."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import JSONResponse

from flashd.errors import BAD_REQUEST, BadField, Busy, UsageError

CODES = {
    400: "invalid_value", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "not_found",
    429: "rate_limit_exceeded", 500: "server_error", 503: "unavailable",
}  # fmt: skip
"""What went wrong if nothing more is known than the status."""

NO_FUNCTIONS = ("nothing; send tools instead", "none; send tool_choice instead")
NUMBER = "a whole number of 1 or more"
ALLOWED = {
    "role": "system, developer, user, assistant or tool",
    "content": "a text or a list of parts of type text; of the assistant null too",
    "prompt": "a text, or a list of 1 to 8 texts; not numbers of tokens",
    "n": "1 to 8",
    "max_tokens": NUMBER,
    "max_completion_tokens": NUMBER,
    "temperature": "0 to 10",
    "top_p": "above 0 up to 1",
    "top_k": "0 or more",
    "min_p": "0 up to below 1",
    "repeat_penalty": "above 0 up to 10",
    "frequency_penalty": "-2 to 2",
    "presence_penalty": "-2 to 2",
    "seed": "a whole number from 0 up to 2^62",
    "stop": "a text, or a list of up to 16 texts, none of them empty or longer than 256 characters",
    "logit_bias": "an object of up to 1024 numbers of tokens, each with -100 to 100",
    "logprobs": "true or false for a chat, 0 to 5 for a completion",
    "top_logprobs": "0 to 20, with logprobs: true",
    "response_format": "type text, json_object or json_schema",
    "tools": "a list of up to 64 tools of type function",
    "parameters": "a JSON schema of type object",
    "tool_choice": "none, auto, required, or a function by its name",
    "functions": NO_FUNCTIONS[0],
    "function_call": NO_FUNCTIONS[1],
    "tool_calls": "a list of up to 64 calls of type function",
    "tool_call_id": "the id of a call, of up to 256 characters",
    "modalities": "text",
    "service_tier": "auto or default",
    "store": "false",
    "best_of": "1",
    "priority": "0 to 9",
    "deadline": "seconds above 0",
    "choose": "a list of up to 64 texts",
    "session": "a name of up to 64 letters, digits, -, _ and points",
}
"""What a field may be."""

PLACE = re.compile(r"(?s)(.*?)( - at (?:`key` in )?`\$(.*)`)?\Z")
UNKNOWN = re.compile("Object contains unknown field `(.*)`")
MISSING = re.compile("Object missing required field `(.*)`")


def explained(error: Exception) -> UsageError:
    """What msgspec says of a body, with the field's name and what is allowed there."""
    what, at, where = PLACE.match(str(error)).groups("")  # type: ignore[union-attr]  # it matches any text
    path = re.sub(r"\[[0-9.]+\]$", "", where).lstrip(".")
    if unknown := UNKNOWN.match(what):
        name = unknown[1][:100]
        return BadField(_within(path, name), "flashd does not know this field; leave it out", "unknown_parameter")
    if missing := MISSING.match(what):
        return BadField(_within(path, missing[1]), "is missing", "missing_required_parameter")
    if not at:
        return UsageError(f"the body: {what}")
    named = [name for name in re.split(r"[.\[\]0-9]+", path) if name]
    allowed = next((ALLOWED[name] for name in reversed(named) if name in ALLOWED), None)
    words = what.replace("`", "") + (f"; allowed is {allowed}" if allowed else "")
    return BadField(path or "body", words, "unsupported_parameter" if allowed in NO_FUNCTIONS else "invalid_value")


def _within(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "rate_limit_error" if status == 429 else BAD_REQUEST if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(body_of(status, message, param, code), status)


def refusal_of(error: Exception) -> JSONResponse:
    """The answer to a request that failed before there was a job."""
    if isinstance(error, BadField):
        return refusal(400, str(error), error.param, error.code)
    return refusal(429 if isinstance(error, Busy) else 400 if isinstance(error, UsageError) else 500, str(error))
