"""Asks the running daemon through its socket, so that `flashd ask` need not load the model again."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashd.errors import BAD_REQUEST, GROUP_ONLY, Busy, FlashdError, NotRunning, UsageError


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class Client:
    """The daemon's API. Raises NotRunning if no daemon listens."""

    def __init__(self, path: Path) -> None:
        self._connection = _Connection(path)
        try:
            self._connection.connect()
        except PermissionError as error:
            raise NotRunning(f"{path}: {GROUP_ONLY}") from error
        except OSError as error:
            raise NotRunning(
                f"{path}: no daemon answers ({error.strerror}); start it with: sudo systemctl start flashd"
            ) from error

    def close(self) -> None:
        self._connection.close()

    def ask(
        self, body: dict[str, Any], waiting: Callable[[str], None] = lambda text: None
    ) -> Iterator[dict[str, Any]]:
        """The events of a streamed chat completion. `waiting` is told what happens before the first words come.

        Raises Busy, UsageError, FlashdError; NotRunning if the daemon goes away before the end.
        """
        reply = self._request("POST", "/v1/chat/completions", {**body, "stream": True})
        try:
            for line in reply:
                if line.startswith(b": "):
                    waiting(line[2:].decode().strip())
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    return
                event: dict[str, Any] = json.loads(line[6:])
                if "error" in event:
                    error = event["error"]
                    raise (UsageError if error["type"] == BAD_REQUEST else FlashdError)(error["message"])
                yield event
        except (OSError, http.client.HTTPException) as error:
            raise NotRunning(f"the daemon went away in the middle of the answer ({error})") from error
        raise NotRunning("the daemon went away in the middle of the answer")

    def status(self, seconds: float) -> dict[str, Any]:
        """How things stand. Raises FlashdError, also if no answer comes in so long: the model may be loading."""
        try:
            self._connection.sock.settimeout(seconds)
            found: dict[str, Any] = json.loads(self._request("GET", "/api/status", {}).read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NotRunning(f"the daemon went away: {error}") from error
        return found

    def _request(self, method: str, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        try:
            self._connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            reply = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise NotRunning(f"the daemon went away: {error}") from error
        if reply.status != 200:
            raise {400: UsageError, 429: Busy, 503: Busy}.get(reply.status, FlashdError)(_why(reply))
        return reply


def _why(reply: http.client.HTTPResponse) -> str:
    """Why the daemon refused."""
    try:
        message: str = json.loads(reply.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):  # the server itself refused, since too many are connected
        return f"the daemon refused ({reply.reason}); try again later"
    return message
