"""A board with a model and a configuration in use, and a stick that brings others."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flashd.bundle.reader import Bundle
from flashd.config import settings
from flashd.errors import FlashdError
from flashd.pack.pack import pack
from flashd.update.install import update
from flashd.update.manifest import MANIFEST
from flashd.update.places import Places
from flashd.update.undo import RECORD, undo
from tests import tiny


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Board:
    """A model and a configuration in use, and a stick that brings others."""

    def __init__(self, root: Path, bundle: Path) -> None:
        self.stick, home = root / "stick", root / "home"
        for folder in (self.stick, home):
            folder.mkdir()
        self.config, self.model = home / "flashd.yaml", home / "models" / "model.flash"
        self.places = Places(self.config, self.model.parent, home / "keys", home / "state")
        for folder in (self.places.models, self.places.keys, self.places.state):
            folder.mkdir()
        self.unfinished = self.places.state / RECORD
        self.model.write_bytes(bundle.read_bytes())
        self.config.write_text(f"model: {self.model}\ncontext: 256\nupdates: {{unsigned: true}}\n")
        pack(tiny.write(root / "new.gguf", "qwen2"), self.stick / "new.flash", "int4")
        text = f"model: {self.model}\ncontext: 512\nupdates: {{unsigned: true}}\n"
        (self.stick / "flashd.yaml").write_text(text)
        self.starts: list[tuple[str, int]] = []
        self.broken = False
        self.write()

    def write(self, needs: str = "0.1", **sums: str) -> None:
        new, settings = self.stick / "new.flash", self.stick / "flashd.yaml"
        (self.stick / MANIFEST).write_text(
            f"needs: '{needs}'\n"
            f"bundle: {{file: new.flash, sha256: '{sums.get('bundle', sha(new))}'}}\n"
            f"configuration: {{file: flashd.yaml, sha256: '{sums.get('configuration', sha(settings))}'}}\n"
        )

    def state(self) -> tuple[str, int]:
        """The model's name and the configured context, both whole."""
        with Bundle(self.model) as bundle:
            bundle.verify()
            return bundle.header.model.family, settings.load(self.config).context

    def restart(self) -> None:
        self.starts.append(self.state())
        if self.broken and self.starts[-1] != OLD:
            raise FlashdError("flashd does not start")

    def update(self) -> list[Path]:
        return update(self.stick, self.places, self.restart)

    def undo(self) -> list[Path]:
        return undo(self.places)


OLD, NEW = ("llama", 256), ("qwen2", 512)
