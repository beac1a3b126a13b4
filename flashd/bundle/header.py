"""The header: formats, texts, measured losses, and the table of sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec

from flashd.bundle.architecture import Architecture, Count, Positive
from flashd.bundle.formats import GroupFormat, NeuronFormat, PairFormat, RowFormat
from flashd.bundle.prefix import PLAIN_VERSION, ROWS_OF_A_RUN, VERSION
from flashd.bundle.row_kinds import CODE_TYPES, NARROW, RowKind


class Formats(msgspec.Struct, frozen=True, kw_only=True):
    """How many bits each kind of matrix has."""

    ffn: RowKind
    attention: RowKind
    head: RowKind
    embedding: RowKind

    @property
    def rounded_head(self) -> bool:
        """Whether the head's input is rounded to 8 bits a block, which makes the constant graph faster."""
        return self.ffn == "int4"

    @property
    def centred_head(self) -> bool:
        """Whether the head's blocks have centres. Eight bits need none, and their product would be a twentieth of
        a token's time in a small model that fits."""
        return not (self.rounded_head and self.head == "int8")


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to turn text into tokens and back, beside the tokenizer's own section."""

    eos: list[Count]
    bos: Count | None
    add_bos: bool
    chat_template: str | None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What something that costs quality was measured to cost, on text that nothing was fitted to."""

    tokens: Count
    perplexity_exact: Annotated[float, msgspec.Meta(gt=0)]
    perplexity: Annotated[float, msgspec.Meta(gt=0)]

    @property
    def loss(self) -> float:
        """By how much perplexity is higher, in parts of it."""
        return self.perplexity / self.perplexity_exact - 1


class Narrowed(Measured, frozen=True, kw_only=True):
    """From which of a layer's groups on, the hottest first, the card has fewer bits a weight than int4 rows."""

    int3: list[Count]  # of each layer
    int2: list[Count]  # not below that of int3
    divergence: Annotated[float, msgspec.Meta(ge=0)]  # mean KL from the exact model, in nats


Chooser = Literal["predictor", "gate"]


class Selection(Measured, frozen=True, kw_only=True, omit_defaults=True):
    """Which neurons take part in a token, where that is not all of them, and what it was measured to cost.

    By a predictor a neuron of a layer takes part where its row of `wide`, times `narrow` times h, plus its `lean`, is
    above the layer's threshold (section 3.1 of "LLM in a flash"). In a mixture each expert has a `narrow` of its own,
    one behind the other, and takes part in the tokens that are routed to it.

    By its gate a neuron takes part where its activation, of its row of `gate` times h, is in size above its number in
    `floors`, which is the layer's threshold over what the neuron weighs (CATS, arXiv 2404.08763).
    """

    kind: Chooser = "predictor"
    ranks: list[Count] = []  # of each layer's predictors, a multiple of 32; 0: all neurons of the experts used
    thresholds: list[float]  # of each layer
    chosen: list[float]  # each layer's share of neurons that take part in a token
    fired: list[float]  # each layer's share of neurons that are not zero


PREDICTOR_ROWS: RowKind = "int8"
"""Rows of predictors."""


class PackedFrom(msgspec.Struct, frozen=True, kw_only=True):
    """The file that a bundle was packed from."""

    name: str
    nbytes: Count
    sha256: str


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A page-aligned part of the file. `first` is the index of its first run's checksum."""

    name: str
    offset: Count
    length: Count
    run: Positive
    first: Count

    @property
    def runs(self) -> int:
        return -(-self.length // self.run)

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class FfnSection:
    """The groups of a layer that are written alike: a section."""

    name: str
    layer: int
    form: GroupFormat
    first: int  # of the layer's groups
    count: int


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON header of a bundle."""

    flashd: str
    model: Architecture
    formats: Formats
    text: Text
    source: PackedFrom
    sections: list[Section]
    checksums: Section
    checksums_digest: str
    selection: Selection | None = None
    narrowed: Narrowed | None = None

    @property
    def group(self) -> GroupFormat:
        return group_format(self.model, self.formats)

    @property
    def neuron(self) -> NeuronFormat | PairFormat:
        return (pair_format if self.gate_decides else neuron_format)(self.model, self.formats)

    @property
    def version(self) -> int:
        """The earliest format that has all that this bundle is made of."""
        within_experts = self.selection and self.model.experts
        return VERSION if self.narrowed or within_experts or self.gate_decides else PLAIN_VERSION

    @property
    def gate_decides(self) -> bool:
        """Whether gate rows are in sections of their own, and say which neurons take part."""
        return self.selection is not None and self.selection.kind == "gate"

    @property
    def unit_bytes(self) -> int:
        """Bytes of what is read and checked as one of an FFN: a group of bundles, or a neuron's own."""
        return self.neuron.nbytes if self.selection else self.group.nbytes

    def row_format(self, name: str) -> RowFormat:
        """The rows of the section called `name`."""
        part = name.rsplit(".", 1)[-1]
        if part == "output":
            return RowFormat(self.formats.attention, self.model.query_width)
        if part == "wide" and self.selection:
            return RowFormat(PREDICTOR_ROWS, self.selection.ranks[int(name.split(".")[1])])
        kinds: dict[str, RowKind] = {
            "qkv": self.formats.attention,
            "head": self.formats.head,
            "embedding": self.formats.embedding,
            "positions": "f16",
            "router": "f16",
            "narrow": PREDICTOR_ROWS,
            "gate": self.formats.ffn,
        }
        return RowFormat(kinds[part], self.model.hidden)

    @property
    def embedding_table(self) -> str:
        """The section that input embeddings are read from: the head's own where they are tied."""
        return "embedding" if self.section_named("embedding") else "head"

    @property
    def row_tables(self) -> list[str]:
        """The sections of which the engine reads a row here and there, or some rows."""
        tables = ["head", "embedding", "positions"]
        return [name for name in tables if name == "head" or self.section_named(name)]

    @property
    def paged_sections(self) -> list[str]:
        """The sections that may be read in each pass, in the order in which it needs them."""
        return [*(part.name for part in self.ffn_sections), "head"]

    @property
    def ffn_sections(self) -> list[FfnSection]:
        """All groups of all layers, in order. Of a bundle that selects neurons only the sections' names hold."""
        return [part for i in range(self.model.layers) for part in self.ffn_sections_of(i)]

    def ffn_sections_of(self, layer: int) -> list[FfnSection]:
        """All groups of a layer, in order."""
        n, groups = self.narrowed, self.model.groups
        return layer_ffn_sections(layer, self.group, [n.int3[layer], n.int2[layer], groups] if n else [groups])

    def expected_lengths(self) -> dict[str, int]:
        """Bytes of every section whose size follows from the model."""
        m = self.model
        lengths = {
            "head": m.vocabulary * self.row_format("head").nbytes,
            "vectors": 4 * sum(m.model_vectors().values()),
            "rope": 4 * m.ropes * m.head_dim,
        }
        if m.positions:
            lengths["positions"] = m.positions * self.row_format("positions").nbytes
        if self.section_named("embedding"):
            lengths["embedding"] = m.vocabulary * self.row_format("embedding").nbytes
        for i in range(m.layers):
            lengths[f"layer.{i}.qkv"] = m.qkv_width * self.row_format("qkv").nbytes
            lengths[f"layer.{i}.output"] = m.hidden * self.row_format("output").nbytes
            if m.experts:
                lengths[f"layer.{i}.router"] = m.experts.count * self.row_format("router").nbytes
            lengths[f"layer.{i}.vectors"] = 4 * sum(m.layer_vectors().values())
            if self.selection:
                lengths[f"layer.{i}.ffn"] = m.neurons * self.unit_bytes
        if not self.selection:
            lengths |= {part.name: part.count * part.form.nbytes for part in self.ffn_sections}
        return lengths | self._chooser_lengths()

    def _chooser_lengths(self) -> dict[str, int]:
        m = self.model
        if self.selection is None:
            return {}
        lengths = {"rates": 4 * m.layers * m.neurons}
        if self.gate_decides:
            of_layer = {"gate": m.neurons * self.row_format("gate").nbytes, "floors": 4 * m.neurons}
            if isinstance(self.neuron, PairFormat):
                of_layer |= {"steps": m.groups * self.group.step_bytes, "groups": 4 * m.neurons}
            lengths |= {f"layer.{i}.{part}": n for i in range(m.layers) for part, n in of_layer.items()}
        for i, rank in enumerate(self.selection.ranks):
            if rank:
                lengths[f"layer.{i}.narrow"] = m.ffns * rank * self.row_format("narrow").nbytes
                lengths[f"layer.{i}.wide"] = m.neurons * self.row_format(f"layer.{i}.wide").nbytes
                lengths[f"layer.{i}.lean"] = 4 * m.neurons
        return lengths

    def own_runs(self) -> dict[str, int]:
        """Bytes of a run of each section that is not checked a mebibyte at a time."""
        rows = {name: ROWS_OF_A_RUN * self.row_format(name).nbytes for name in self.row_tables}
        units = {part.name: self.unit_bytes if self.selection else part.form.nbytes for part in self.ffn_sections}
        return rows | units

    def section_named(self, name: str) -> Section | None:
        return next((s for s in self.sections if s.name == name), None)


def layer_ffn_sections(layer: int, form: GroupFormat, ends: Sequence[int]) -> list[FfnSection]:
    """The parts of a layer, written as `form` and then narrower; of each width, the group behind its last."""
    parts, first = [], 0
    for kind, end in zip((form.kind, *NARROW), ends, strict=False):
        if end > first:
            name = f"layer.{layer}.ffn" + (f".{kind}" if kind in NARROW else "")
            parts.append(FfnSection(name, layer, replace(form, kind=kind), first, end - first))
        first = end
    return parts


def group_format(model: Architecture, formats: Formats) -> GroupFormat:
    """How a bundle of `model` writes its FFN."""
    biases = model.inputs if "inputs" in model.biases else 0
    return GroupFormat(formats.ffn, model.hidden, model.inputs, biases)


def neuron_format(model: Architecture, formats: Formats) -> NeuronFormat:
    """How a bundle of `model` writes its FFN where predictors select neurons."""
    return NeuronFormat(formats.ffn, model.hidden, model.inputs, model.inputs if "inputs" in model.biases else 0)


def pair_format(model: Architecture, formats: Formats) -> NeuronFormat | PairFormat:
    """And where their gates do."""
    form = PairFormat if formats.ffn in CODE_TYPES else NeuronFormat
    return form(formats.ffn, model.hidden, 1)
