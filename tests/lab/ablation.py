"""The paper's Table 2 on the model that `tests.lab.train_relu` made: card bytes and reads a token, step by step.

    python -m tests.lab.ablation FOLDER [--ram 0.5] [--tokens 1000] [--judged 20000]

Everything is counted and nothing timed. Naive, hybrid and the last row are what the engine counted; the rows between
are a replay of its own trace. FOLDER then also holds exact.flash, selected.flash and trace.npz.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.engine import Prompts
from flashd.engine.evaluate import perplexity
from flashd.engine.forward.ffn.feed_forward import FeedForward
from flashd.engine.forward.ffn.selected import SelectedFfn, ignore
from flashd.engine.forward.ffn.streamed import StreamedFfn
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.contract import CardStats
from flashd.engine.paging.eviction import Frequency, Mask, shares
from flashd.engine.planning.parts import BUFFERS
from flashd.engine.planning.plan import Plan, make_plan, rates_of
from flashd.pack.lossy.predictors import Selecting
from flashd.pack.pack import pack
from tests.lab import corpus
from tests.lab.replay import LastTokens, MakePolicy, Trace, replay

PIECE, PIECES = 1500, 100  # characters, and how many texts a predictor's sample has one of
GAP = 4096  # a page: what costs fewest bytes
SD_GAP = 16 << 10  # what an SD card reads in the time that another read would take
DENSE_PASSES = 4


@dataclass(frozen=True)
class Row:
    name: str
    nbytes: float
    reads: float
    wanted: float  # share of the bytes
    run: float = 0.0  # mean neurons of a read


class Pinned:
    """No policy: what is in RAM at first stays."""

    def __init__(self, rates: Floats) -> None:
        self.scores = rates

    def used(self, chosen: Mask) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ram", type=float, default=0.5, help="part of the FFN's bytes that RAM has room for")
    parser.add_argument("--tokens", type=int, default=1000, help="held-out tokens read one after the other")
    parser.add_argument("--judged", type=int, default=20000, help="held-out tokens on which perplexity is measured")
    parser.add_argument("--rank", type=int, help="of the predictors (default: as flashd pack chooses)")
    args = parser.parse_args()
    made = packed(args.folder, args.rank)
    tokens = held_out(args.folder, made["exact"])
    judge(made, tokens[: args.judged])
    rows = table(made, args.folder / "trace.npz", tokens[: args.tokens], args.ram)
    print(
        f"\nRAM for {100 * args.ram:.0f} % of the FFN, predictors included; {args.tokens} held-out tokens one by one"
    )
    print(f"{'':34}{'KiB/token':>10}{'reads':>8}{'naive /':>9}{'wanted':>8}{'run':>6}")
    for row in rows:
        print(
            f"{row.name:34}{row.nbytes / 1024:10.1f}{row.reads:8.1f}{rows[0].nbytes / row.nbytes:9.1f}"
            f"{100 * row.wanted:7.0f}%{row.run:6.2f}"
        )


def packed(folder: Path, rank: int | None) -> dict[str, Path]:
    """The two bundles, packed where they are not there yet. The predictor learns from what the model learned from."""
    paths = {name: folder / f"{name}.flash" for name in ("exact", "selected")}
    if not paths["exact"].is_file():
        pack(folder, paths["exact"], "f16")
    if not paths["selected"].is_file():
        pack(folder, paths["selected"], "f16", allowed=Selecting(sample(folder), rank=rank))
    with Bundle(paths["selected"]) as bundle:
        s = bundle.header.selection
        size = sum(p.length for p in bundle.header.sections if p.name.endswith((".narrow", ".wide", ".lean")))
        ffn = sum(p.length for p in bundle.header.sections if p.name.endswith(".ffn"))
    assert s is not None
    for what, numbers in (("fired", s.fired), ("chosen", s.chosen)):
        shown = " ".join(f"{100 * n:.1f}" for n in numbers)
        print(f"{what:8} {shown} % of a layer's neurons, {100 * float(np.mean(numbers)):.1f} % of all")
    print(
        f"ranks    {' '.join(map(str, s.ranks))}, {size / 1024:.0f} KiB, {100 * size / ffn:.1f} % of the FFN's bytes"
    )
    print(f"at pack  perplexity {s.perplexity_exact:.3f}, selected {s.perplexity:.3f} ({100 * s.loss:+.2f} %)")
    return paths


def sample(folder: Path) -> str:
    """Pieces of the texts that the model was trained on."""
    texts, _ = corpus.texts(folder / "packages")
    random = np.random.default_rng(1)
    long = [text for text in texts if len(text) > PIECE]
    chosen = random.choice(len(long), PIECES, replace=len(long) < PIECES)
    starts = [int(random.integers(0, len(long[i]) - PIECE + 1)) for i in chosen]
    return "\n".join(long[i][at : at + PIECE] for i, at in zip(chosen, starts, strict=True))


def held_out(folder: Path, bundle: Path) -> list[int]:
    with Bundle(bundle) as opened:
        return Prompts(opened).plain((folder / "held-out.txt").read_text("utf-8"))


def judge(made: dict[str, Path], tokens: list[int]) -> None:
    """Prints the engine's own perplexity with and without selection on text that nothing was fitted to."""
    found = {}
    for name, path in made.items():
        with Bundle(path) as bundle, opened(bundle, plan_of(bundle, 1.0)) as model:
            found[name] = perplexity(model, tokens).perplexity
    loss = found["selected"] / found["exact"] - 1
    print(
        f"held out perplexity {found['exact']:.3f}, selected {found['selected']:.3f}"
        f" ({100 * loss:+.2f} %, {len(tokens)} tokens)"
    )


def plan_of(bundle: Bundle, ram: float) -> Plan:
    """A plan with room for so much of the FFN, predictors included."""
    header, rates = bundle.header, rates_of(bundle)
    full = make_plan(
        header, memory=1 << 40, context=header.model.context, threads=1, base=0, rates=rates, arithmetic="float32"
    )
    if rates is None:
        pinned = (int(ram * header.model.groups),) * header.model.layers
        return replace(full, resident=False, pinned=pinned, buffers=BUFFERS)
    room = ram * rates.size * header.unit_bytes - full.parts["predictors"]
    return replace(full, slots=tuple(shares(rates, int(room / header.unit_bytes)) if ram < 1 else full.slots))


@contextmanager
def opened(bundle: Bundle, plan: Plan, ffn: FeedForward | None = None) -> Iterator[PagedModel]:
    model = PagedModel(bundle, plan, feed_forward=ffn)
    try:
        yield model
    finally:
        model.close()


def table(made: dict[str, Path], path: Path, tokens: list[int], ram: float) -> list[Row]:
    with Bundle(made["exact"]) as bundle:
        rows = [_dense(bundle, "naive: all of it, each token", 0.0, tokens)]
        rows.append(_dense(bundle, "hybrid: what fits is pinned", ram, tokens))
    with Bundle(made["selected"]) as bundle:
        header, rates, plan = bundle.header, rates_of(bundle), plan_of(bundle, ram)
        trace = Trace()
        ends = [
            _selected(bundle, plan, gap, tokens, trace if gap == GAP else None) for gap in (GAP, SD_GAP)
        ]  # fmt: skip
    assert rates is not None
    trace.save(path, header.model.layers)
    random = np.random.default_rng(0)
    mixed = [random.permutation(header.model.neurons) for _ in range(header.model.layers)]
    steps: list[tuple[str, MakePolicy, int, object]] = [
        ("+ predictor", Pinned, 2, mixed), ("+ window, last tokens", LastTokens, 2, mixed),
        ("+ window, decayed frequency", Frequency, 2, mixed), ("+ bundling of row and column", Frequency, 1, mixed),
        ("+ order on the card", Frequency, 1, None),
    ]  # fmt: skip
    for name, policy, parts, orders in steps:
        c = replay(trace, header, rates, plan.slots, policy, GAP, orders, parts)  # type: ignore[arg-type]
        rows.append(Row(name, c.bytes_a_token, c.reads_a_token, c.wanted_share, c.run_length))
    for name, end in zip(("the engine, counted", "the engine with an SD card's gap"), ends, strict=True):
        rows.append(replace(end, name=name))
    print(
        f"the replay of the last row is {100 * (rows[-3].nbytes / ends[0].nbytes - 1):+.2f} % off the engine's count"
    )
    return rows


def _dense(bundle: Bundle, name: str, ram: float, tokens: list[int]) -> Row:
    plan = plan_of(bundle, ram)
    with opened(bundle, plan, StreamedFfn(bundle, plan)) as model:
        for token in tokens[:DENSE_PASSES]:  # each costs the same
            model.forward(np.array([token]), np.array([0]))
        m = bundle.header.model
        a_pass = (m.layers * m.groups - sum(plan.pinned)) * bundle.header.group.nbytes
        card = model.card
    # read ahead counts too: what of it belongs to a pass is what a pass wants
    passes = card.bytes_wanted / a_pass
    return Row(name, card.bytes_read / passes, card.reads / passes, card.bytes_wanted / card.bytes_read)


def _selected(bundle: Bundle, plan: Plan, gap: int, tokens: list[int], trace: Trace | None) -> Row:
    ffn = SelectedFfn(bundle, plan, gap=gap, on_chosen=trace.record if trace else ignore)
    with opened(bundle, plan, ffn) as model:
        for start in range(0, len(tokens), model.cache.context):
            model.cache.truncate(0)
            for token in tokens[start : start + model.cache.context]:
                model.forward(np.array([token]), np.array([0]))
        return _row(model.card, len(tokens), bundle.header.unit_bytes)


def _row(card: CardStats, tokens: int, unit: int) -> Row:
    run = card.bytes_wanted / unit / max(1, card.reads)
    return Row("", card.bytes_read / tokens, card.reads / tokens, card.bytes_wanted / max(1, card.bytes_read), run)


if __name__ == "__main__":
    main()
