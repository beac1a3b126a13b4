"""What flashd says when it cannot go on: one clear line and a sysexits code."""

import os
import unicodedata
from collections.abc import Sequence

import msgspec

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the signal's number, as shells have it."""

NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises of bytes that are not JSON of the wanted kind: other, no text, or too deep."""


GROUP_ONLY = "only members of group flashd may use it; sudo usermod -aG flashd $USER, then log in again"
"""What a user who may not use the socket or the spool is told."""

NOT_OF_A_LINE = ("Cc", "Zl", "Zp")
"""Unicode's categories of control characters and of what separates lines and paragraphs."""


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class FlashdError(Exception):
    """An error that is part of the interface: its text is the one line that the user reads.

    Say what is wrong, where, and what to do about it. `exit_code` follows sysexits.h.
    """

    exit_code = os.EX_SOFTWARE

    def __str__(self) -> str:
        """One line, whatever the names in it have: what breaks or controls a line is spelt, as in a Python string."""
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(_spelt(c) if unicodedata.category(c) in NOT_OF_A_LINE else c for c in text)


class UsageError(FlashdError):
    """The request itself cannot be carried out: an empty prompt, an option out of range."""

    exit_code = os.EX_USAGE


class BadField(UsageError):
    """A field of a client's request cannot be honoured. `param` is its name, `code` a word for programs."""

    def __init__(self, param: str, text: str, code: str = "invalid_value") -> None:
        super().__init__(f"{param}: {text}")
        self.param, self.code = param, code


class PromptTooLong(UsageError):
    """A prompt has more tokens than the context has room for."""

    def __init__(self, tokens: int | None, room: int) -> None:
        many = f"more than {room}" if tokens is None else tokens
        super().__init__(
            f"the prompt has {many} tokens and the context room for {room}; shorten it or raise the context"
        )


BAD_REQUEST = "invalid_request_error"
"""What OpenAI's API calls a UsageError."""


class DataError(FlashdError):
    """A file that was given is damaged, cut short or of a kind that flashd does not read."""

    exit_code = os.EX_DATAERR


class InputMissing(FlashdError):
    """A file that was named is not there or may not be read."""

    exit_code = os.EX_NOINPUT


class MemoryTooSmall(FlashdError):
    """The memory budget is below the smallest one that works, which is `smallest` bytes. `what` says for what."""

    exit_code = os.EX_CONFIG

    def __init__(self, memory: int, smallest: int, what: str) -> None:
        self.smallest, self.what = smallest, what
        super().__init__(
            f"{memory >> 20}M is too small for {what}; the smallest that works is --memory {-(-smallest >> 20)}M"
        )


class MemoryTaken(FlashdError):
    """The machine has less memory free at the moment than the smallest budget that works."""

    exit_code = os.EX_TEMPFAIL


class ConfigError(FlashdError):
    """The configuration does not make sense."""

    exit_code = os.EX_CONFIG


class Misfit(ConfigError):
    """A value that makes no sense beside the others of its file; `path` leads to it: ("triggers", 0, "pin")."""

    def __init__(self, path: Sequence[str | int], text: str) -> None:
        super().__init__(text)
        self.path = list(path)


class Busy(FlashdError):
    """A job was not accepted: too many are waiting, or its trigger starts too many."""

    exit_code = os.EX_TEMPFAIL


class NoRoom(Busy):
    """A job was not accepted, and will be when some of those before it have ended."""


class SpoolTaken(FlashdError):
    """Another daemon answers the jobs of this spool."""

    exit_code = os.EX_TEMPFAIL


class NotStarted(Busy):
    """A trigger started nothing: it is muted, cools down, or its prompt is empty at the moment."""


class NotRunning(FlashdError):
    """No daemon answers."""

    exit_code = os.EX_UNAVAILABLE


class CannotWrite(FlashdError):
    """The output could not be written: the disk is full, the folder is not writable."""

    exit_code = os.EX_CANTCREAT


class CardError(FlashdError):
    """The card failed while a bundle was in use."""

    exit_code = os.EX_IOERR
