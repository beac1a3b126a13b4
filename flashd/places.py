"""Where flashd keeps what it can make anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder; XDG_CACHE_HOME names another."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashd"


def snapshot_folder() -> Path:
    """Where what prompts begin with is kept."""
    return cache_folder() / "snapshots"
