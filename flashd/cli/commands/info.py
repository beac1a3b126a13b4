"""flashd info and flashd verify: what is in a bundle, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path

from flashd.bundle.header import Measured, Narrowed, Selection
from flashd.bundle.reader import Bundle
from flashd.cli.needs import need_pack
from flashd.cli.options import Info, Verify
from flashd.cli.printing import Fact, print_facts
from flashd.cli.progress import Bar
from flashd.system.memory import MIB


def info(options: Info) -> None:
    """Prints the facts of a bundle, or the families that can be packed."""
    if options.families or options.bundle is None:
        _print_families(options.json)
    else:
        print_facts(_facts(options.bundle), options.json)


def _facts(path: Path) -> dict[str, Fact]:
    with Bundle(path) as bundle:
        header = bundle.header
    m, f = header.model, header.formats
    lengths = header.expected_lengths()
    ffn = sum(lengths[name] for name in header.paged_sections[:-1])
    facts: dict[str, Fact] = {
        "name": m.name, "family": m.family, "layers": m.layers, "hidden": m.hidden, "neurons": m.neurons,
        "heads": m.heads, "kv_heads": m.kv_heads, "vocabulary": m.vocabulary, "context": m.context,
        "rows": f.ffn, "attention": f.attention, "finer_in_int8": len(f.finer), "head": f.head,
        "embedding": f.embedding,
        "neuron_bytes": header.unit_bytes // (1 if header.selection else m.group_neurons),
        "group_bytes": header.unit_bytes,
        "ffn_bytes": ffn, "file_bytes": path.stat().st_size,
        **_selection_facts(header.selection), **_narrowed_facts(header.narrowed),
        "chat_template": header.text.chat_template is not None,
        "source": header.source.name, "source_bytes": header.source.nbytes, "source_sha256": header.source.sha256,
        "packed_by": header.flashd,
    }  # fmt: skip
    if m.experts:
        facts |= {"experts": m.experts.count, "experts_of_a_token": m.experts.used}
    return facts


def _selection_facts(s: Selection | None) -> dict[str, Fact]:
    """Which neurons take part."""
    if s is None:
        return {"selection": "exact"}
    chooser: dict[str, Fact] = (
        {"ranks": s.ranks} if s.kind == "predictor" else {"thresholds": [round(t, 6) for t in s.thresholds]}
    )
    return {
        "selection": s.kind, **chooser, "chosen": [round(c, 4) for c in s.chosen],
        "fired": [round(f, 4) for f in s.fired], **_measured_facts(s),
    }  # fmt: skip


def _narrowed_facts(n: Narrowed | None) -> dict[str, Fact]:
    """Which groups have fewer bits."""
    if n is None:
        return {}
    return {
        "int3_from_group": n.int3, "int2_from_group": n.int2, **_measured_facts(n), "divergence": n.divergence,
    }  # fmt: skip


def _measured_facts(m: Measured) -> dict[str, Fact]:
    """The loss that was measured."""
    return {
        "held_out_tokens": m.tokens, "perplexity_exact": m.perplexity_exact, "perplexity": m.perplexity,
        "perplexity_loss": m.loss,
    }  # fmt: skip


def _print_families(as_json: bool) -> None:
    try:
        from flashd.pack.families.registry import FAMILIES
    except ImportError as error:
        raise need_pack(error) from error
    rows = [{"architecture": f.architecture, "models": f.models, "checked": f.checked} for f in FAMILIES.values()]
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(row["models"]) for row in rows)
    for row in rows:
        print(f"{row['architecture']:12} {row['models']:{width}} checked on {row['checked']}")


def verify(options: Verify) -> None:
    """Reads all of a bundle. Raises DataError at the first byte that is damaged."""
    with Bundle(options.bundle) as bundle, Bar("verifying", "bytes") as bar:
        total = sum(s.length for s in bundle.header.sections)
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar.show(done, total)

        bundle.verify(count)
        runs = len(bundle.checksums)
    if options.json:
        print(json.dumps({"bundle": str(options.bundle), "bytes": total, "runs": runs, "whole": True}))
    else:
        print(f"{options.bundle}: whole; {runs} checksums over {total / MIB:.0f} MiB are right")
