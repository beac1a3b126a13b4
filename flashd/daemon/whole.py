"""Whether an answer that had to follow a grammar came to its end."""

from __future__ import annotations

from typing import Any

import msgspec

from flashd.daemon.job import Request, Result
from flashd.engine.decoding.tools.listener import Listener
from flashd.errors import NOT_JSON


def schemas_of(request: Request) -> list[dict[str, Any]]:
    """The schemas that an answer may follow."""
    if request.calling is not None:
        return [tool.schema for tool in request.calling.callable]
    return [] if request.json_schema is None else [request.json_schema]


def lacking(request: Request, result: Result, finish: str, listener: Listener | None) -> str | None:
    """What to say of an answer that is not what it had to be. None if it is. `finish`: how it ended."""
    if request.json_schema is not None and (finish != "stop" or not _is_json(result.text)):
        what, simpler = "JSON", "the schema"
    elif listener is not None and not _calls_are_whole(request, result, listener):
        what, simpler = "call", "the parameters"
    else:
        return None
    if finish != "stop":
        larger = "max_tokens" if finish == "length" else "the context"
        return f"the answer was cut before its {what} was whole; raise {larger}"
    return f"the answer is not {what}; simplify {simpler}"


def _calls_are_whole(request: Request, result: Result, listener: Listener) -> bool:
    required = request.calling is not None and request.calling.required
    called = listener.called and all(_is_json(call.arguments) for call in result.calls)
    return listener.whole and (called or not (required or listener.called))


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except NOT_JSON:
        return False
    return True
