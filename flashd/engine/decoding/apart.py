"""Makes tokens in a child process: a stranger's tokenizer may take no more than a tokenizer needs.

And what a vocabulary of 151,000 tokens leaves behind in libraries and in holes of the heap, some 40 MiB, is gone with
the child; that buys pinned neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flashd.errors import DataError
from flashd.system.child import ChildDied, Limits, in_child

LIMITS = Limits(seconds=120, memory=1 << 30)
"""The largest vocabularies take a third of it."""


def tokens_apart(bundle: Path, action: Callable[[], list[int]]) -> list[int]:
    """The tokens that `action` makes with the tokenizer of a bundle. Raises its FlashdError, or DataError."""
    try:
        return in_child(action, LIMITS)
    except ChildDied as error:
        raise DataError(f"{bundle}: its tokenizer takes more than {LIMITS} for this text; pack it again") from error
