"""What a model would read from the card for a token, from its config.json alone: no weights, no board, no time.

    python -m tests.lab.foresee CONFIG.json|BUNDLE --memory 2G 4G [--context 1024] [--text 64] [--rows int4]
                                                   [--tokens-a-pass 2.8] [--skew 0.7] [--card 45 2500]

Sizes of sections, the plan and the reads are flashd's own; a pass of a dense model reads the same each time. What
cannot be known is told: how many tokens drafts make of a pass (`flashd ask --stats` says it of a similar model), and
how unevenly experts are used. Models that select neurons need a trace: see tests.lab.replay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

import flashd
from flashd.bundle import header, prefix
from flashd.bundle.header import Header, Section, Text
from flashd.bundle.prefix import PLAIN_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import ROW_KINDS, RowKind
from flashd.bundle.rows.of_matrices import Formats
from flashd.engine.forward.ffn.streamed import stream_past
from flashd.engine.model.kv_cache import SPARE, lendable_bytes
from flashd.engine.paging.card import Extent, pages_of, units_of_a_read
from flashd.engine.paging.eviction import LeastRecentlyUsed, Numbers
from flashd.engine.planning.plan import Plan, make_plan
from flashd.errors import MemoryTooSmall
from flashd.pack.families.properties import model_of
from flashd.pack.families.registry import family_of
from flashd.pack.open_model import OpenModel, Tensor
from flashd.pack.sources.folder_config import folder_model, model_keys
from flashd.pack.sources.json_file import read_object
from flashd.pack.vocabulary import Vocabulary
from flashd.system.memory import MIB, parse_size

BASE = 58 * MIB
"""What a process holds before it makes its plan, measured on x86-64 with `flashd ask`."""

ROUTED_TOKENS = 512
"""Of a mixture that was not traced, tokens whose experts are drawn; the first half only fills the windows."""


class ConfigSource(OpenModel):
    """A model of which only config.json is there. Raises DataError where it is of no family that is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = folder_model(read_object(path), path)
        self.architecture = self._model.architecture
        keys = model_keys(self._model)
        self._metadata: dict[str, Any] = {f"{self.architecture}.{key}": value for key, value in keys.items()}

    @property
    def names(self) -> set[str]:
        tied = self._model.config.get("tie_word_embeddings") is True
        values = {f"blk.{i}.attn_v.weight" for i in range(self._model.layers)}
        return {"token_embd.weight"} | values | (set() if tied else {"output.weight"})

    def tensor(self, name: str) -> Tensor:
        """No more than its shape."""
        rows = {"token_embd.weight": "vocab_size", "position_embd.weight": "max_position_embeddings"}.get(name)
        stub: Any = SimpleNamespace(
            name=name, shape=(self._model.config[rows] if rows else self._model.head_dim,), bits=16.0
        )
        return stub  # type: ignore[no-any-return]

    @property
    def keys(self) -> set[str]:
        """Of all metadata."""
        return set(self._metadata)

    def metadata(self, key: str) -> Any:
        """A value of the metadata, None where there is none."""
        return self._metadata.get(key)

    def vocabulary(self) -> Vocabulary:
        raise NotImplementedError

    def source(self, on_progress: Callable[[int], None] = lambda nbytes: None) -> header.PackedFrom:  # noqa: ARG002
        return header.PackedFrom(name=self.path.parent.name, nbytes=0, sha256="")


def header_of(config: Path, rows: RowKind = "int4") -> Header:
    """The header that a bundle of this model would have, as far as sizes and places go.

    Raises DataError for a model of no known family.
    """
    source = ConfigSource(config)
    tables: RowKind = "int8" if rows == "int4" else rows  # as flashd pack has those of 16-bit sources
    formats = Formats(ffn=rows, attention=rows, head=tables, embedding=tables, token_inputs=tables)
    model = model_of(source, family_of(source))
    empty = Section(name="checksums", offset=0, length=0, run=PLAIN_RUN, first=0)
    header = Header(
        flashd=flashd.__version__, model=model, formats=formats, source=source.source(), sections=[],
        text=Text(eos=[], bos=None, add_bos=False, chat_template=None), checksums=empty, checksums_digest="",
    )  # fmt: skip
    if "output.weight" in source.names:
        header.sections.append(Section(name="embedding", offset=0, length=0, run=PLAIN_RUN, first=0))
    sections, at, own_runs = [], 0, header.own_runs()
    for name, length in header.expected_lengths().items():
        run = own_runs.get(name, PLAIN_RUN)
        sections.append(Section(name=name, offset=at, length=length, run=run, first=0))
        at = prefix.next_page(at + length)
    header.sections[:] = sections
    return header


@dataclass(frozen=True)
class Forecast:
    """What a plan would read, a pass of one token."""

    plan: Plan
    in_ram: float  # share of the neurons
    bytes_read: float
    reads: float
    first_reads: float = 0  # of the pass behind a prompt, in which groups come to stay

    def seconds(self, bandwidth: float, reads_per_second: float) -> float:
        """Of the card alone, where a pass costs its bytes or its reads, whichever takes longer."""
        return max(self.bytes_read / bandwidth, self.reads / reads_per_second)


def foresee(
    header: Header, memory: int, context: int, text: int, base: int = BASE, routing: Numbers | None = None
) -> Forecast:
    """The plan for `memory` bytes, and what a pass of one token reads.

    Args:
        text: tokens that the KV cache then holds; the FFN borrows the rest of it, and what only prompts need.
        routing: of a mixture, the experts [T, L, K] that each token uses in each layer, by their place on the card.

    Raises MemoryTooSmall; ValueError for a model that selects neurons.
    """
    if header.selection:
        raise ValueError("which neurons take part is not known without a trace; see tests.lab.replay")
    m = header.model
    context = min(context, m.context)
    plan = make_plan(header, memory=memory, context=context, threads=2, base=base)
    if plan.resident:
        return Forecast(plan, 1.0, 0, 0)
    if m.experts:
        assert routing is not None
        mixture = _mixture(header, plan, routing)
        passing = [_cost(header, e) for e in stream_past(header, m.layer_groups, plan.head_rows)]
        return Forecast(plan, plan.pinned_share, mixture[0] + sum(passing), mixture[1] + len(passing))
    lent = lendable_bytes(m, context + SPARE - text) + plan.of_prompts + (context - text) * plan.of_unused
    here, pinned = plan.pinned_beside(lent - plan.of_prompts), plan.pinned_beside(lent)
    passing = [_cost(header, e) for e in stream_past(header, pinned, plan.head_rows)]
    first = stream_past(header, here, plan.head_rows, pinned)
    return Forecast(plan, sum(pinned) / sum(m.layer_groups), sum(passing), len(passing), len(first))


def _mixture(header: Header, plan: Plan, routing: Numbers) -> tuple[float, float]:
    """(bytes, reads) a token of the later half of the tokens: experts that are not in RAM are read, none guessed."""
    m, size = header.model, header.model.expert_groups
    capacity, most = plan.pinned[0] // size, units_of_a_read(header.group.nbytes)
    recent = [LeastRecentlyUsed(m.groups // size) for _ in range(m.layers)]
    here = [set(range(capacity)) for _ in range(m.layers)]
    nbytes = reads = 0
    half = len(routing) // 2
    for t, of_token in enumerate(routing):
        for layer, used in enumerate(of_token):
            missing = set(used.tolist()) - here[layer]
            recent[layer].use(used[None])
            everything = np.array(sorted(here[layer] | missing), np.int64)
            here[layer] = set(recent[layer].worth(everything, capacity).tolist())
            for expert in missing if t >= half else ():
                for first in range(0, size, most):
                    nbytes += _cost(header, Extent(layer, expert * size + first, min(most, size - first)))
                    reads += 1
    return nbytes / (len(routing) - half), reads / (len(routing) - half)


def _cost(header: Header, extent: Extent) -> int:
    """Bytes that the card gives for an extent: whole pages."""
    section = _section(header, header.paged_sections[extent.section])
    at = section.offset + extent.first * section.run
    return pages_of(at, min(extent.count * section.run, section.end - at))[1]


def _section(header: Header, name: str) -> Section:
    section = header.section_named(name)
    assert section is not None
    return section


def drawn(header: Header, tokens: int, skew: float) -> Numbers:
    """Experts [tokens, L, K], each token's drawn by itself: the i-th is as likely as (i + 1) ** -skew."""
    experts = header.model.experts
    assert experts is not None
    random = np.random.default_rng(0)
    likely = -skew * np.log(np.arange(1, experts.count + 1))
    keys: npt.NDArray[np.float64] = likely + random.gumbel(size=(tokens, header.model.layers, experts.count))
    return np.argsort(-keys, axis=2)[:, :, : experts.used]


def show(header: Header, args: argparse.Namespace) -> None:
    m = header.model
    print(f"{m.name}, {m.family}: {m.layers} layers of {m.neurons} neurons, {args.text} of {args.context} tokens")
    routing = drawn(header, ROUTED_TOKENS, args.skew) if m.experts else None
    for memory in args.memory:
        try:
            f = foresee(header, parse_size(memory), args.context, args.text, routing=routing)
        except MemoryTooSmall as error:
            print(f"{memory:>6} {error}")
            continue
        nbytes, reads = f.bytes_read / args.tokens_a_pass, f.reads / args.tokens_a_pass
        share = 100 * f.in_ram
        print(f"{memory:>6} {share:5.1f} % of neurons in RAM, {nbytes / MIB:.1f} MiB and {reads:.0f} reads a token")
        if args.card and reads:
            seconds = f.seconds(1e6 * args.card[0], args.card[1]) / args.tokens_a_pass
            print(f"{'':7}{seconds:.2f} s of the card a token: at the most {1 / seconds:.3f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a config.json, or a bundle")
    parser.add_argument("--memory", nargs="+", required=True, metavar="SIZE")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--text", type=int, default=64, help="tokens of prompt and answer so far (default 64)")
    parser.add_argument("--rows", choices=ROW_KINDS, default="int4", help="where a config.json is given")
    parser.add_argument("--tokens-a-pass", type=float, default=1.0, help="that drafts make of a pass (default: none)")
    parser.add_argument("--skew", type=float, default=0.0, help="of experts' popularity; 0: all are as likely")
    parser.add_argument("--card", type=float, nargs=2, metavar=("MB/s", "READS/s"))
    args = parser.parse_args()
    if args.model.suffix == ".json":
        header = header_of(args.model, args.rows)
    else:
        with Bundle(args.model) as bundle:
            header = bundle.header
    if header.selection:
        parser.error(f"{args.model} selects neurons: what it reads depends on the text; see tests.lab.replay")
    show(header, args)


if __name__ == "__main__":
    main()
