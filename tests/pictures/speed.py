"""A plot of the first table in tests/lab/RESULTS.md, so that the picture and the table cannot part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NUMBER = re.compile(r"[0-9.]+")
NAMES = {"llama.cpp mmap": "llama.cpp, mmap", "flashd, exact": "flashd, exact"}
"""What is in the plot, by what the table calls it. Rows that lose quality are left out."""


@dataclass(frozen=True)
class Row:
    """What was measured of one contender."""

    name: str
    first: float  # seconds of loading and until the first token
    rate: float  # tokens a second


def rows(text: str) -> list[Row]:
    """The rows of NAMES in the first table of RESULTS.md that says when an answer begins."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head = next(cells for cells in table if "load + first s" in cells)
    first, rate = head.index("load + first s"), head.index("decode tok/s")
    return [Row(NAMES[cells[0]], _number(cells[first]), _number(cells[rate])) for cells in table if cells[0] in NAMES]


def _number(cell: str) -> float:
    found = NUMBER.match(cell)
    if found is None:
        raise ValueError(f"{cell!r} does not begin with a number")
    return float(found[0])


def plot(results: Path, path: Path) -> None:
    """Writes the plot as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "flashd", "font.family": "sans-serif"})
    from matplotlib import pyplot

    found = rows(results.read_text("utf-8"))
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 1.9))
    for axis, title, values in (
        (axes[0], "tokens a second", [row.rate for row in found]),
        (axes[1], "seconds to the first token, with loading", [row.first for row in found]),
    ):
        bars = axis.barh([row.name for row in found], values, color=["#8a8577", "#0b6e4f"])
        axis.bar_label(bars, [f"{value:g}" for value in values], padding=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.18 * max(values))
        axis.invert_yaxis()
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
    figure.tight_layout()
    figure.patch.set_facecolor("white")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
