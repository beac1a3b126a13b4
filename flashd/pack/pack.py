"""A model file -> a bundle: section by section, a tensor or less in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np

from flashd.bundle.formats import RowFormat
from flashd.bundle.header import Chooser, Header, Text, group_format, layer_parts, neuron_format
from flashd.bundle.prefix import MAGIC, ROWS_OF_A_RUN
from flashd.bundle.row_kinds import BLOCK, NARROW, Floats, RowKind
from flashd.bundle.writer import BundleWriter
from flashd.errors import DataError, UsageError
from flashd.pack.encode import Encoder
from flashd.pack.graphs import graphs
from flashd.pack.lossy import gate_search, narrow_search, predictor_search
from flashd.pack.lossy.calibration import sample_tokens
from flashd.pack.lossy.card_order import filled
from flashd.pack.lossy.gate_search import Gated
from flashd.pack.lossy.gates import Gating, parted
from flashd.pack.lossy.narrow_groups import Narrowing, Starts, Weigh
from flashd.pack.lossy.narrow_search import FewBits
from flashd.pack.lossy.predictor_search import Selected
from flashd.pack.lossy.predictors import Selecting
from flashd.pack.original import Original
from flashd.pack.templates import try_chat_template
from flashd.pack.vocabulary import Vocabulary
from flashd.pack.weights import Matrix, Numbers

BENT = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What a file whose numbers contradict each other brings about in numpy and in the packages that read it."""

Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all)."""

Allowed = Selecting | Gating | Narrowing
Choice = Selected | Gated | FewBits | None


def pack(
    source_path: Path,
    out: Path,
    rows: RowKind,
    on_progress: Progress = lambda done, total: None,
    allowed: Allowed | None = None,
    pre: str | None = None,
) -> Header:
    """Packs the model at `source_path` into the bundle `out`, replacing it at the end or not at all.

    Where a loss is allowed: with Selecting a predictor says which neurons take part, unless whole experts are read
    about as soon; with Gating their gates do, unless all are needed or read about as soon; with Narrowing what
    matters least has fewer bits on the card, unless all of it matters too much. `pre` is the pre-tokenizer of a GGUF
    file, whatever the file says.

    Raises:
        UsageError: `out` is something else than a bundle, or flashd does not know `pre`.
        InputMissing, DataError: the model file is missing, damaged or of an unknown kind; or no predictor of its
            neurons costs as little as was asked.
        CannotWrite: the disk is full or the folder cannot be written.
    """
    _check_out(out)
    try:
        original = Original.open(source_path, rows, pre)
        _check(original, allowed)
        return _write(original, out, on_progress, allowed)
    except BENT as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source_path}: its parts do not fit together ({what}); download it again") from error


def _check_out(out: Path) -> None:
    """Raises UsageError for what must not be replaced, such as the model file itself."""
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder; name a file in it")
    if out.exists():
        with out.open("rb") as file:
            start = file.read(len(MAGIC))
        if start and start != MAGIC:
            raise UsageError(f"--out {out}: is there and is no bundle; name another file, or remove it")


def _check(original: Original, allowed: Allowed | None) -> None:
    """Raises DataError for a model in which nothing can be lost that way."""
    match allowed:
        case Selecting():
            predictor_search.check(original)
        case Gating():
            gate_search.check(original)
        case Narrowing():
            narrow_search.check(original)


def _choose(original: Original, tokenizer_json: bytes, allowed: Allowed | None) -> Choice:
    """What may be lost by; None where all neurons take part as they are. This takes longest."""
    match allowed:
        case Selecting():
            return predictor_search.choose(original, tokenizer_json, allowed)
        case Gating():
            return gate_search.choose(original, tokenizer_json, allowed)
        case Narrowing():
            return narrow_search.choose(original, tokenizer_json, allowed)
    return None


def _write(original: Original, out: Path, on_progress: Progress, allowed: Allowed | None) -> Header:
    vocabulary = original.source.vocabulary()
    try_chat_template(vocabulary, original.path)
    with BundleWriter(out) as bundle:  # before what takes long: whether it can be written is known then
        choice = _choose(original, vocabulary.tokenizer_json, allowed)
        selection = choice.selection if isinstance(choice, Selected | Gated) else None
        writer = _Writer(original, bundle, on_progress)
        writer.tables(vocabulary, selection.kind if selection else None)
        match choice:
            case Selected():
                writer.selected(choice)
            case Gated():
                writer.gated(choice)
            case FewBits():
                writer.narrowed(choice)
            case None:
                writer.exact(vocabulary.tokenizer_json)
        return bundle.finish(
            model=original.model, formats=original.formats, text=_text(vocabulary, original.model.vocabulary),
            source=original.source.source(), selection=selection,
            narrowed=choice.narrowed if isinstance(choice, FewBits) else None,
        )  # fmt: skip


def _text(vocabulary: Vocabulary, rows: int) -> Text:
    """What the header says of texts; tokens beyond the rows of the head are none."""
    known = range(rows)
    return Text(
        eos=[t for t in vocabulary.eos if t in known],
        bos=vocabulary.bos if vocabulary.bos in known else None, add_bos=vocabulary.add_bos,
        chat_template=vocabulary.chat_template,
    )  # fmt: skip


class _Writer:
    """Writes the sections of a bundle in their order."""

    def __init__(self, original: Original, bundle: BundleWriter, on_progress: Progress) -> None:
        self._original, self._bundle, self._on_progress = original, bundle, on_progress
        self._model, self._formats, self._weights = original.model, original.formats, original.weights
        self._group = group_format(self._model, self._formats)
        self._encode = Encoder(self._model, self._count)
        self._done = 0
        self._total = sum(prod(original.source.tensor(n).shape) for n in original.source.names)

    def tables(self, vocabulary: Vocabulary, chooser: Chooser | None) -> None:
        """What comes before the layers."""
        add, weights, formats = self._bundle.add, self._weights, self._formats
        add("tokenizer", [vocabulary.tokenizer_json])
        add("token_bytes", [vocabulary.token_bytes.to_bytes()])
        for name, graph in graphs.build(self._model, formats, chooser).items():
            add(name, [graph])
        add("rope", [self._original.rope.tobytes()])
        add("vectors", self._encode.vectors(weights.model_vectors()))
        if not weights.tied:
            self._table("embedding", weights.embedding(), formats.embedding)
        self._table("head", weights.head(), formats.head, formats.centred_head)
        if self._model.positions:
            self._table("positions", weights.positions(), "f16")

    def exact(self, tokenizer_json: bytes) -> None:
        """The layers, what a sample text warms first."""
        calibration = self._original.calibration([sample_tokens(tokenizer_json)[: self._model.context]])
        for i in range(self._model.layers):
            self._attention(i)
            if self._model.experts:
                self._experts(i, calibration.mixture(i))
            else:
                self._groups(i, calibration.layer(i).sizes())

    def narrowed(self, choice: FewBits) -> None:
        """The layers, their coldest groups with fewer bits."""
        for i, layer in enumerate(choice.layers):
            self._attention(i)
            self._groups(i, layer.sizes, layer.weigh, layer.starts)

    def selected(self, choice: Selected) -> None:
        """The layers with a bundle a neuron, in an order of their own, and what chooses among them."""
        form = neuron_format(self._model, self._formats)
        for i, layer in enumerate(choice.layers):
            self._attention(i)
            if self._model.experts:
                self._router(i, layer.experts)
            ffns = [self._weights.ffns(i)[number] for number in layer.experts.tolist()]
            neurons = [self._encode.neurons(ffn, form, p.order) for ffn, p in zip(ffns, layer.parts, strict=True)]
            self._bundle.add(f"layer.{i}.ffn", chain.from_iterable(neurons), run=form.nbytes)
        self._bundle.add("rates", [choice.rates.tobytes()])
        for i, layer in enumerate(choice.layers):
            if layer.rank:
                predictors = [part.predictor for part in layer.parts]
                self._bundle.add(f"layer.{i}.narrow", [p.narrow.tobytes() for p in predictors])
                self._bundle.add(f"layer.{i}.wide", [p.wide.tobytes() for p in predictors])
                self._bundle.add(f"layer.{i}.lean", [p.lean.tobytes() for p in predictors])

    def gated(self, choice: Gated) -> None:
        """The layers with their gate rows apart, and a bundle a neuron in an order of its own."""
        form, every, add = self._group, np.arange(self._model.neurons), self._bundle.add
        for i, layer in enumerate(choice.layers):
            self._attention(i)
            (ffn,) = self._weights.ffns(i)
            raw = np.frombuffer(b"".join(self._encode.groups(ffn, form, every)), np.uint8).reshape(-1, form.nbytes)
            gates, units, steps = parted(raw, form)
            order = filled(layer.order, len(every))
            add(f"layer.{i}.ffn", [units[order].tobytes()], run=units.shape[1])
            add(f"layer.{i}.gate", [gates[order].tobytes()])
            add(f"layer.{i}.floors", [self._ordered(layer.floors, layer.order)])
            if steps.size:
                add(f"layer.{i}.steps", [steps.tobytes()])
                add(f"layer.{i}.groups", [(order // BLOCK).astype("<i4").tobytes()])
        add("rates", [self._ordered(layer.often, layer.order) for layer in choice.layers])

    def _ordered(self, values: Floats, order: Numbers) -> bytes:
        """A number a neuron [F], in the order of the card; 0 of those that only fill the last block."""
        return np.pad(values[order], (0, self._model.neurons - len(order))).tobytes()

    def _table(self, name: str, matrix: Matrix, kind: RowKind, centred: bool = True) -> None:
        """A matrix of which the engine reads a row here and there, or some rows."""
        run = ROWS_OF_A_RUN * RowFormat(kind, self._model.hidden).nbytes
        self._bundle.add(name, self._encode.rows(matrix, kind, centred), run)

    def _attention(self, i: int) -> None:
        kind, add = self._formats.attention, self._bundle.add
        add(f"layer.{i}.vectors", self._encode.vectors(self._weights.layer_vectors(i)))
        qkv = self._weights.qkv(i)
        add(f"layer.{i}.qkv", (chunk for part in qkv for chunk in self._encode.rows(part, kind)))
        add(f"layer.{i}.output", self._encode.rows(self._weights.output(i), kind))

    def _groups(self, i: int, sizes: Floats, weigh: Weigh | None = None, starts: Starts | None = None) -> None:
        """A layer's groups, the hottest first, in sections of one width each."""
        (ffn,) = self._weights.ffns(i)
        order, every = self._encode.order(ffn, sizes), self._model.groups
        ends = [starts.int3, starts.int2, every] if starts else [every]
        for part in layer_parts(i, self._group, ends):
            neurons = order[part.first * BLOCK : (part.first + part.count) * BLOCK]
            chunks = self._encode.groups(ffn, part.form, neurons, weigh if part.form.kind in NARROW else None)
            self._bundle.add(part.section, chunks, run=part.form.nbytes)

    def _experts(self, i: int, order: Numbers) -> None:
        """A layer's router and its experts, those first that most tokens use."""
        self._router(i, order)
        ffns, every = self._weights.ffns(i), np.arange(self._model.expert_neurons)
        chunks = (chunk for e in order.tolist() for chunk in self._encode.groups(ffns[e], self._group, every))
        self._bundle.add(f"layer.{i}.ffn", chunks, run=self._group.nbytes)

    def _router(self, i: int, order: Numbers) -> None:
        """Its rows move with their experts, so that the hottest is number 0."""
        rows = Matrix(self._weights.router(i).tensor, order)
        self._bundle.add(f"layer.{i}.router", self._encode.rows(rows, "f16"))

    def _count(self, weights: int) -> None:
        self._done += weights
        self._on_progress(min(self._done, self._total), self._total)
