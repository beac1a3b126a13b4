"""flashd bench --grid: flashd and llama.cpp with every budget on every card, under the same limit of RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashd.bench.compare import DRAFTS, PEER, Bench, Contender, Figures, command, medians
from flashd.errors import FlashdError, UsageError
from flashd.system.memory import MIB, parse_size

MEMORY = "{memory}"
"""What stands for the budget in a card's command."""

RATE, FIRST = "decode_tokens_per_second", "first_token_seconds"


@dataclass(frozen=True)
class Card:
    """A card, and the words of a command that runs its arguments on it."""

    name: str
    words: tuple[str, ...]

    def wrap(self, memory: str) -> list[str]:
        """The command that limits what it runs to a budget."""
        return [word.replace(MEMORY, memory) for word in self.words]


@dataclass(frozen=True)
class Point:
    """What was measured with one budget on one card."""

    card: str
    memory: str  # the budget, as it was typed
    name: str  # the contender's
    figures: Figures  # medians; empty if it failed
    error: str = ""  # why it failed


def cards(texts: Sequence[str]) -> list[Card]:
    """The cards that `--grid` names. Raises UsageError."""
    out = []
    for text in texts:
        name, equals, wrap = text.partition("=")
        words = command(wrap, f"--grid {name}=")
        if not (name and equals and words):
            raise UsageError(f"--grid {text}: write CARD=COMMAND, such as 'usb=limit --memory {MEMORY}'")
        out.append(Card(name, tuple(words)))
    if len({card.name for card in out}) < len(out):
        raise UsageError("--grid names a card twice")
    return out


def run(
    bench: Bench, cards: Sequence[Card], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Point]:
    """Measures every contender at every point, in as many rounds as the bench repeats.

    At a point the contenders take turns, so that a slow minute of the machine affects all of them. One that fails is
    not measured at that point again: a long run does not end for it. Raises UsageError; FlashdError if a budget is
    too small for the bundle, or if every run failed.
    """
    bench.check()
    for memory in bench.memory:
        bench.plan(memory)  # a budget that is too small is known before anything is measured
    peer = bench.peer(bench.prompt_tokens())
    places = [
        (card, memory, contender)
        for card in cards
        for memory in bench.memory
        for contender in (*peer, bench.ask(DRAFTS, memory))
    ]
    runs: dict[tuple[Card, str, Contender], list[Figures]] = {place: [] for place in places}
    errors: dict[tuple[Card, str, Contender], str] = {}
    for turn in range(bench.repeat):
        for i, place in enumerate(places):
            card, memory, contender = place
            if place not in errors:
                try:
                    runs[place].append(bench.measured(contender, card.wrap(memory)))
                except FlashdError as error:
                    errors[place] = str(error)
            on_progress(turn * len(places) + i + 1, bench.repeat * len(places))
    if len(errors) == len(places):
        raise FlashdError(f"nothing could be measured: {errors[places[0]]}")
    return [
        Point(card.name, memory, contender.name, {}, errors[place])
        if (place := (card, memory, contender)) in errors
        else Point(card.name, memory, contender.name, medians(runs[place]))
        for card, memory, contender in places
    ]


def table(points: Sequence[Point]) -> str:
    """The results as a Markdown table, a line for each budget on each card. Ratios to llama.cpp are in brackets."""
    peers = any(point.name == PEER for point in points)
    head = ["card", "budget", *(["llama.cpp tok/s", "llama.cpp first token s"] if peers else [])]
    head += ["flashd tok/s", "flashd first token s", "tokens a pass", "card MiB/token", "peak MiB"]
    lines = [f"|{'|'.join(head)}|", "|---" * len(head) + "|"]
    at = {(point.card, point.memory, point.name): point for point in points}
    for card, memory in dict.fromkeys((point.card, point.memory) for point in points):
        peer, ours = at.get((card, memory, PEER)), at[card, memory, DRAFTS]
        theirs = [_said(peer, RATE), _said(peer, FIRST)] if peer else []
        cells = [
            card,
            memory,
            *theirs,
            _compared(ours, peer, RATE, 1),
            _compared(ours, peer, FIRST, -1),
        ]
        cells += [_said(ours, "tokens_per_pass"), _said(ours, "card_bytes_per_token"), _said(ours, "peak_bytes")]
        lines.append(f"|{'|'.join(cells)}|")
    failed = [f"{p.name} on {p.card} with {p.memory}: {p.error}" for p in points if p.error]
    return "\n".join([*lines, *failed])


def _said(point: Point, key: str) -> str:
    if point.error:
        return "failed"
    if key not in point.figures:
        return ""
    value = point.figures[key]
    return f"{value / MIB:.0f}" if "bytes" in key else f"{value:.3g}"


def _compared(ours: Point, peer: Point | None, key: str, better: int) -> str:
    """A figure, and how many times as good it is as llama.cpp's. `better` is 1 if more is better, else -1."""
    if peer is None or key not in peer.figures or key not in ours.figures:
        return _said(ours, key)
    return f"{_said(ours, key)} ({(ours.figures[key] / peer.figures[key]) ** better:.2f}x)"


def plot(points: Sequence[Point], path: Path) -> None:
    """Draws tokens a second against RAM, a line a card. llama.cpp's line has the same colour and is dashed."""
    import matplotlib
    from matplotlib.figure import Figure

    # the same figures make the same file, which can be kept under version control
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flashd"}):
        figure = Figure((8, 4), layout="constrained")
        axes = figure.subplots()
        for i, card in enumerate(dict.fromkeys(point.card for point in points)):
            for name, style in ((DRAFTS, "-"), (PEER, "--")):
                line = sorted(
                    (parse_size(p.memory) / MIB, p.figures[RATE])
                    for p in points
                    if (p.card, p.name) == (card, name) and p.figures
                )
                if line:
                    axes.plot(*zip(*line, strict=True), style, color=f"C{i}", marker="o", label=f"{name}, {card}")
        axes.set(xlabel="RAM, MiB", ylabel="tokens a second", yscale="log")
        axes.legend(fontsize="small")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
