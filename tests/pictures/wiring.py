"""Draws wiring as SVG: a board's header at the left, parts at the right, and a line of its own for each wire.

Every wire leaves its pin between two rows of the header, goes up or down in a channel of its own, and ends at a
terminal of a part. A drawing is made of the same data that tests compare with the example's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

PITCH = 24
"""Between two pins or two terminals."""

CHANNEL = 11
"""Between two wires beside each other."""

PART_WIDTH, BEYOND_WIDTH, GAP = 215, 170, 26
INK, PAPER, BOARD, PIN, BOX = "#1f2a24", "#ffffff", "#0b6e4f", "#e8c35a", "#f3f1ea"
COLOURS = {"3.3 V": "#c0392b", "5 V": "#e67e22", "5V": "#e67e22", "ground": "#1f2a24", "GND": "#1f2a24"}
SIGNALS = ("#1f6feb", "#8e44ad", "#0b8f6a", "#b8860b", "#d6336c", "#0097a7", "#6d4c41", "#5c7cfa")


@dataclass(frozen=True)
class Pin:
    """A pin of a header: how it is called, and where it is. Column 0 is the left one."""

    label: str
    column: int
    row: int


@dataclass(frozen=True)
class Header:
    """The board at the left."""

    title: str
    pins: Sequence[Pin]
    cable: str = ""
    """Where its own cable goes."""

    def pin(self, label: str) -> Pin:
        """The pin that a terminal names. Raises KeyError."""
        for pin in self.pins:
            if pin.label == label:
                return pin
        raise KeyError(f"{self.title} has no pin {label!r}")


@dataclass(frozen=True)
class Terminal:
    """A terminal of a part, the pin that its wire comes from, and a resistor in that wire."""

    name: str
    pin: str
    resistor: str = ""


@dataclass(frozen=True)
class Bridge:
    """A resistor between two terminals of a part, by their places, counted from 0."""

    above: int
    below: int
    label: str


@dataclass(frozen=True)
class Part:
    name: str
    terminals: Sequence[Terminal]
    bridge: Bridge | None = None
    beyond: str = ""
    """What hangs on the part in its turn, such as a pump."""

    @property
    def height(self) -> int:
        return PITCH * (len(self.terminals) + 1)


@dataclass(frozen=True)
class Drawing:
    title: str
    header: Header
    parts: Sequence[Part]


def raspberry_pi() -> Header:
    """The 40 places of the header; an odd place is in the left column."""
    names = {1: "3.3 V", 17: "3.3 V", 2: "5 V", 4: "5 V", 27: "ID", 28: "ID"}
    names |= dict.fromkeys((6, 9, 14, 20, 25, 30, 34, 39), "ground")
    gpio = {
        3: 2, 5: 3, 7: 4, 8: 14, 10: 15, 11: 17, 12: 18, 13: 27, 15: 22, 16: 23, 18: 24, 19: 10, 21: 9, 22: 25,
        23: 11, 24: 8, 26: 7, 29: 5, 31: 6, 32: 12, 33: 13, 35: 19, 36: 16, 37: 26, 38: 20, 40: 21,
    }  # fmt: skip
    names |= {place: f"GPIO{line}" for place, line in gpio.items()}
    return Header("Raspberry Pi", [Pin(f"{names[n]} ({n})", (n - 1) % 2, (n - 1) // 2) for n in range(1, 41)])


def microcontroller(title: str, cable: str, labels: Sequence[str]) -> Header:
    """A board of which only the pins that are used are drawn."""
    return Header(title, [Pin(label, 1, row) for row, label in enumerate(labels)], cable)


def svg(drawing: Drawing) -> str:
    """The drawing as a text of SVG."""
    return "\n".join(_Sheet(drawing).lines()) + "\n"


def draw(drawing: Drawing, path: Path) -> None:
    path.write_text(svg(drawing), "utf-8")


class _Sheet:
    """Where everything lies."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing
        self._used = {terminal.pin for part in drawing.parts for terminal in part.terminals}
        columns = {pin.column for pin in drawing.header.pins}
        self._left = 24 + (108 if 0 in columns else 0)  # room for the labels of the left column
        self._right = self._left + PITCH * (2 if 0 in columns else 1)
        self._top = 104 if drawing.header.cable else 78
        self._rows = 1 + max(pin.row for pin in drawing.header.pins)
        self._ports = self._right + 112  # the labels of the right column are before it
        wires = sum(len(part.terminals) for part in drawing.parts)
        self._parts_x = self._ports + CHANNEL * (wires + 1) + 92  # the last stretch has room for a resistor
        self._tops = list(self._places())
        beyond = BEYOND_WIDTH + 44 if any(part.beyond for part in drawing.parts) else 0
        self._width = self._parts_x + PART_WIDTH + beyond + 24
        bottom = max(self._top + PITCH * self._rows, self._tops[-1] + drawing.parts[-1].height)
        self._height = bottom + 30

    def _places(self) -> Iterator[int]:
        y = self._top - PITCH // 2
        for part in self._drawing.parts:
            yield y
            y += part.height + GAP

    def lines(self) -> Iterator[str]:
        title = escape(self._drawing.title)
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width} {self._height}"'
            f' width="{self._width}" height="{self._height}" font-family="sans-serif" font-size="13" role="img">'
        )
        yield f"<title>{title}</title>"
        yield f'<rect width="100%" height="100%" fill="{PAPER}"/>'
        yield _text(24, 34, self._drawing.title, size=18, weight="bold")
        yield from self._header()
        yield from self._wires()
        yield from self._labels()
        for part, top in zip(self._drawing.parts, self._tops, strict=True):
            yield from self._part(part, top)
        yield "</svg>"

    def _header(self) -> Iterator[str]:
        header = self._drawing.header
        top, height = self._top - PITCH // 2, PITCH * self._rows
        yield _box(self._left - 4, top, self._right - self._left + 8, height, BOARD, BOARD)
        yield _text(self._left - 4, top - 8, header.title, weight="bold")
        if header.cable:
            yield _text(24, 58, header.cable)
        for pin in header.pins:
            x, y = self._at(pin)
            yield f'<circle cx="{x}" cy="{y}" r="6" fill="{PIN if pin.label in self._used else "#7fb5a2"}"/>'

    def _labels(self) -> Iterator[str]:
        """The names of the pins that are used; those at the right lie on their wires."""
        for pin in self._drawing.header.pins:
            _, y = self._at(pin)
            if pin.label in self._used and pin.column == 0:
                yield _text(self._left - 10, y + 4, pin.label, anchor="end")
            elif pin.label in self._used:
                width = 7 * len(pin.label) + 6
                yield f'<rect x="{self._right + 12}" y="{y - 7}" width="{width}" height="14" fill="{PAPER}"/>'
                yield _text(self._right + 15, y + 4, pin.label, size=12)

    def _at(self, pin: Pin) -> tuple[int, int]:
        columns = (self._right - self._left) // PITCH
        return self._left + PITCH * min(pin.column, columns - 1) + PITCH // 2, self._top + PITCH * pin.row

    def _wires(self) -> Iterator[str]:
        ends = [
            (terminal, self._drawing.header.pin(terminal.pin), top + PITCH * (place + 1))
            for part, top in zip(self._drawing.parts, self._tops, strict=True)
            for place, terminal in enumerate(part.terminals)
        ]
        # of wires that go down, the upper one turns last; of those that go up, the lower one: so they do not cross
        levels = [self._leaves(pin) for _, pin, _ in ends]
        down = sorted(
            (i for i, (_, _, y) in enumerate(ends) if y >= levels[i]), key=lambda i: -levels[i] - ends[i][2]
        )
        up = sorted((i for i, (_, _, y) in enumerate(ends) if y < levels[i]), key=lambda i: levels[i] + ends[i][2])
        channels = {wire: self._ports + CHANNEL * (n + 1) for n, wire in enumerate([*up, *down])}
        signals = iter(SIGNALS * (1 + len(ends) // len(SIGNALS)))
        for i, (terminal, pin, y) in enumerate(ends):
            kind = pin.label.partition(" (")[0].strip()
            colour = COLOURS.get(kind) or next(signals)
            yield from self._wire(pin, levels[i], channels[i], y, colour)
            if terminal.resistor:
                yield from _resistor(self._parts_x - 72, y, terminal.resistor)

    def _leaves(self, pin: Pin) -> int:
        """The height at which a pin's wire leaves the header: those of the left column pass between two rows."""
        return self._at(pin)[1] + (PITCH // 2 if pin.column == 0 else 0)

    def _wire(self, pin: Pin, level: int, channel: int, y: int, colour: str) -> Iterator[str]:
        x, start = self._at(pin)
        path = f"M{x} {start} L{x + (PITCH // 2 if level != start else 0)} {level} H{channel} V{y} H{self._parts_x}"
        yield f'<path d="{path}" fill="none" stroke="{PAPER}" stroke-width="5"/>'
        yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>'
        yield f'<circle cx="{self._parts_x}" cy="{y}" r="4" fill="{colour}"/>'

    def _part(self, part: Part, top: int) -> Iterator[str]:
        x = self._parts_x
        yield _box(x, top, PART_WIDTH, part.height, BOX, INK)
        yield _text(x + PART_WIDTH - 10, top + 19, part.name, anchor="end", weight="bold")
        for place, terminal in enumerate(part.terminals):
            y = top + PITCH * (place + 1)
            yield f'<circle cx="{x}" cy="{y}" r="4" fill="{INK}"/>'
            yield _text(x + 10, y + 4, terminal.name)
        if part.bridge is not None:
            above, below = (top + PITCH * (n + 1) for n in (part.bridge.above, part.bridge.below))
            middle, at = (above + below) // 2, x - 18
            yield f'<path d="M{at} {above} V{below}" stroke="{INK}" stroke-width="2"/>'
            yield _box(at - 5, middle - 8, 10, 16, PAPER, INK)
            yield _text(at - 10, middle + 4, part.bridge.label, anchor="end", size=11, halo=True)
        if part.beyond:
            beyond, height = x + PART_WIDTH + 44, max(PITCH * 2, part.height)
            middle = top + part.height // 2
            yield f'<path d="M{x + PART_WIDTH} {middle} H{beyond}" stroke="{INK}" stroke-width="5"/>'
            yield _box(beyond, middle - height // 2, BEYOND_WIDTH, height, BOX, INK)
            words = part.beyond.split("\n")
            for n, line in enumerate(words):
                yield _text(
                    beyond + BEYOND_WIDTH // 2, middle + 5 + 17 * n - 17 * (len(words) - 1) // 2, line, "middle"
                )


def _box(x: int, y: int, width: int, height: int, fill: str, stroke: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"'
        ' stroke-width="1.5"/>'
    )


def _resistor(x: int, y: int, label: str) -> Iterator[str]:
    yield _box(x, y - 5, 30, 10, PAPER, INK)
    yield _text(x + 15, y - 7, label, anchor="middle", size=11, halo=True)


def _text(
    x: int, y: int, words: str, anchor: str = "start", size: int = 13, weight: str = "normal", halo: bool = False
) -> str:
    around = f' paint-order="stroke" stroke="{PAPER}" stroke-width="4"' if halo else ""
    return (
        f'<text x="{x}" y="{y}" fill="{INK}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
        f"{around}>{escape(words)}</text>"
    )
