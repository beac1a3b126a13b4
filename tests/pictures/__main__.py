"""Makes the documents' pictures again: python -m tests.pictures [kiosk] [terminal] [speed] [wirings]

`kiosk` and `terminal` run the demo with the default model and ask it; they take a minute or two. The first needs
Debian's chromium and chromium-driver. `speed` draws the figures that stand in tests/lab/RESULTS.md. `wirings` draws
the wiring of the projects in deploy/examples, beside each one's page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.pictures import wiring
from tests.pictures.demo import Demo
from tests.pictures.example_wirings import DRAWINGS
from tests.pictures.kiosk import photograph
from tests.pictures.speed import plot
from tests.pictures.terminal import draw, talk

HERE = Path(__file__).parent
QUESTION = "Why is the sky blue?"


def kiosk() -> None:
    with Demo() as demo:
        photograph(demo.address, HERE / "kiosk.png")


def terminal() -> None:
    with Demo() as demo:
        rows = talk(demo.cable, [QUESTION, "/trigger door"])
    draw(rows, HERE / "terminal.svg")


def speed() -> None:
    plot(HERE.parent / "lab" / "RESULTS.md", HERE / "speed.svg")


def wirings() -> None:
    for project, drawing in DRAWINGS.items():
        wiring.draw(drawing, HERE.parent.parent / "deploy" / "examples" / project / "wiring.svg")


PICTURES: dict[str, Callable[[], None]] = {"kiosk": kiosk, "terminal": terminal, "speed": speed, "wirings": wirings}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        print(f"{unknown[0]} is not a picture; there are {', '.join(PICTURES)}", file=sys.stderr)
        return 64
    for name in names or list(PICTURES):
        PICTURES[name]()
        print(f"{name} is made")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
