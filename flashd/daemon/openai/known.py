"""Objects of a client's request."""

from __future__ import annotations

import msgspec


class Known(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object in which every field is known."""
