"""A model file -> a bundle: section by section, a tensor or less in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np

from flashd.bundle.layout import (
    ROWS_OF_A_RUN,
    Formats,
    Header,
    Model,
    Selection,
    Text,
    group_format,
    neuron_format,
)
from flashd.bundle.rows import BLOCK, Bytes, Floats, GroupFormat, NeuronFormat, RowFormat, RowKind
from flashd.bundle.writer import BundleWriter
from flashd.errors import DataError
from flashd.pack import graphs
from flashd.pack.calibrate import Calibration, hottest_groups, sample_tokens, text_tokens
from flashd.pack.families import family_of, model_of, rope_tables
from flashd.pack.gguf import GgufModel
from flashd.pack.order import card_order
from flashd.pack.predictor import LOST, SPARSE, Layer, Selecting, Texts, fit_layer, rank_of, rates, thresholds
from flashd.pack.quantise import encode_groups, encode_neurons, encode_rows, is_ternary
from flashd.pack.safetensors import HfFolder
from flashd.pack.shapes import check_layers, check_shapes
from flashd.pack.source import Source
from flashd.pack.weights import Ffn, Matrix, Numbers, Weights

ROWS_AT_ONCE = 1024
GROUPS_AT_ONCE = 16

BENT = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What a file whose numbers contradict each other brings about in numpy and in the packages that read it."""

GRID_BITS = 5.0
"""Bits a weight, steps included, of the finest source whose levels int4 rows hold: Q4_1."""

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all)."""


def pack(
    source_path: Path,
    out: Path,
    rows: RowKind,
    on_progress: Progress = lambda done, total: None,
    selecting: Selecting | None = None,
) -> Header:
    """Packs the model at `source_path` into the bundle `out`, replacing it at the end or not at all.

    With `selecting` a predictor says which neurons take part; without, all do.

    Raises:
        InputMissing, DataError: the model file is missing, damaged or of an unknown kind; or no predictor of its
            neurons costs as little as was asked.
        CannotWrite: the disk is full or the folder cannot be written.
    """
    try:
        return _Packer(open_source(source_path), rows, on_progress, selecting).write(out)
    except BENT as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source_path}: its parts do not fit together ({what}); download it again") from error


def open_source(path: Path) -> Source:
    """The model at `path`: a Hugging Face folder, or a GGUF file. Raises InputMissing, DataError."""
    return HfFolder(path) if path.is_dir() else GgufModel(path)


class _Packer:
    def __init__(self, source: Source, rows: RowKind, on_progress: Progress, selecting: Selecting | None) -> None:
        self.source, self._selecting = source, selecting
        check_layers(source)
        family = family_of(source)
        self.model: Model = model_of(source, family)
        self.rope: Floats = rope_tables(source, family)
        self.weights = Weights(source, family, self.model)
        check_shapes(self.weights, self.model)
        self.formats = _formats(self.weights, self.model, rows)
        if self.formats.ffn == "int4" and _finer(self.weights, self.model) > 0.5:
            log.warning(
                "%s: most weights have 5 to 8 bits, which int4 rows round; --rows int8 keeps them", source.path
            )
        if selecting:
            _check_selectable(source.path, self.model, self.formats)
        self._on_progress = on_progress
        self._done = 0
        self._total = sum(prod(source.tensor(n).shape) for n in source.names)

    def write(self, out: Path) -> Header:
        vocabulary = self.source.vocabulary()
        with BundleWriter(out) as writer:
            writer.add("tokenizer", [vocabulary.tokenizer_json])
            writer.add("token_bytes", [vocabulary.token_bytes.to_bytes()])
            for name, graph in graphs.build(self.model, self.formats, self._selecting is not None).items():
                writer.add(name, [graph])
            writer.add("rope", [self.rope.tobytes()])
            writer.add("vectors", self._vectors(self.weights.model_vectors()))
            if not self.weights.tied:
                self._add_table(writer, "embedding", self.weights.embedding(), self.formats.embedding)
            self._add_table(writer, "head", self.weights.head(), self.formats.head, self.formats.centred_head)
            if self.model.positions:
                self._add_table(writer, "positions", self.weights.positions(), "f16")
            selection = self._add_layers(writer, vocabulary.tokenizer_json)
            text = Text(
                eos=vocabulary.eos, bos=vocabulary.bos, add_bos=vocabulary.add_bos,
                chat_template=vocabulary.chat_template,
            )  # fmt: skip
            return writer.finish(
                model=self.model, formats=self.formats, text=text, source=self.source.source(), selection=selection
            )  # fmt: skip

    def _add_table(
        self, writer: BundleWriter, name: str, matrix: Matrix, kind: RowKind, centred: bool = True
    ) -> None:
        """A matrix of which the engine reads a row here and there, or some rows."""
        run = ROWS_OF_A_RUN * RowFormat(kind, self.model.hidden).nbytes
        writer.add(name, self._rows(matrix, kind, centred), run)

    def _add_layers(self, writer: BundleWriter, tokenizer_json: bytes) -> Selection | None:
        if self._selecting:
            return self._add_selected(writer, tokenizer_json, self._selecting)
        sample = sample_tokens(tokenizer_json)[: self.model.context]
        calibration, form = self._calibration([sample]), group_format(self.model, self.formats)
        for i in range(self.model.layers):
            self._add_attention(writer, i)
            writer.add(f"layer.{i}.ffn", self._ffn(writer, calibration, form, i), run=form.nbytes)
        return None

    def _add_selected(self, writer: BundleWriter, tokenizer_json: bytes, selecting: Selecting) -> Selection:
        """Writes the layers with a bundle a neuron, in an order of their own, and what chooses among them."""
        texts = Texts.cut(text_tokens(tokenizer_json, selecting.text), self.model.context)
        fitted = sum(len(text) for text in texts.fit)
        calibration, form = self._calibration([*texts.fit, *texts.choose]), neuron_format(self.model, self.formats)
        layers, orders = [], []
        for i in range(self.model.layers):
            self._add_attention(writer, i)
            seen = calibration.layer(i)
            order = self._filled(card_order(seen.a[:fitted] > 0))
            writer.add(f"layer.{i}.ffn", self._neurons(i, form, order), run=form.nbytes)
            (ffn,) = self.weights.ffns(i)
            lean = ffn.biases[:, 0] if ffn.biases.size else np.zeros(len(ffn.biases), np.float32)
            matrix, rank = ffn.inputs[0].rows(slice(None)), rank_of(i, self.model, selecting.rank)
            layers.append(fit_layer(seen, fitted, order, matrix, lean - self.model.threshold, rank))
            orders.append(order)
        return self._add_predictors(writer, layers, orders, texts.judge, selecting.max_loss)

    def _ffn(self, writer: BundleWriter, calibration: Calibration, form: GroupFormat, i: int) -> Iterator[bytes]:
        """A layer's groups, the hottest first; of a mixture its experts, whose router is written here."""
        ffns = self.weights.ffns(i)
        if self.model.experts is None:
            return self._groups(ffns[0], form, hottest_groups(calibration.layer(i), self.model))
        order = calibration.mixture(i)
        # the router's rows move with their experts, so that the hottest is number 0
        writer.add(f"layer.{i}.router", self._rows(Matrix(self.weights.router(i).tensor, order), "f16"))
        every = np.arange(self.model.expert_groups)
        return (chunk for expert in order.tolist() for chunk in self._groups(ffns[expert], form, every))

    def _add_predictors(
        self, writer: BundleWriter, layers: list[Layer], orders: list[Numbers], texts: list[Numbers], most: float
    ) -> Selection:
        """Writes the layers' predictors with the thresholds that choose fewest neurons.

        Raises DataError where they all raise perplexity by more than `most`, in parts of it.
        """
        exact = self._judged(texts, None, orders)
        for lost in LOST:
            thresholds(layers, lost)
            found = self._judged(texts, layers, orders)
            if found <= exact * (1 + most):
                break
        else:
            raise DataError(
                f"{self.source.path}: the best predictor raises perplexity by {100 * (found / exact - 1):.2f} %,"
                f" which is more than {100 * most:.2f} %; pack it with --select exact, or give"
                " more text, or allow more"
            )
        often = rates(layers)
        writer.add("rates", [often.tobytes()])
        for i, layer in enumerate(layers):
            if not layer.dense:
                writer.add(f"layer.{i}.narrow", [layer.predictor.narrow.tobytes()])
                writer.add(f"layer.{i}.wide", [layer.predictor.wide.tobytes()])
                writer.add(f"layer.{i}.lean", [layer.predictor.lean.tobytes()])
        return Selection(
            ranks=[0 if layer.dense else layer.predictor.rank for layer in layers],
            thresholds=[layer.threshold for layer in layers], chosen=often.mean(1).tolist(),
            fired=[layer.fired for layer in layers], tokens=sum(len(text) - 1 for text in texts),
            perplexity_exact=exact, perplexity=found,
        )  # fmt: skip

    def _judged(self, texts: list[Numbers], layers: list[Layer] | None, orders: list[Numbers]) -> float:
        """Perplexity of texts, of all neurons or of those that the layers' predictors choose."""
        judge = self._calibration(texts)
        for i, order in enumerate(orders):
            if layers is None:
                judge.layer(i)
                continue
            placed, neurons = np.argsort(order), self.weights.ffns(i)[0].down.shape[-1]
            judge.layer(i, lambda h, layer=layers[i], at=placed[:neurons]: layer.chosen(h)[:, at])  # type: ignore[misc]
        return judge.perplexity()

    def _calibration(self, texts: list[Numbers]) -> Calibration:
        return Calibration(self.weights, self.model, self.rope, texts)

    def _filled(self, order: Numbers) -> Numbers:
        """The order of a layer's neurons with those behind them that only fill the last block."""
        return np.concatenate([order, np.arange(len(order), self.model.neurons)])

    def _neurons(self, i: int, form: NeuronFormat, order: Numbers) -> Iterator[bytes]:
        """A layer's bundles of one neuron each, in the order of the card."""
        (ffn,) = self.weights.ffns(i)
        inputs, bias, down = ffn.inputs, ffn.biases, ffn.down.rows()
        filling = self.model.neurons - down.shape[1]
        down, bias = np.pad(down, ((0, 0), (0, filling))), np.pad(bias, ((0, filling), (0, 0)))
        for at in range(0, len(order), ROWS_AT_ONCE):
            neurons = order[at : at + ROWS_AT_ONCE]
            records = [self._padded_rows(matrix, form.row, neurons) for matrix in inputs]
            self._count(form.hidden * len(neurons))
            yield encode_neurons(records, down[:, neurons], bias[neurons], form).tobytes()

    def _add_attention(self, writer: BundleWriter, i: int) -> None:
        attention = self.formats.attention
        writer.add(f"layer.{i}.vectors", self._vectors(self.weights.layer_vectors(i)))
        qkv = self.weights.qkv(i)
        writer.add(f"layer.{i}.qkv", (chunk for part in qkv for chunk in self._rows(part, attention)))
        writer.add(f"layer.{i}.output", self._rows(self.weights.output(i), attention))

    def _vectors(self, vectors: dict[str, Floats]) -> Iterator[bytes]:
        for vector in vectors.values():
            self._count(vector.size)
            yield vector.tobytes()

    def _rows(self, matrix: Matrix, kind: RowKind, centred: bool = True) -> Iterator[bytes]:
        """A matrix's row records, chunk by chunk."""
        form = RowFormat(kind, matrix.width)
        for at in range(0, len(matrix), ROWS_AT_ONCE):
            yield self._encode(matrix, form, slice(at, at + ROWS_AT_ONCE), centred).tobytes()

    def _encode(self, matrix: Matrix, form: RowFormat, which: slice | Numbers, centred: bool = True) -> Bytes:
        weights = matrix.rows(which)
        self._count(weights.size)
        return encode_rows(weights, form, matrix.grid(which), centred)

    def _groups(self, ffn: Ffn, form: GroupFormat, order: Numbers) -> Iterator[bytes]:
        """An FFN's groups in their order. A group stays whole: its 32 columns share the source's grid."""
        down, grid = ffn.down.rows(), ffn.down.grid()
        filling = len(order) * BLOCK - down.shape[1]
        down, bias = np.pad(down, ((0, 0), (0, filling))), np.pad(ffn.biases, ((0, filling), (0, 0)))
        for at in range(0, len(order), GROUPS_AT_ONCE):
            groups = order[at : at + GROUPS_AT_ONCE]
            neurons = (groups[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
            records = [self._padded_rows(matrix, form.row, neurons) for matrix in ffn.inputs]
            part = None if grid is None else (grid[0][:, groups], grid[1][:, groups])
            self._count(form.hidden * len(neurons))
            yield encode_groups(records, down[:, neurons], bias[neurons], form, part).tobytes()

    def _padded_rows(self, matrix: Matrix, form: RowFormat, neurons: Numbers) -> Bytes:
        """Row records of some neurons; those that only fill the last group are zero."""
        real = neurons < len(matrix)
        out = np.zeros((len(neurons), form.nbytes), np.uint8)
        out[real] = self._encode(matrix, form, neurons[real])
        return out

    def _count(self, weights: int) -> None:
        self._done += weights
        self._on_progress(min(self._done, self._total), self._total)


def _formats(weights: Weights, model: Model, rows: RowKind) -> Formats:
    """`rows` for the FFN and attention; 8 bits for a head or embedding whose source has as many.

    Measured: a 4-bit head costs SmolLM2 (source Q8_0) a mean KL of 0.056, Qwen2.5-Coder-1.5B (source Q6_K)
    0.008, where int4 rows are allowed 0.03 in all. Layers that are ternary stay so, unless f16 is asked for: they
    lose nothing by it.
    """

    def widened(matrix: Matrix) -> RowKind:
        return "int8" if rows == "int4" and matrix.bits >= 8 else rows

    ternary = rows != "f16" and model.experts is None and all(_ternary(weights, i) for i in range(model.layers))
    inner = "ternary" if ternary else rows
    return Formats(
        ffn=inner, attention=inner, head=widened(weights.head()), embedding=widened(weights.embedding())
    )  # fmt: skip


def _check_selectable(path: Path, model: Model, formats: Formats) -> None:
    """Raises DataError for a model whose neurons no predictor can choose."""
    if model.experts or formats.ffn == "ternary" or model.normed_neurons:
        raise DataError(
            f"{path}: a predictor is for plain layers, not for mixtures of experts or BitNet; pack it with"
            " --select exact"
        )
    if model.activation not in SPARSE:
        raise DataError(
            f"{path}: its activation is {model.activation}, of which few neurons are zero; a predictor is for"
            f" {', '.join(sorted(SPARSE))}; pack it with --select exact"
        )


def _finer(weights: Weights, model: Model) -> float:
    """The share of the layers' weights that the source has rounded, but to more levels than int4 rows have.

    Measured: SmolLM2 with noise of a 4-bit step, as Q5_0, has a mean KL of 0.25 with int4 rows, 0.001 with int8.
    """
    finer = total = 0
    for i in range(model.layers):
        tensors = [part.tensor for part in (*weights.qkv(i), weights.output(i))]
        tensors += [tensor for ffn in weights.ffns(i) for tensor in (*(part.tensor for part in ffn.inputs), ffn.down)]
        for tensor in tensors:
            total += prod(tensor.shape)
            finer += prod(tensor.shape) * (GRID_BITS < tensor.bits < 16)
    return finer / total


def _ternary(weights: Weights, i: int) -> bool:
    """Whether all matrices of a layer are; of most models the first rows tell that they are not."""
    (ffn,) = weights.ffns(i)
    for matrix in (*ffn.inputs, *weights.qkv(i), weights.output(i)):
        parts = [slice(0, BLOCK), *(slice(at, at + ROWS_AT_ONCE) for at in range(0, len(matrix), ROWS_AT_ONCE))]
        if not all(is_ternary(matrix.rows(part)) for part in parts):
            return False
    return is_ternary(ffn.down.rows().T)
