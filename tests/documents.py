"""The project's Markdown documents, taken apart: links, headings, blocks of code, sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
SEPARATORS = {"&&", "||", ";", "|"}


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    text: str
    line: int
    marker: str
    """What an HTML comment in the line before it says."""


@dataclass(frozen=True)
class Document:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @cached_property
    def tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    @property
    def blocks(self) -> Iterator[Block]:
        for before, token in zip([None, *self.tokens], self.tokens, strict=False):
            if token.type == "fence":
                comment = before.content if before is not None and before.type == "html_block" else ""
                found = re.search(r"<!-- (.*) -->", comment)
                yield Block(token.info, token.content, (token.map or [0])[0] + 1, found[1] if found else "")

    def spans(self, kind: str) -> Iterator[Token]:
        """The parts of running text of a kind, such as code_inline."""
        for token in self.tokens:
            yield from (child for child in token.children or () if child.type == kind)

    @property
    def links(self) -> list[str]:
        """Where links lead and images lie."""
        found = [link.attrGet("href") for link in self.spans("link_open")]
        found += [image.attrGet("src") for image in self.spans("image")]
        return [str(target) for target in found]

    @property
    def anchors(self) -> set[str]:
        """The headings as GitHub names them in links."""
        inline = [after for at, after in zip(self.tokens, self.tokens[1:], strict=False) if at.type == "heading_open"]
        return {re.sub(r"[^\w\- ]", "", token.content.lower()).replace(" ", "-") for token in inline}

    @property
    def sentences(self) -> list[str]:
        """The sentences of paragraphs and lists, without links' addresses."""
        found: list[str] = []
        inside_table = False
        for before, token in zip(self.tokens, self.tokens[1:], strict=False):
            inside_table = (inside_table or before.type == "table_open") and before.type != "table_close"
            if token.type == "inline" and before.type == "paragraph_open" and not inside_table:
                words = "".join(_spoken(child) for child in token.children or ())
                found += re.split(r"(?<=[.!?])\s+", words)
        return [sentence for sentence in found if any(c.isalpha() for c in sentence)]


def _spoken(part: Token) -> str:
    return " " if part.type in ("softbreak", "hardbreak") else "" if part.type == "image" else part.content


def documents() -> list[Document]:
    """Every document of the checkout."""
    hidden = ("build", "dist", "wheels")
    paths = (path for path in ROOT.rglob("*.md") if not _left_out(path.relative_to(ROOT), hidden))
    return [Document(path) for path in sorted(paths)]


def _left_out(path: Path, hidden: tuple[str, ...]) -> bool:
    return any(part.startswith(".") or part in hidden or part.endswith(".egg-info") for part in path.parts)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command in a block of sh, or behind the $ of a console."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
            elif words:
                yield words[1:] if words[0] == "sudo" else words
                words = []
