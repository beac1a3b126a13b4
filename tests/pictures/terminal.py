"""A talk over the demo's cable, and a picture of the terminal that it would be on."""

from __future__ import annotations

import io
import os
import re
import select
import time
from pathlib import Path

COLUMNS = 80
PROMPT = "> "
ANSWER_SECONDS = 180.0
CONTROL = re.compile(r"\x1b\[(?P<csi>[0-9;]*[A-Za-z])|(?P<plain>[^\x1b])", re.DOTALL)


def talk(cable: Path, lines: list[str]) -> list[str]:
    """The rows of a terminal at the cable's other end once each of `lines` was typed and answered."""
    said = ""
    line = os.open(cable, os.O_RDWR | os.O_NOCTTY)
    try:
        said += _until_prompt(line)
        for text in lines:
            for byte in (text + "\r").encode():
                os.write(line, bytes([byte]))
                time.sleep(0.02)  # as a person types
            said += _until_prompt(line)
    finally:
        os.close(line)
    return rows(said)[:-1]


def _until_prompt(line: int) -> str:
    """What comes up to the next prompt, with nothing typed behind it."""
    said, until = b"", time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < until:
        if select.select([line], [], [], 1.0)[0]:
            said += os.read(line, 4096)
        elif rows(said.decode("utf-8", "replace"))[-1] == PROMPT.rstrip():
            return said.decode("utf-8")
    raise TimeoutError(f"no prompt after {ANSWER_SECONDS:.0f} s: {said[-200:]!r}")


def rows(said: str) -> list[str]:
    """What a terminal shows of a text with carriage returns and rows that are erased."""
    found: list[list[str]] = [[]]
    column = 0
    for part in CONTROL.finditer(said):
        text = part["plain"]
        if part["csi"] == "K":
            del found[-1][column:]
        elif text == "\r":
            column = 0
        elif text == "\n":
            found.append([])
        elif text == "\b":
            column = max(0, column - 1)
        elif text and text.isprintable():
            found[-1][column : column + 1] = [text]
            column += 1
    return ["".join(row).rstrip() for row in found]


def draw(lines: list[str], path: Path) -> None:
    """Writes an SVG of a terminal that shows `lines`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text(line, style="bold green" if line.startswith(PROMPT) else "default"))
    svg = console.export_svg(title="screen, at the other end of the cable", unique_id="terminal")
    # a document that is read with no network shows the reader's own font
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), "utf-8")
