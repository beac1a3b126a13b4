"""flashd pack: a model file or folder -> a bundle."""

from __future__ import annotations

import shlex
from contextlib import suppress
from typing import TYPE_CHECKING

from flashd.cli.bundles import LOOKING, Guesser, guessers, make_room, packed_path
from flashd.cli.needs import need_pack, read_text
from flashd.cli.options import Pack
from flashd.cli.progress import Bar
from flashd.system.child import ChildDied, Limits, in_child
from flashd.system.memory import MIB

if TYPE_CHECKING:
    from pathlib import Path

    from flashd.bundle.header import Header
    from flashd.pack.pack import Allowed

LOSS = 0.01
"""The rise of perplexity that --select allows without --max-loss."""


def pack(options: Pack) -> None:
    """Packs, and says what came of it."""
    try:
        from flashd.pack.pack import pack
    except ImportError as error:
        raise need_pack(error) from error
    out = options.out
    if out is None:
        out = packed_path(options.source)
        make_room(out)
    with Bar("measuring what is lost", "layers") as search, Bar("packing", "weights") as bar:

        def show(done: int, total: int) -> None:
            search.close()
            bar.show(done, total)

        header = pack(
            options.source, out, options.rows, show, _allowed(options), options.pre, options.context, search.show
        )
    print(f"{out}: {header.model.name}, {out.stat().st_size / MIB:.0f} MiB, {header.formats.words} rows")
    _print_losses(header)
    _print_guessers(out)


def _allowed(options: Pack) -> Allowed | None:
    """The loss of quality that is allowed, and for what."""
    from flashd.pack.lossy.gates import Gating
    from flashd.pack.lossy.narrow_groups import Narrowing
    from flashd.pack.lossy.predictors import Selecting

    text = read_text(options.text) if options.text else None
    most = options.max_loss or LOSS
    if options.select == "predictor" and text is not None:
        return Selecting(text, most)
    if options.select == "gate":
        return Gating(most, text)
    if options.select == "narrow" or (options.select is None and options.max_loss is not None):
        return Narrowing(most, text)
    return None


def _print_losses(header: Header) -> None:
    if s := header.selection:
        who = "a predictor" if s.kind == "predictor" else "the gate"
        print(
            f"{who} chooses {100 * sum(s.chosen) / len(s.chosen):.1f} % of the neurons;"
            f" {100 * sum(s.fired) / len(s.fired):.1f} % are not zero. Perplexity is {s.perplexity:.2f},"
            f" and {s.perplexity_exact:.2f} with all neurons ({100 * s.loss:+.2f} %, {s.tokens} held-out tokens)"
        )
    if n := header.narrowed:
        m = header.model
        share = 100 * float(1 - sum(n.int3) / sum(m.layer_groups))
        print(
            f"{share:.0f} % of groups have fewer bits. Perplexity is {n.perplexity:.3f}, and {n.perplexity_exact:.3f}"
            f" exact ({100 * n.loss:+.2f} %, KL {n.divergence:.4f}, {n.tokens} held-out tokens)"
        )


def _print_guessers(out: Path) -> None:
    """Which bundles here have the same tokenizer, so that one can make guesses for the other."""
    pairs: list[Guesser] = []
    with suppress(ChildDied):  # a strange file beside the bundle must not fail what is done
        pairs = in_child(lambda: list(guessers(out)), Limits(*LOOKING))
    for pair in pairs:
        print(
            f"{pair.small.name} can make guesses for {pair.large.name}, since their tokenizers are the same."
            f" Whether it pays: flashd plan {shlex.quote(str(pair.large))} --draft {shlex.quote(str(pair.small))}"
        )
