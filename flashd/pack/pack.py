"""A model file -> a bundle: section by section, a tensor or less in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np

from flashd.bundle.layout import (
    ROWS_OF_A_RUN,
    Formats,
    Header,
    Model,
    Narrowed,
    Selection,
    Text,
    group_format,
    layer_parts,
    neuron_format,
    pair_format,
)
from flashd.bundle.rows import (
    BLOCK,
    NARROW,
    Bytes,
    Floats,
    GroupFormat,
    NeuronFormat,
    QuantGroups,
    RowFormat,
    RowKind,
)
from flashd.bundle.writer import BundleWriter
from flashd.errors import DataError
from flashd.pack import gate, graphs, narrow
from flashd.pack.calibrate import (
    Calibration,
    Dense,
    Mask,
    Seen,
    hottest,
    neurons_of,
    sample_tokens,
    text_tokens,
)
from flashd.pack.families import family_of, model_of, rope_tables
from flashd.pack.feedback import encode_fed
from flashd.pack.gate import Gating
from flashd.pack.gguf import GgufModel
from flashd.pack.narrow import Judgement, Narrowing, Starts, Weigh
from flashd.pack.order import card_order
from flashd.pack.predictor import (
    LEAST_TOKENS,
    LOST,
    SPARSE,
    WORTH,
    Layer,
    Part,
    Scored,
    Selecting,
    Texts,
    cost_of_experts,
    cost_of_neurons,
    fit,
    joined,
    rank_of,
)
from flashd.pack.quantise import encode_groups, encode_neurons, encode_rows, is_ternary
from flashd.pack.safetensors import HfFolder
from flashd.pack.shapes import check_layers, check_shapes
from flashd.pack.source import Grid, Source
from flashd.pack.weights import Ffn, Matrix, Numbers, Weights

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1024
GROUPS_AT_ONCE = 16

BENT = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What a file whose numbers contradict each other brings about in numpy and in the packages that read it."""

GRID_BITS = 5.0
"""Bits a weight, steps included, of the finest source whose levels int4 rows hold: Q4_1."""

Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all)."""


def pack(
    source_path: Path,
    out: Path,
    rows: RowKind,
    on_progress: Progress = lambda done, total: None,
    allowed: Selecting | Gating | Narrowing | None = None,
) -> Header:
    """Packs the model at `source_path` into the bundle `out`, replacing it at the end or not at all.

    Where a loss is allowed: with Selecting a predictor says which neurons take part, unless whole experts are read
    about as soon; with Gating their gates do, unless all are needed or read about as soon; with Narrowing what
    matters least has fewer bits on the card, unless all of it matters too much.

    Raises:
        InputMissing, DataError: the model file is missing, damaged or of an unknown kind; or no predictor of its
            neurons costs as little as was asked.
        CannotWrite: the disk is full or the folder cannot be written.
    """
    try:
        return _Packer(open_source(source_path), rows, on_progress, allowed).write(out)
    except BENT as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source_path}: its parts do not fit together ({what}); download it again") from error


def open_source(path: Path) -> Source:
    """The model at `path`: a Hugging Face folder, or a GGUF file. Raises InputMissing, DataError."""
    return HfFolder(path) if path.is_dir() else GgufModel(path)


@dataclass
class _Try:
    """One of the budgets that are tried: what it makes of the judging texts, and of the layers."""

    calibration: Calibration
    starts: list[Starts] = field(default_factory=list)

    def shares(self, groups: int) -> str:
        """Per cent of all groups that have 4, 3 and 2 bits."""
        int3 = 100 * sum(s.int3 for s in self.starts) / len(self.starts) / groups
        int2 = 100 * sum(s.int2 for s in self.starts) / len(self.starts) / groups
        return f"{int3:.0f}, {int2 - int3:.0f}, {100 - int2:.0f} %"


@dataclass
class _Selected:
    """What chooses among neurons, before it is written."""

    layers: list[Layer]
    rates: Floats  # [L, F]
    selection: Selection


@dataclass
class _Gated:
    """The same, where gates choose."""

    layers: list[gate.Layer]
    selection: Selection


@dataclass
class _Skipping:
    """What gates may skip."""

    layers: list[gate.Layer]  # their steps set
    found: Judgement
    asked: gate.Asked


class _Packer:
    def __init__(
        self,
        source: Source,
        rows: RowKind,
        on_progress: Progress,
        allowed: Selecting | Gating | Narrowing | None,
    ) -> None:
        self.source = source
        self._selecting = selecting = allowed if isinstance(allowed, Selecting) else None
        self._gating = allowed if isinstance(allowed, Gating) else None
        self._narrowing = allowed if isinstance(allowed, Narrowing) else None
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
        if self._gating:
            _check_gated(source.path, self.model, self.formats)
        if self._narrowing:
            _check_narrowable(source.path, self.model, self.formats)
        self._on_progress = on_progress
        self._done = 0
        self._total = sum(prod(source.tensor(n).shape) for n in source.names)

    def write(self, out: Path) -> Header:
        vocabulary = self.source.vocabulary()
        context, narrowing = self.model.context, self._narrowing
        # before anything long: the text may be too short
        texts = narrow.cut(vocabulary.tokenizer_json, narrowing.text, context) if narrowing else None
        selected = self._selected(vocabulary.tokenizer_json, self._selecting) if self._selecting else None
        gated = self._gated(vocabulary.tokenizer_json, self._gating) if self._gating else None
        chosen = selected or gated
        selection = chosen.selection if chosen else None
        chooser = selection.kind if selection else None
        with BundleWriter(out) as writer:
            writer.add("tokenizer", [vocabulary.tokenizer_json])
            writer.add("token_bytes", [vocabulary.token_bytes.to_bytes()])
            for name, graph in graphs.build(self.model, self.formats, chooser).items():
                writer.add(name, [graph])
            writer.add("rope", [self.rope.tobytes()])
            writer.add("vectors", self._vectors(self.weights.model_vectors()))
            if not self.weights.tied:
                self._add_table(writer, "embedding", self.weights.embedding(), self.formats.embedding)
            self._add_table(writer, "head", self.weights.head(), self.formats.head, self.formats.centred_head)
            if self.model.positions:
                self._add_table(writer, "positions", self.weights.positions(), "f16")
            narrowed = None
            if selected:
                self._add_selected(writer, selected)
            elif gated:
                self._add_gated(writer, gated)
            elif narrowing and texts:
                narrowed = self._add_narrowed(writer, *texts, narrowing.max_loss)
            else:
                self._add_exact(writer, vocabulary.tokenizer_json)
            known = range(self.model.vocabulary)
            text = Text(
                eos=[t for t in vocabulary.eos if t in known],
                bos=vocabulary.bos if vocabulary.bos in known else None, add_bos=vocabulary.add_bos,
                chat_template=vocabulary.chat_template,
            )  # fmt: skip
            return writer.finish(
                model=self.model, formats=self.formats, text=text, source=self.source.source(),
                selection=selection, narrowed=narrowed,
            )  # fmt: skip

    def _add_table(
        self, writer: BundleWriter, name: str, matrix: Matrix, kind: RowKind, centred: bool = True
    ) -> None:
        """A matrix of which the engine reads a row here and there, or some rows."""
        run = ROWS_OF_A_RUN * RowFormat(kind, self.model.hidden).nbytes
        writer.add(name, self._rows(matrix, kind, centred), run)

    def _add_exact(self, writer: BundleWriter, tokenizer_json: bytes) -> None:
        calibration = self._calibration([sample_tokens(tokenizer_json)[: self.model.context]])
        for i in range(self.model.layers):
            self._add_attention(writer, i)
            if self.model.experts:
                self._add_experts(writer, calibration, i)
            else:
                self._add_parts(writer, i, calibration.layer(i).sizes())

    def _add_narrowed(
        self, writer: BundleWriter, fit: list[Numbers], judged: list[Numbers], max_loss: float
    ) -> Narrowed | None:
        """The layers, their coldest groups with as few bits as the allowed loss admits; None where it admits none."""
        calibration, exact = self._calibration(fit), self._calibration(judged)
        tries = [_Try(self._calibration(judged)) for _ in narrow.BUDGETS]
        sizes, weighs = [], []
        for i in range(self.model.layers):
            seen = calibration.layer(i)
            sizes.append(seen.sizes())
            weighs.append(Weigh.of(seen))
            self._try_layer(i, calibration, seen, weighs[i], exact, tries)
        found = narrow.judge(exact, [t.calibration for t in tries])
        admitted = self._admitted(tries, found, max_loss)
        chosen = None if admitted is None else tries[admitted].starts
        for i, (size, weigh) in enumerate(zip(sizes, weighs, strict=True)):
            self._add_attention(writer, i)
            self._add_parts(writer, i, size, weigh, chosen[i] if chosen else None)
        if admitted is None:
            return None
        return Narrowed(
            int3=[s.int3 for s in tries[admitted].starts], int2=[s.int2 for s in tries[admitted].starts],
            tokens=sum(len(text) - 1 for text in judged), perplexity_exact=found[admitted].perplexity_exact,
            perplexity=found[admitted].perplexity, divergence=found[admitted].divergence,
        )  # fmt: skip

    def _admitted(self, tries: list[_Try], found: list[Judgement], max_loss: float) -> int | None:
        """The number of the first try that narrows anything and costs what is allowed."""
        for budget, t, f in zip(narrow.BUDGETS, tries, found, strict=True):
            log.info(
                "errors up to %g and %g: groups of 4, 3 and 2 bits %s; perplexity %+.2f %%, KL %.4f",
                budget.int3, budget.int2, t.shares(self.model.groups), 100 * f.loss, f.divergence,
            )  # fmt: skip
        for i, (t, f) in enumerate(zip(tries, found, strict=True)):
            if f.loss <= max_loss and any(s.int3 < self.model.groups for s in t.starts):
                return i
        log.warning(
            "%s: the least that was tried raises perplexity by %.2f %%, which is more than %.2f %%: packed exact",
            self.source.path, 100 * min(f.loss for f in found), 100 * max_loss,
        )  # fmt: skip
        return None

    def _try_layer(
        self, i: int, calibration: Calibration, seen: Seen, weigh: Weigh, exact: Calibration, tries: list[_Try]
    ) -> None:
        """Takes the judging texts through a layer, exact and with what each budget admits of narrow groups."""
        (ffn,) = self.weights.ffns(i)
        order, kept = self._order(ffn, seen.sizes()), self.model.groups // narrow.KEPT
        own = self._dense(ffn, order)
        thin = {kind: self._rounded(ffn, kind, order[kept * BLOCK :], weigh) for kind in NARROW}
        cold = own.part(kept * BLOCK, None)
        errors = {kind: narrow.group_errors(calibration, seen, cold, thin[kind]) for kind in NARROW}
        exact.replaced(i, own)
        for t, budget in zip(tries, narrow.BUDGETS, strict=True):
            at = narrow.starts(errors["int3"], errors["int2"], budget)
            t.starts.append(Starts(kept + at.int3, kept + at.int2))
            a, b = at.int3 * BLOCK, at.int2 * BLOCK
            parts = [own.part(0, kept * BLOCK + a), thin["int3"].part(a, b), thin["int2"].part(b, None)]
            t.calibration.replaced(i, narrow.joined(parts))

    def _dense(self, ffn: Ffn, order: Numbers) -> Dense:
        """An FFN's weights as they are, its neurons in their order."""
        (down, bias), filling = self._filled_up(ffn), self._filling(ffn)
        inputs = [np.pad(matrix.rows(slice(None)), ((0, filling), (0, 0)))[order] for matrix in ffn.inputs]
        return Dense(inputs, bias[order], down[:, order])

    def _filled_up(self, ffn: Ffn) -> tuple[Floats, Floats]:
        """down_proj [H, F] and the biases [F, M] of an FFN; neurons that only fill its last block are zero."""
        filling = self._filling(ffn)
        return np.pad(ffn.down.rows(), ((0, 0), (0, filling))), np.pad(ffn.biases, ((0, filling), (0, 0)))

    def _filling(self, ffn: Ffn) -> int:
        """Neurons that only fill an FFN's last block."""
        return self.model.expert_groups * BLOCK - ffn.down.shape[-1]

    def _rounded(self, ffn: Ffn, kind: RowKind, order: Numbers, weigh: Weigh) -> Dense:
        """What becomes of some neurons' weights in so many bits."""
        form = replace(group_format(self.model, self.formats), kind=kind)
        done = self._done
        raw = np.frombuffer(b"".join(self._groups(ffn, form, order, weigh)), np.uint8).reshape(-1, form.nbytes)
        self._done = done  # a try is not progress
        groups = form.groups(raw)
        assert isinstance(groups, QuantGroups)
        return narrow.floats(groups)

    def _add_parts(
        self, writer: BundleWriter, i: int, sizes: Floats, weigh: Weigh | None = None, starts: Starts | None = None
    ) -> None:
        """A layer's groups, the hottest first, in sections of one width each."""
        (ffn,) = self.weights.ffns(i)
        order, every = self._order(ffn, sizes), self.model.groups
        ends = [starts.int3, starts.int2, every] if starts else [every]
        for part in layer_parts(i, group_format(self.model, self.formats), ends):
            neurons = order[part.first * BLOCK : (part.first + part.count) * BLOCK]
            chunks = self._groups(ffn, part.form, neurons, weigh if part.form.kind in NARROW else None)
            writer.add(part.section, chunks, run=part.form.nbytes)

    def _order(self, ffn: Ffn, sizes: Floats) -> Numbers:
        """The card's order of an FFN's neurons."""
        return hottest(sizes, self.model, whole=ffn.down.grid(slice(1)) is not None)

    def _selected(self, tokenizer_json: bytes, selecting: Selecting) -> _Selected | None:
        """Predictors of the layers, with the thresholds that choose fewest neurons; None where that does not pay.

        Raises DataError where they all raise perplexity by more than is allowed.
        """
        texts = Texts.cut(text_tokens(tokenizer_json, selecting.text), self.model.context)
        calibration, fitted = self._calibration([*texts.fit, *texts.choose]), sum(len(text) for text in texts.fit)
        tokens = sum(len(text) for text in texts.choose)
        layers = [self._fit(i, calibration, fitted, tokens, selecting.rank) for i in range(self.model.layers)]
        exact = self._judged(texts.judge, None)
        for lost in LOST:
            for layer in layers:
                layer.choose(lost)
            found = self._judged(texts.judge, layers)
            if found <= exact * (1 + selecting.max_loss):
                break
        else:
            raise DataError(
                f"{self.source.path}: the best predictor raises perplexity by {100 * (found / exact - 1):.2f} %,"
                f" which is more than {100 * selecting.max_loss:.2f} %; pack it with --select exact or wider --rows,"
                " or give more text, or allow more"
            )
        if self.model.experts and not self._pays(layers):
            return None
        often = np.stack([layer.rates() for layer in layers])
        selection = Selection(
            ranks=[layer.rank for layer in layers], thresholds=[layer.threshold for layer in layers],
            chosen=often.mean(1).tolist(), fired=[layer.fired for layer in layers],
            tokens=sum(len(text) - 1 for text in texts.judge), perplexity_exact=exact, perplexity=found,
        )  # fmt: skip
        return _Selected(layers, often, selection)

    def _fit(self, i: int, calibration: Calibration, fitted: int, tokens: int, rank: int | None) -> Layer:
        """Takes the texts through a layer and fits its predictors: `fitted` tokens train, `tokens` follow them."""
        ffns, parts = self.weights.ffns(i), dict[int, tuple[Part, Scored]]()
        h = np.zeros((tokens, self.model.hidden), np.float32)  # once, however many experts a token uses

        def sees(number: int, uses: Numbers, seen: Seen) -> None:
            ffn, training = ffns[number], int(np.searchsorted(uses, fitted))
            h[uses[training:] - fitted] = seen.h[training:]
            known = training >= LEAST_TOKENS
            order = card_order(seen.a[:training] != 0) if known else np.arange(len(seen.reach))
            lean = ffn.biases[:, 0] if ffn.biases.size else np.zeros(len(ffn.biases), np.float32)
            parts[number] = fit(
                seen, training, uses[training:] - fitted, self._filled(order), ffn.inputs[0].rows(slice(None)),
                lean - self.model.threshold, rank_of(i, self.model, rank),
            )  # fmt: skip

        hottest = calibration.mixture(i, sees=sees)
        own = ffns[0].down.shape[-1]
        for number in set(range(len(ffns))) - set(parts):
            sees(number, np.zeros(0, np.int64), Seen.nothing(self.model.hidden, own))
        fired = sum(part.fired for part, _ in parts.values())
        return joined(parts, hottest, h, fired / ((fitted + tokens) * own * len(ffns)))

    def _pays(self, layers: list[Layer]) -> bool:
        """Whether a card gives the chosen neurons that much sooner than whole experts; says so."""
        neurons = cost_of_neurons(layers, neuron_format(self.model, self.formats).nbytes)
        experts = cost_of_experts(
            self.model, self.model.expert_groups * group_format(self.model, self.formats).nbytes
        )
        takes = neurons.weight / experts.weight
        pays = takes <= WORTH
        log.warning(
            "%s: packed %s: single neurons take a card %.0f %% of the time of whole experts (%.0f KiB in %.0f reads a"
            " token, %.0f KiB in %.0f), and up to %.0f %% are worth a loss",
            self.source.path, "with single neurons" if pays else "exact, with whole experts", 100 * takes,
            neurons.nbytes / 1024, neurons.reads, experts.nbytes / 1024, experts.reads, 100 * WORTH,
        )  # fmt: skip
        return pays

    def _add_selected(self, writer: BundleWriter, selected: _Selected) -> None:
        """Writes the layers with a bundle a neuron, in an order of their own, and what chooses among them."""
        form = neuron_format(self.model, self.formats)
        for i, layer in enumerate(selected.layers):
            self._add_attention(writer, i)
            if self.model.experts:
                self._add_router(writer, i, layer.experts)
            ffns = [self.weights.ffns(i)[number] for number in layer.experts.tolist()]
            neurons = [self._neurons(ffn, form, part.order) for ffn, part in zip(ffns, layer.parts, strict=True)]
            writer.add(f"layer.{i}.ffn", chain.from_iterable(neurons), run=form.nbytes)
        writer.add("rates", [selected.rates.tobytes()])
        for i, layer in enumerate(selected.layers):
            if layer.rank:
                predictors = [part.predictor for part in layer.parts]
                writer.add(f"layer.{i}.narrow", [p.narrow.tobytes() for p in predictors])
                writer.add(f"layer.{i}.wide", [p.wide.tobytes() for p in predictors])
                writer.add(f"layer.{i}.lean", [p.lean.tobytes() for p in predictors])

    def _gated(self, tokenizer_json: bytes, gating: Gating) -> _Gated | None:
        """The layers, their gates skipping as much as the allowed loss admits; None where that is not worth it."""
        fitted, judged = narrow.cut(tokenizer_json, gating.text, self.model.context)
        calibration, exact = self._calibration(fitted), self._calibration(judged)
        tries = zip(*(self._gate(i, calibration) for i in range(self.model.layers)), strict=True)
        for i in range(self.model.layers):
            exact.mixture(i)
        tried = [self._most_skipped(judged, exact, list(layers), gating.max_loss) for layers in tries]
        admitted = [each for each in tried if each.found.loss <= gating.max_loss]
        if not admitted:
            log.warning(
                "%s: gates that skip %.0f %% of neurons raise perplexity by %.2f %%, which is more than %.2f %%:"
                " packed exact", self.source.path, 100 * gate.LEVELS[0], 100 * min(t.found.loss for t in tried),
                100 * gating.max_loss,
            )  # fmt: skip
            return None
        cheapest = min(admitted, key=lambda each: each.asked.cost.weight)
        if not self._gates_pay(cheapest):
            return None
        layers, found = cheapest.layers, cheapest.found
        selection = Selection(
            kind="gate", thresholds=[layer.threshold for layer in layers],
            chosen=[float(layer.often.mean()) for layer in layers], fired=[layer.fired for layer in layers],
            tokens=sum(len(text) - 1 for text in judged), perplexity_exact=found.perplexity_exact,
            perplexity=found.perplexity,
        )  # fmt: skip
        return _Gated(layers, selection)

    def _most_skipped(
        self, judged: list[Numbers], exact: Calibration, layers: list[gate.Layer], max_loss: float
    ) -> _Skipping:
        """The layers, skipping the most that keeps to the loss; the least that is tried where nothing does."""
        levels = (0.0,) if self.model.activation in SPARSE else gate.LEVELS
        first, last = 0, len(levels) - 1
        admitted = None
        while first <= last:
            at = (first + last) // 2
            found, asked = self._try_gates(judged, exact, layers, levels[at])
            if found.loss <= max_loss:
                admitted, first = (levels[at], found, asked), at + 1
            else:
                last = at - 1
        level, found, asked = admitted or (levels[0], found, asked)
        gate.share_out(layers, level)
        return _Skipping(layers, found, asked)

    def _gate(self, i: int, calibration: Calibration) -> tuple[gate.Layer, ...]:
        """Takes the texts through a layer and finds the thresholds of its gates, by what is preferred."""
        seen = calibration.layer(i)
        down = self.weights.ffns(i)[0].down.rows()
        gates = calibration.gates(i, seen.h)
        return gate.fit(gates, seen, down, calibration.states, self.model.activation in SPARSE)

    def _try_gates(
        self, judged: list[Numbers], exact: Calibration, layers: list[gate.Layer], level: float
    ) -> tuple[Judgement, gate.Asked]:
        """What skipping so much makes of the judging texts."""
        gate.share_out(layers, level)
        tried, asked = self._calibration(judged), gate.Asked(pair_format(self.model, self.formats).nbytes)
        for i, layer in enumerate(layers):

            def chooses(_expert: int, h: Floats, i: int = i, layer: gate.Layer = layer) -> Mask:
                chosen = layer.chosen(tried.gates(i, h))
                asked.count(layer.missed(chosen))
                return chosen

            tried.mixture(i, chooses)
        (found,) = narrow.judge(exact, [tried])
        log.info(
            "gates that skip %.0f %% of %s: perplexity %+.2f %%, KL %.4f, %.0f KiB in %.0f reads a token",
            100 * level, gate.skippable(layers), 100 * found.loss, found.divergence,
            asked.cost.nbytes / 1024, asked.cost.reads,
        )  # fmt: skip
        return found, asked

    def _gates_pay(self, skipping: _Skipping) -> bool:
        """Whether a card gives what the gates choose that much sooner than everything; says so."""
        some, everything = skipping.asked.cost, skipping.asked.of_all(self.model.neurons)
        takes = some.weight / everything.weight
        pays = takes <= WORTH
        log.warning(
            "%s: packed %s: its gates skip %.1f %% of neurons, perplexity %+.2f %%; with RAM for half of them those"
            " chosen take a card %.0f %% of the time of all (%.0f KiB in %.0f reads a token, %.0f KiB in %.0f), and"
            " up to %.0f %% are worth it",
            self.source.path, "with gates that choose" if pays else "exact",
            100 * (1 - float(np.mean([layer.often.mean() for layer in skipping.layers]))), 100 * skipping.found.loss,
            100 * takes, some.nbytes / 1024, some.reads, everything.nbytes / 1024, everything.reads, 100 * WORTH,
        )  # fmt: skip
        return pays

    def _add_gated(self, writer: BundleWriter, gated: _Gated) -> None:
        """Writes the layers with their gate rows apart, and a bundle a neuron in an order of its own."""
        form = group_format(self.model, self.formats)
        every = np.arange(self.model.neurons)
        for i, layer in enumerate(gated.layers):
            self._add_attention(writer, i)
            (ffn,) = self.weights.ffns(i)
            raw = np.frombuffer(b"".join(self._groups(ffn, form, every)), np.uint8).reshape(-1, form.nbytes)
            gates, units, steps = gate.parted(raw, form)
            order = self._filled(layer.order)
            writer.add(f"layer.{i}.ffn", [units[order].tobytes()], run=units.shape[1])
            writer.add(f"layer.{i}.gate", [gates[order].tobytes()])
            writer.add(f"layer.{i}.floors", [self._ordered(layer.floors, layer.order)])
            if steps.size:
                writer.add(f"layer.{i}.steps", [steps.tobytes()])
                writer.add(f"layer.{i}.groups", [(order // BLOCK).astype("<i4").tobytes()])
        writer.add("rates", [self._ordered(layer.often, layer.order) for layer in gated.layers])

    def _ordered(self, values: Floats, order: Numbers) -> bytes:
        """A number a neuron [F], in the order of the card; 0 of those that only fill the last block."""
        return np.pad(values[order], (0, self.model.neurons - len(order))).tobytes()

    def _judged(self, texts: list[Numbers], layers: list[Layer] | None) -> float:
        """Perplexity of texts, of all neurons or of those that the layers' predictors choose, as they are written."""
        judge, form = self._calibration(texts), neuron_format(self.model, self.formats)
        for i in range(self.model.layers):
            if layers:
                judge.mixture(i, layers[i].chosen_of_source, columns=form.row)
            else:
                judge.mixture(i)
        return judge.perplexity()

    def _add_experts(self, writer: BundleWriter, calibration: Calibration, i: int) -> None:
        """A layer's router and its experts, those first that most tokens use."""
        ffns, form, order = self.weights.ffns(i), group_format(self.model, self.formats), calibration.mixture(i)
        self._add_router(writer, i, order)
        every = np.arange(self.model.expert_neurons)
        chunks = (chunk for expert in order.tolist() for chunk in self._groups(ffns[expert], form, every))
        writer.add(f"layer.{i}.ffn", chunks, run=form.nbytes)

    def _calibration(self, texts: list[Numbers]) -> Calibration:
        return Calibration(self.weights, self.model, self.rope, texts)

    def _add_router(self, writer: BundleWriter, i: int, order: Numbers) -> None:
        """The router's rows move with their experts, so that the hottest is number 0."""
        writer.add(f"layer.{i}.router", self._rows(Matrix(self.weights.router(i).tensor, order), "f16"))

    def _filled(self, order: Numbers) -> Numbers:
        """The order of an FFN's neurons with those behind them that only fill the last block."""
        return np.concatenate([order, np.arange(len(order), self.model.expert_neurons)])

    def _neurons(self, ffn: Ffn, form: NeuronFormat, order: Numbers) -> Iterator[bytes]:
        """An FFN's bundles of one neuron each, in the order of the card."""
        down, bias = self._filled_up(ffn)
        for at in range(0, len(order), ROWS_AT_ONCE):
            neurons = order[at : at + ROWS_AT_ONCE]
            records = [self._padded_rows(matrix, form.row, neurons) for matrix in ffn.inputs]
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

    def _encode(
        self,
        matrix: Matrix,
        form: RowFormat,
        which: slice | Numbers,
        centred: bool = True,
        factor: Floats | None = None,
    ) -> Bytes:
        weights = matrix.rows(which)
        self._count(weights.size)
        if factor is not None:
            return encode_fed(weights, form, factor)
        return encode_rows(weights, form, matrix.grid(which), centred)

    def _groups(self, ffn: Ffn, form: GroupFormat, order: Numbers, weigh: Weigh | None = None) -> Iterator[bytes]:
        """Neurons in their order, 32 a group. Where they are a group of the source, its grid moves over."""
        (down, bias), grid = self._filled_up(ffn), ffn.down.grid()
        columns = np.pad(weigh.neurons, (0, self._filling(ffn))) if weigh else None
        factor = weigh.inputs if weigh else None
        for at in range(0, len(order), GROUPS_AT_ONCE * BLOCK):
            neurons = order[at : at + GROUPS_AT_ONCE * BLOCK]
            records = [self._padded_rows(matrix, form.row, neurons, factor) for matrix in ffn.inputs]
            self._count(form.hidden * len(neurons))
            some = None if columns is None else columns[neurons]
            yield encode_groups(
                records, down[:, neurons], bias[neurons], form, _grid_of(grid, neurons), some
            ).tobytes()

    def _padded_rows(self, matrix: Matrix, form: RowFormat, neurons: Numbers, factor: Floats | None = None) -> Bytes:
        """Row records of some neurons; those that only fill the last group are zero."""
        real = neurons < len(matrix)
        out = np.zeros((len(neurons), form.nbytes), np.uint8)
        out[real] = self._encode(matrix, form, neurons[real], factor=factor)
        return out

    def _count(self, weights: int) -> None:
        self._done += weights
        self._on_progress(min(self._done, self._total), self._total)


def _grid_of(grid: Grid | None, neurons: Numbers) -> Grid | None:
    """Of the grid of a down_proj what some neurons have; None where they are not groups of the source."""
    groups = neurons[::BLOCK] // BLOCK
    if grid is None or (neurons != neurons_of(groups)).any():
        return None
    return grid[0][:, groups], grid[1][:, groups]


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
    if formats.ffn == "ternary" or model.normed_neurons:
        raise DataError(f"{path}: a predictor is not for BitNet; pack it with --select exact")
    if model.activation not in SPARSE:
        raise DataError(
            f"{path}: its activation is {model.activation}, of which few neurons are zero; a predictor is for"
            f" {', '.join(sorted(SPARSE))}; pack it with --select exact"
        )


def _check_gated(path: Path, model: Model, formats: Formats) -> None:
    """Raises DataError for a model whose gates cannot choose neurons."""
    if not model.gated or "inputs" in model.biases:
        raise DataError(f"{path}: {model.family} has no gate rows that could choose; pack it without --select gate")
    if model.experts or formats.ffn == "ternary" or model.normed_neurons:
        raise DataError(
            f"{path}: gates choose in plain layers, not in mixtures of experts or BitNet; pack it without"
            " --select gate"
        )


def _check_narrowable(path: Path, model: Model, formats: Formats) -> None:
    """Raises DataError for a model whose groups cannot have fewer bits."""
    if model.experts or formats.ffn != "int4" or model.normed_neurons:
        raise DataError(
            f"{path}: fewer bits are for plain layers of int4 rows, not for mixtures of experts or BitNet; pack it"
            " without --max-loss"
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
