"""What can be wrong with a bundle. Each error stands for a rule of the format that the file breaks."""

from __future__ import annotations

from flashd.errors import DataError


class NotABundle(DataError):
    """The file does not start with a bundle's magic."""


class NewerVersion(DataError):
    """The bundle was written by a later flashd."""


class OlderVersion(DataError):
    """The bundle was written by an earlier flashd whose format is no longer read."""


class TruncatedBundle(DataError):
    """The file is shorter or longer than its own header says."""


class DamagedHeader(DataError):
    """The header's digest or its contents are wrong."""


class BadSection(DataError):
    """A section lies outside the file, is not page-aligned or has the wrong size for its model."""


class DamagedRun(DataError):
    """The bytes of a run are not those that were written."""
