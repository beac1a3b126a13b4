"""Documentation prose out of Debian packages: the debian-handbook, Python's documentation, the debian-faq."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("debian-handbook", "python3.11-doc", "debian-faq")
SOURCES = ("**/html/en-US/*.html", "**/FAQ/*.en.html", "**/html/_sources/**/*.rst.txt")

HELD_OUT_EVERY = 25
"""Each so manyth file is kept apart: training never sees it."""


def texts(folder: Path) -> tuple[list[str], list[str]]:
    """(texts to train on, texts held out), from the packages' files below `folder`, downloaded where missing."""
    if not folder.is_dir():
        _unpack(folder)
    found = sorted({path for pattern in SOURCES for path in folder.glob(pattern)})
    if not found:
        sys.exit(f"{folder}: no documentation in it; remove it to download the packages again")
    kept: tuple[list[str], list[str]] = ([], [])
    for number, path in enumerate(found):
        text = path.read_text("utf-8")
        text = "\n".join(_paragraphs(text)) if path.suffix == ".html" else text
        kept[number % HELD_OUT_EVERY == 0].append(text + "\n\n")
    return kept


def _unpack(folder: Path) -> None:
    """Needs apt-get and dpkg."""
    folder.mkdir(parents=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
        package.unlink()


def _paragraphs(html: str) -> Iterator[str]:
    parser = _Text()
    parser.feed(html)
    for line in "".join(parser.parts).splitlines():
        if line.strip():
            yield " ".join(line.split())


class _Text(HTMLParser):
    """Collects what a reader sees."""

    BREAKS = frozenset({"p", "li", "div", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "tr", "br"})
    HIDDEN = frozenset({"script", "style", "head"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self.HIDDEN
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self.HIDDEN
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if "\n" not in data else data.replace("\n", " "))
