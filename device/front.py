"""What a device may do: submit jobs, start triggers, ask how things stand. Devices know this and no engine."""

from __future__ import annotations

from typing import Any, Protocol

from flashd.config import Settings
from flashd.daemon.job import Job
from flashd.daemon.jobs import Jobs


class Front(Protocol):
    """The appliance as a console, a trigger or the kiosk sees it."""

    jobs: Jobs

    @property
    def settings(self) -> Settings: ...

    @property
    def muted(self) -> bool: ...

    def mute(self, muted: bool) -> None:
        """While muted, triggers start nothing and nothing is said aloud."""

    def start(self, name: str, **values: Any) -> Job:
        """Starts a trigger's job. Raises KeyError, NotStarted where it is muted or cools down, Busy, UsageError."""

    def status(self) -> dict[str, Any]:
        """How things stand, for people and for JSON."""
