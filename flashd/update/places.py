"""What an update may touch, and where root keeps what it must be able to trust."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashd.errors import CannotWrite, ConfigError
from flashd.update.folder import Folder


@dataclass(frozen=True)
class Places:
    """The service may write in `models`, and root alone in the others."""

    configuration: Path = Path("/etc/flashd/flashd.yaml")
    models: Path = Path("/var/lib/flashd")
    keys: Path = Path("/etc/flashd/update-keys")
    state: Path = Path("/var/lib/flashd-update")

    def folder_of(self, path: Path) -> Folder:
        """The open folder of a file that an update may change: the configuration, or a model below `models`.

        Raises ConfigError for any other file, CannotWrite if the folder cannot be opened or a link leads to it.
        """
        try:
            if path == self.configuration:
                return Folder.at(path.parent)
            inside = path.is_relative_to(self.models) and ".." not in path.parts
            if not inside or path == self.models:
                may = f"{self.configuration} and what is below {self.models}"
                raise ConfigError(f"{path}: an update may not change it, but only {may}")
            return Folder.at(self.models, path.relative_to(self.models).parts[:-1])
        except OSError as error:
            raise CannotWrite(
                f"{path.parent}: {error.strerror}; an update needs a folder there, not a link"
            ) from error
