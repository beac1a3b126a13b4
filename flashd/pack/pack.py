"""Packs a model file into a bundle, section by section. At most a tensor is in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np

from flashd.bundle.header import (
    FfnSection,
    Header,
    Text,
    group_format,
    layer_ffn_sections,
    neuron_format,
    pair_format,
    run_rows,
)
from flashd.bundle.prefix import MAGIC
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import NARROW, Floats, RowKind
from flashd.bundle.writer import BundleWriter
from flashd.errors import DataError, UsageError
from flashd.pack.encode import Encoder
from flashd.pack.lossy import gate_search, narrow_experts, narrow_search, predictor_search
from flashd.pack.lossy.calibration import sample_tokens
from flashd.pack.lossy.card_order import filled
from flashd.pack.lossy.gate_search import Gated
from flashd.pack.lossy.gates import Gating
from flashd.pack.lossy.narrow_experts import FewExpertBits
from flashd.pack.lossy.narrow_groups import Narrowing, Starts, Weigh
from flashd.pack.lossy.narrow_search import FewBits
from flashd.pack.lossy.predictor_search import Selected
from flashd.pack.lossy.predictors import Selecting
from flashd.pack.original import Original, beside_layers
from flashd.pack.templates import try_chat_template
from flashd.pack.vocabulary import Vocabulary
from flashd.pack.weights.matrix import Matrix, Numbers
from flashd.system.child import ChildDied, Limits, in_child

BENT = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What numpy, and the packages that read model files, raise if a file's numbers contradict each other."""

READING = Limits(seconds=120, memory=2 << 30)
"""For a model's numbers and its tokenizer: the largest vocabularies take a quarter of it."""

Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all)."""

Allowed = Selecting | Gating | Narrowing
Choice = Selected | Gated | FewBits | FewExpertBits | None


def pack(
    source_path: Path,
    out: Path,
    rows: RowKind | None,
    on_progress: Progress = lambda done, total: None,
    allowed: Allowed | None = None,
    pre: str | None = None,
    context: int | None = None,
    on_layer: Progress = lambda done, layers: None,
) -> Header:
    """Packs the model at `source_path` into the bundle `out`. An existing bundle is replaced at the very end.

    Args:
        source_path: a GGUF file or a Hugging Face folder.
        out: the bundle.
        rows: the kind of rows that is asked for. None: each matrix has those that keep what its tensors have, see
            original.by_tensor; or int4 if the bundle may lose quality.
        on_progress: is called with (weights done, weights in all).
        allowed: how the bundle may lose quality, and how much. None: not at all. With Selecting a predictor says
            which neurons take part, unless whole experts are read about as fast. With Gating the neurons' gates say
            it, unless all neurons are needed or read about as fast. With Narrowing the groups that matter least have
            fewer bits on the card, or in a mixture all experts of the layers that bear it best, unless all of them
            matter too much.
        pre: the pre-tokenizer of a GGUF file, whatever the file says.
        context: the tokens of the longest text. None: as many as the model was trained for, or in a model that turns
            long texts in another way than short ones, the longest of the short ones.
        on_layer: is called with (layers that a sample text has gone through, all layers), again and again, while what
            may be lost is searched. That comes first.

    Raises:
        UsageError: `out` is something else than a bundle, or flashd does not know `pre`.
        InputMissing, DataError: the model file is missing, damaged or of an unknown kind; or no predictor of its
            neurons costs as little as was asked.
        CannotWrite: the disk is full or the folder cannot be written.
    """
    _check_out(out)
    if rows is None and allowed is not None:
        rows = "int4"
    try:
        vocabulary = _vocabulary(source_path, rows, pre, context)
        original = Original.open(source_path, rows, pre, context)
        _check(original, allowed)
        searched = replace(original, on_layer=lambda done: on_layer(done, original.model.layers))
        return _write(original, vocabulary, out, on_progress, lambda: _choose(searched, vocabulary, allowed))
    except BENT as error:
        raise DataError(_bent(source_path, error)) from error


def _vocabulary(source_path: Path, rows: RowKind | None, pre: str | None, context: int | None) -> Vocabulary:
    """A model's tokenizer. The model is opened too, for what its numbers may ask for.

    It is a stranger's file: it may not take what the machine has, so a child process reads it.
    """

    def read() -> Vocabulary:
        logging.disable()  # whoever opens it then logs the same
        try:
            original = Original.open(source_path, rows, pre, context)
            logging.disable(logging.NOTSET)
            return original.source.vocabulary()
        except BENT as error:
            raise DataError(_bent(source_path, error)) from error

    try:
        return in_child(read, READING)
    except ChildDied as error:
        raise DataError(
            f"{source_path}: what it says of itself takes more than {READING} to read; get it again"
        ) from error


def _bent(path: Path, error: Exception) -> str:
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path}: its parts do not fit together ({what}); download it again"


def _check_out(out: Path) -> None:
    """Raises UsageError if `out` must not be replaced, such as the model file itself."""
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder; name a file in it")
    if out.exists():
        with out.open("rb") as file:
            start = file.read(len(MAGIC))
        if start and start != MAGIC:
            raise UsageError(
                f"--out {out}: already exists and is not a flashd bundle; name another file or remove this one"
            )


def _check(original: Original, allowed: Allowed | None) -> None:
    """Raises DataError if the model has nothing that can be lost in the way that is allowed."""
    match allowed:
        case Selecting():
            predictor_search.check(original)
        case Gating():
            gate_search.check(original)
        case Narrowing():
            narrow_search.check(original)


def _choose(original: Original, vocabulary: Vocabulary, allowed: Allowed | None) -> Choice:
    """Searches how to lose as much as is allowed. None: the bundle is exact. This takes longest."""
    tokenizer_json = vocabulary.tokenizer_json
    match allowed:
        case Selecting():
            return predictor_search.choose(original, tokenizer_json, allowed)
        case Gating():
            return gate_search.choose(original, tokenizer_json, allowed)
        case Narrowing():
            if original.model.experts:
                return narrow_experts.choose(original, tokenizer_json, allowed)
            return narrow_search.choose(original, tokenizer_json, allowed)
    return None


def _write(
    original: Original, vocabulary: Vocabulary, out: Path, on_progress: Progress, choose: Callable[[], Choice]
) -> Header:
    try_chat_template(vocabulary, original.path)
    with BundleWriter(out) as bundle:  # opened first: an error of the disk comes before the long search
        choice = choose()
        selection = choice.selection if isinstance(choice, Selected | Gated) else None
        writer = _Writer(original, bundle, on_progress)
        writer.tables(vocabulary)
        match choice:
            case Selected():
                writer.selected(choice)
            case Gated():
                writer.gated(choice)
            case FewBits():
                writer.narrowed(choice)
            case FewExpertBits():
                writer.narrowed_experts(choice)
            case None:
                writer.exact(vocabulary.tokenizer_json)
        return bundle.finish(
            model=original.model, formats=original.formats, text=_text(vocabulary, original),
            source=original.source.source(), selection=selection,
            narrowed=choice.narrowed if isinstance(choice, FewBits | FewExpertBits) else None,
        )  # fmt: skip


def _text(vocabulary: Vocabulary, original: Original) -> Text:
    """The header's Text. Tokens that the head has no row for are left out."""
    known = range(original.model.vocabulary)
    return Text(
        eos=[t for t in vocabulary.eos if t in known],
        bos=vocabulary.bos if vocabulary.bos in known else None, add_bos=vocabulary.add_bos,
        chat_template=vocabulary.chat_template, channels=vocabulary.channels, drawing=original.source.recommended(),
    )  # fmt: skip


class _Writer:
    """Writes the sections of a bundle in their order."""

    def __init__(self, original: Original, bundle: BundleWriter, on_progress: Progress) -> None:
        self._original, self._bundle, self._on_progress = original, bundle, on_progress
        self._model, self._formats, self._weights = original.model, original.formats, original.weights
        self._encode = Encoder(self._model, self._count)
        self._done = 0
        self._total = sum(prod(original.source.tensor(n).shape) for n in original.source.names)

    def tables(self, vocabulary: Vocabulary) -> None:
        """What comes before the layers."""
        add, weights, formats = self._bundle.add, self._weights, self._formats
        add("tokenizer", [vocabulary.tokenizer_json])
        add("token_bytes", [vocabulary.token_bytes.to_bytes()])
        add("rope", [table.tobytes() for table in self._original.rope])
        add("vectors", self._encode.vectors(weights.model_vectors()))
        if not weights.tied:
            self._table("embedding", weights.embedding(), formats.embedding)
        self._table("head", weights.head(), formats.head, formats.centred_head)
        if self._model.positions:
            self._table("positions", weights.positions(), "f16")
        if inputs := weights.token_inputs():
            self._table("token_inputs", inputs, formats.token_inputs)
        for part, matrices in beside_layers(weights, self._model).items():
            kind = formats.of(part, formats.attention)
            add(part, chain.from_iterable(self._encode.rows(matrix, kind) for matrix in matrices))

    def exact(self, tokenizer_json: bytes) -> None:
        """Writes exact layers. Groups or experts that a sample text uses most come first."""
        calibration = self._original.calibration([sample_tokens(tokenizer_json)[: self._model.context]])
        for i in range(self._model.layers):
            self._attention(i)
            self._leading(i)
            if self._model.experts:
                self._experts(i, calibration.mixture(i))
            else:
                self._groups(i, calibration.layer(i).sizes())

    def narrowed(self, choice: FewBits) -> None:
        """Writes layers whose coldest groups have fewer bits."""
        for i, layer in enumerate(choice.layers):
            self._attention(i)
            self._groups(i, layer.sizes, layer.weigh, layer.starts)

    def narrowed_experts(self, choice: FewExpertBits) -> None:
        """Writes layers of which some have experts of fewer bits."""
        for i, (layer, starts) in enumerate(zip(choice.layers, choice.starts, strict=True)):
            self._attention(i)
            self._leading(i)
            self._experts(i, layer.order, layer.weigh, starts)

    def selected(self, choice: Selected) -> None:
        """Writes layers of single neurons, each layer in an order of its own, and the predictors of these neurons."""
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
                self._bundle.add(f"layer.{i}.narrow", [p.to_rank.tobytes() for p in predictors])
                self._bundle.add(f"layer.{i}.wide", [p.from_rank.tobytes() for p in predictors])
                self._bundle.add(f"layer.{i}.lean", [p.lean.tobytes() for p in predictors])

    def gated(self, choice: Gated) -> None:
        """The layers with their gate rows apart, and a bundle a neuron in an order of its own."""
        form, add = pair_format(self._model, self._formats), self._bundle.add
        for i, layer in enumerate(choice.layers):
            self._attention(i)
            (ffn,) = self._weights.ffns(i)
            order = filled(layer.order, self._model.neurons)
            gate, up = ffn.inputs
            add(f"layer.{i}.ffn", self._encode.neurons(replace(ffn, inputs=[up]), form, order), run=form.nbytes)
            add(f"layer.{i}.gate", self._encode.neuron_rows(gate, form.row, order))
            add(f"layer.{i}.floors", [self._ordered(layer.floors, layer.order)])
        add("rates", [self._ordered(layer.often, layer.order) for layer in choice.layers])

    def _ordered(self, values: Floats, order: Numbers) -> bytes:
        """The bytes of one number a neuron [F], in the order of the card. Neurons that fill the last block have 0."""
        return np.pad(values[order], (0, self._model.neurons - len(order))).tobytes()

    def _table(self, name: str, matrix: Matrix, kind: RowKind, centred: bool = True) -> None:
        """Writes a matrix of which the engine reads single rows, or the first rows."""
        run = run_rows(name) * RowFormat(kind, matrix.width).nbytes
        self._bundle.add(name, self._encode.rows(matrix, kind, centred), run)

    def _attention(self, i: int) -> None:
        """Writes a layer's vectors and its products beside the FFN."""
        add = self._bundle.add
        add(f"layer.{i}.vectors", self._encode.vectors(self._weights.layer_vectors(i)))
        known = [*self._model.products(i), *self._model.products_behind()]
        found = [*self._weights.products(i), *self._weights.products_behind(i)]
        for product, parts in zip(known, found, strict=True):
            name = f"layer.{i}.{product.name}"
            kind: RowKind = "f16" if product.fine else self._formats.of(name, self._formats.attention)
            add(name, chain.from_iterable(self._encode.rows(part, kind) for part in parts))

    def _groups(self, i: int, sizes: Floats, weigh: Weigh | None = None, starts: Starts | None = None) -> None:
        """Writes a layer's groups, the hottest first, in a section for each number of bits."""
        if not self._model.layer_groups[i]:
            return
        (ffn,) = self._weights.ffns(i)
        order = self._encode.order(ffn, sizes)
        for part in self._sections(i, starts):
            neurons = order[part.first * part.form.neurons : (part.first + part.count) * part.form.neurons]
            chunks = self._encode.groups(ffn, part.form, neurons, weigh if part.form.kind in NARROW else None)
            self._bundle.add(part.name, chunks, run=part.form.nbytes)

    def _sections(self, i: int, starts: Starts | None) -> list[FfnSection]:
        """The sections of a layer's groups, one for each number of bits."""
        every = self._model.layer_groups[i]
        ends = [starts.int3, starts.int2, every] if starts else [every]
        return layer_ffn_sections(i, group_format(self._model, self._formats, i), ends)

    def _leading(self, i: int) -> None:
        """Writes the FFN that a mixture's layer has in place of experts, if it is one of the first."""
        stated, ffn = self._model.leading_ffn(i), self._weights.leading(i)
        if stated and ffn:
            model, every = self._model.of_leading(stated), np.arange(stated.neurons)
            form = group_format(model, self._formats.of_leading)
            chunks = Encoder(model, self._count).groups(ffn, form, every)
            self._bundle.add(f"layer.{i}.leading", chunks, run=form.nbytes)

    def _experts(self, i: int, order: Numbers, weigh: Sequence[Weigh] = (), starts: Starts | None = None) -> None:
        """Writes a layer's router and its experts in the given order [E]: those that most tokens use come first.

        Some layers of a mixture have none.
        """
        if i not in self._model.paged_layers:
            return
        self._router(i, order)
        ffns, every = self._weights.ffns(i), np.arange(self._model.expert_neurons)
        (part,) = self._sections(i, starts)
        counts = weigh if part.form.kind in NARROW else [None] * len(ffns)
        chunks = (
            chunk for e in order.tolist() for chunk in self._encode.groups(ffns[e], part.form, every, counts[e])
        )
        self._bundle.add(part.name, chunks, run=part.form.nbytes)

    def _router(self, i: int, order: Numbers) -> None:
        """Writes a layer's router and the experts' vectors. Its rows [E, H] follow the order [E] of the experts."""
        rows = Matrix(self._weights.router(i).tensor, order)
        self._bundle.add(f"layer.{i}.router", self._encode.rows(rows, "f16"))
        if vectors := self._weights.expert_vectors(i, order):
            self._bundle.add(f"layer.{i}.experts", self._encode.vectors(vectors))

    def _count(self, weights: int) -> None:
        self._done += weights
        self._on_progress(min(self._done, self._total), self._total)
