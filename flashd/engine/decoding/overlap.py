"""What of a text is held back, because something may have begun there."""

from __future__ import annotations


def overlap(text: str, opening: str) -> int:
    """How many characters at the end of a text `opening` begins with. All of `opening` does not count."""
    return next((n for n in range(min(len(opening) - 1, len(text)), 0, -1) if text.endswith(opening[:n])), 0)
