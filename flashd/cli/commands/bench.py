"""flashd bench and flashd eval: how fast a bundle answers, and how well it predicts a text."""

from __future__ import annotations

import json
from dataclasses import asdict

from flashd.bundle.reader import Bundle
from flashd.cli import options
from flashd.cli.needs import read_text
from flashd.cli.own_model import budget
from flashd.cli.printing import print_facts
from flashd.cli.progress import Bar


def bench(asked: options.Bench) -> None:
    """Measures the contenders, or all points of a grid, and prints a table."""
    from flashd.bench import compare, grid

    if asked.plot:
        compare.check_plot(asked.plot)
    bench = compare.Bench(
        asked.bundle, asked.gguf, asked.prompt, asked.tokens, asked.repeat, tuple(asked.memory), asked.threads,
        asked.wrap, asked.draft,
    )  # fmt: skip
    if asked.grid:
        cards = grid.cards(asked.grid)
        with Bar("measuring", "runs") as bar:
            points = grid.run(bench, cards, bar.show)
        print(json.dumps([asdict(point) for point in points]) if asked.json else grid.table(points))
        if asked.plot:
            grid.plot(points, asked.plot)
        return
    rows = bench.run()
    print(json.dumps([asdict(row) for row in rows]) if asked.json else compare.table(rows))
    if asked.plot:
        compare.plot(rows, asked.plot)


def evaluate(asked: options.Eval) -> None:
    """Measures the perplexity of a text."""
    from flashd.engine.decoding.apart import tokens_apart
    from flashd.engine.engine import Engine, Prompts
    from flashd.engine.evaluate import perplexity

    text = read_text(asked.text)
    with Bundle(asked.bundle) as bundle:
        tokens = tokens_apart(bundle.path, lambda: Prompts(bundle).plain(text))
        with Bar("reading", "tokens") as bar, Engine(bundle, budget(asked)) as engine:
            result = perplexity(engine.model, tokens, bar.show)
    header = bundle.header
    mode = header.selection.kind if header.selection else "narrow" if header.narrowed else "exact"
    print_facts({"mode": mode, **asdict(result)}, asked.json)
