"""The JSON header of a bundle: the model, its formats and texts, measured losses, and the table of sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import Count, LayerProduct, LeadingFfn, Positive
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.rows.formats import GroupFormat, NeuronFormat, RowFormat
from flashd.bundle.rows.kinds import NARROW, RowKind
from flashd.bundle.rows.of_matrices import LEADING, STATES_AND_TOKENS, Formats


class Drawing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of an answer are drawn. None: whoever wrote this says nothing of it."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None


class Channels(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a model that says in which channel it speaks, see engine.decoding.reasoning.channels."""

    start: Count  # who speaks follows
    channel: Count  # the name of a channel follows
    message: Count  # the text follows
    end: Count  # behind the text
    opens: Annotated[list[Count], msgspec.Meta(min_length=1)]  # what a prompt ends with that asks for an answer
    final: list[Count]  # begins an answer without thoughts


class Text(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the engine needs to turn text into tokens and back, apart from the tokenizer's own section."""

    eos: list[Count]  # the tokens that end an answer
    bos: Count | None  # the token that begins a text
    add_bos: bool  # whether it begins every text
    chat_template: str | None  # in Jinja's language
    channels: Channels | None = None  # if the model says in which it speaks
    drawing: Drawing | None = None  # as the model's makers recommend it, if they do


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The measured cost of something that costs quality, on text that nothing was fitted to."""

    tokens: Count  # of that text
    perplexity_exact: Annotated[float, msgspec.Meta(gt=0)]
    perplexity: Annotated[float, msgspec.Meta(gt=0)]

    @property
    def loss(self) -> float:
        """By how much perplexity is higher: 0.01 is one per cent."""
        return self.perplexity / self.perplexity_exact - 1


class Narrowed(Measured, frozen=True, kw_only=True):
    """Which groups have fewer bits a weight than int4 rows. Groups are numbered from the hottest on.

    All groups of a mixture's layer have as many bits.
    """

    int3: list[Count]  # of each layer: the first group that has 3 bits
    int2: list[Count]  # of each layer: the first group that has 2 bits, not below that of int3
    divergence: Annotated[float, msgspec.Meta(ge=0)]  # mean KL from the exact model, in nats


Chooser = Literal["predictor", "gate"]


class Selection(Measured, frozen=True, kw_only=True, omit_defaults=True):
    """How the neurons that take part in a token are chosen, if that is not all of them, and what that costs.

    predictor: a neuron takes part if (wide @ narrow @ h + lean)[neuron] is above the layer's threshold ("LLM in a
    flash", section 3.1). wide, narrow and lean are sections of the layer: [F, rank], [rank, H] and [F]. In a mixture
    each expert has a narrow matrix of its own, one behind the other, and is asked only for tokens that use it.

    gate: a neuron takes part if the size of f(gate @ h)[neuron] is above its number in the section floors [F]. That
    is the layer's threshold divided by the weight of the neuron (CATS, arXiv 2404.08763).
    """

    kind: Chooser = "predictor"
    ranks: list[Count] = []  # of each layer's predictors, a multiple of 32; 0: no predictor, all neurons take part
    thresholds: list[float]  # of each layer
    chosen: list[float]  # each layer's share of neurons that take part in a token
    fired: list[float]  # each layer's share of neurons that are not zero


PREDICTOR_ROWS: RowKind = "int8"
"""The kind of rows of predictors."""


class PackedFrom(msgspec.Struct, frozen=True, kw_only=True):
    """The file that a bundle was packed from."""

    name: str  # of the file or folder
    nbytes: Count
    sha256: str


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the file that begins on a page. It is checked run by run."""

    name: str
    offset: Count  # bytes
    length: Count  # bytes
    run: Positive  # bytes of a run
    first: Count  # the number of the first run's checksum

    @property
    def runs(self) -> int:
        return -(-self.length // self.run)

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class FfnSection:
    """Consecutive groups of a layer that have the same format. They are a section of the file."""

    name: str  # of the section
    layer: int
    form: GroupFormat
    first: int  # the number of its first group in the layer
    count: int  # groups


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON header of a bundle."""

    flashd: str  # the version that packed it
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
        """The format of groups of which no matrix is finer than others."""
        return group_format(self.model, self.formats)

    def group_of(self, layer: int) -> GroupFormat:
        """The format in which a layer's groups are multiplied.

        Narrowed groups of a plain model are int4 by then. The experts of a layer of a mixture are all alike.
        """
        if self.model.experts and self.narrowed:
            return self.ffn_sections_of(layer)[0].form
        return group_format(self.model, self.formats, layer)

    @property
    def largest_group(self) -> GroupFormat:
        """The format of the groups that take most."""
        return max((self.group_of(layer) for layer in self.model.paged_layers), key=lambda form: form.nbytes)

    @property
    def neuron(self) -> NeuronFormat:
        return (pair_format if self.gate_decides else neuron_format)(self.model, self.formats)

    @property
    def gate_decides(self) -> bool:
        """Whether gate rows are in sections of their own and say which neurons take part."""
        return self.selection is not None and self.selection.kind == "gate"

    @property
    def unit_bytes(self) -> int:
        """Bytes of the smallest part of an FFN that is read: a group, or a neuron if neurons are selected."""
        return self.neuron.nbytes if self.selection else self.group.nbytes

    def row_format(self, name: str) -> RowFormat:
        """The format of the rows of the section `name`."""
        part = name.rsplit(".", 1)[-1]
        if name.startswith("layer."):
            layer = int(name.split(".")[1])
            for product in (*self.model.products(layer), *self.model.products_behind()):
                if product.name == part:
                    return self.product_format(layer, product)
            if part == "wide" and self.selection:
                return RowFormat(PREDICTOR_ROWS, self.selection.ranks[layer])
        if part == "token_inputs":
            return RowFormat(self.formats.token_inputs, self.model.token_width)
        kinds: dict[str, RowKind] = {
            "head": self.formats.head,
            "embedding": self.formats.embedding,
            **{part: self.formats.of(part, self.formats.attention) for part in STATES_AND_TOKENS},
            "positions": "f16",
            "router": "f16",
            "narrow": PREDICTOR_ROWS,
            "gate": self.formats.ffn,
        }
        return RowFormat(kinds[part], self.model.hidden)

    def product_format(self, layer: int, product: LayerProduct) -> RowFormat:
        """The format of the rows of a layer's product beside its FFN."""
        kind = self.formats.of(f"layer.{layer}.{product.name}", self.formats.attention)
        return RowFormat("f16" if product.fine else kind, product.width)

    @property
    def embedding_table(self) -> str:
        """The section that input embeddings are read from. It is the head's if both are the same table."""
        return "embedding" if self.section_named("embedding") else "head"

    @property
    def row_tables(self) -> list[str]:
        """The sections of which the engine reads single rows, or the first rows."""
        tables = ["head", "embedding", "positions", "token_inputs"]
        return [name for name in tables if name == "head" or self.section_named(name)]

    @property
    def paged_sections(self) -> list[str]:
        """The sections that a pass may read, in the order in which it needs them."""
        return [*(part.name for part in self.ffn_sections), "head"]

    @property
    def ffn_sections(self) -> list[FfnSection]:
        """The sections of all groups of all layers, in order.

        If the bundle selects neurons, only the names and layers of these hold: the sections have neurons, not groups.
        """
        return [part for i in self.model.paged_layers for part in self.ffn_sections_of(i)]

    def of_leading(self, ffn: LeadingFfn) -> Header:
        """The header of a plain model whose FFNs are all like `ffn`. Their rows are of the attention's kind."""
        formats = self.formats.of_leading
        return msgspec.structs.replace(self, model=self.model.of_leading(ffn), formats=formats)

    @property
    def int4_matrices(self) -> set[str]:
        """The names, see Formats.of, of matrices whose rows are int4 unless they are said to be finer."""
        m, f, names = self.model, self.formats, set[str]()
        if f.attention == "int4":
            every = ((i, p) for i in range(m.layers) for p in (*m.products(i), *m.products_behind()))
            names |= {f"layer.{i}.{product.name}" for i, product in every if not product.fine}
            names |= {part for part in STATES_AND_TOKENS if self.section_named(part)}
            names |= {LEADING} if self.leading_groups else set()
        if f.ffn == "int4" and not self.selection and not self.narrowed:
            names |= {f"layer.{i}.{part}" for i in m.paged_layers if m.layer_groups[i] for part in ("inputs", "down")}
        return names

    @property
    def leading_groups(self) -> dict[str, GroupFormat]:
        """The sections of a mixture's first layers' FFNs, and the format of their groups."""
        ffns = {i: self.model.leading_ffn(i) for i in range(self.model.layers)}
        return {f"layer.{i}.leading": self.of_leading(ffn).group for i, ffn in ffns.items() if ffn}

    def ffn_sections_of(self, layer: int) -> list[FfnSection]:
        """The sections of a layer's groups, in order."""
        n, groups = self.narrowed, self.model.layer_groups[layer]
        form = group_format(self.model, self.formats, layer)
        return layer_ffn_sections(layer, form, [n.int3[layer], n.int2[layer], groups] if n else [groups])

    def expected_lengths(self) -> dict[str, int]:
        """Bytes of every section whose size follows from the model."""
        m = self.model
        lengths = {
            "head": m.vocabulary * self.row_format("head").nbytes,
            "vectors": 4 * sum(m.model_vectors().values()),
            "rope": 4 * sum(m.rope_widths),
        }
        if m.token_inputs:
            lengths["token_inputs"] = m.vocabulary * self.row_format("token_inputs").nbytes
            lengths["token_projection"] = m.token_width * self.row_format("token_projection").nbytes
        if m.streams:
            for name in ("stream_projection", "stream_out"):
                lengths[name] = (m.stream_width - m.hidden) * self.row_format(name).nbytes
        if m.positions:
            lengths["positions"] = m.positions * self.row_format("positions").nbytes
        if self.section_named("embedding"):
            lengths["embedding"] = m.vocabulary * self.row_format("embedding").nbytes
        for i in range(m.layers):
            for product in (*m.products(i), *m.products_behind()):
                lengths[f"layer.{i}.{product.name}"] = product.rows * self.product_format(i, product).nbytes
            if m.experts and i in m.paged_layers:
                lengths[f"layer.{i}.router"] = m.experts.count * self.row_format("router").nbytes
                if vectors := m.expert_vectors():
                    lengths[f"layer.{i}.experts"] = 4 * sum(vectors.values())
            lengths[f"layer.{i}.vectors"] = 4 * sum(m.layer_vectors(i).values())
            if self.selection:
                lengths[f"layer.{i}.ffn"] = m.neurons * self.unit_bytes
        if not self.selection:
            lengths |= {part.name: part.count * part.form.nbytes for part in self.ffn_sections}
        for name, form in self.leading_groups.items():
            ffn = m.leading_ffn(int(name.split(".")[1]))
            lengths[name] = ffn.groups * form.nbytes if ffn else 0
        return lengths | self._chooser_lengths()

    def _chooser_lengths(self) -> dict[str, int]:
        m = self.model
        if self.selection is None:
            return {}
        lengths = {"rates": 4 * m.layers * m.neurons}
        if self.gate_decides:
            of_layer = {"gate": m.neurons * self.row_format("gate").nbytes, "floors": 4 * m.neurons}
            lengths |= {f"layer.{i}.{part}": n for i in range(m.layers) for part, n in of_layer.items()}
        for i, rank in enumerate(self.selection.ranks):
            if rank:
                lengths[f"layer.{i}.narrow"] = m.ffns * rank * self.row_format("narrow").nbytes
                lengths[f"layer.{i}.wide"] = m.neurons * self.row_format(f"layer.{i}.wide").nbytes
                lengths[f"layer.{i}.lean"] = 4 * m.neurons
        return lengths

    def own_runs(self) -> dict[str, int]:
        """Bytes of a run of each section whose runs are not PLAIN_RUN bytes."""
        rows = {name: run_rows(name) * self.row_format(name).nbytes for name in self.row_tables}
        units = {part.name: self.unit_bytes if self.selection else part.form.nbytes for part in self.ffn_sections}
        return rows | units | {name: form.nbytes for name, form in self.leading_groups.items()}

    def section_named(self, name: str) -> Section | None:
        """The section of that name; None if there is none."""
        return next((s for s in self.sections if s.name == name), None)


def run_rows(table: str) -> int:
    """Rows of a run of a table of which single rows are read.

    A row of token inputs is as long as those of all layers together, so it is a run of its own.
    """
    return 1 if table == "token_inputs" else ROWS_OF_A_RUN


def layer_ffn_sections(layer: int, form: GroupFormat, ends: Sequence[int]) -> list[FfnSection]:
    """The sections of a layer's groups: first those with the format `form`, then those with 3 and with 2 bits.

    `ends` has, for each of these widths, the number of the group behind its last.
    """
    parts, first = [], 0
    for kind, end in zip((form.kind, *NARROW), ends, strict=False):
        if end > first:
            name = f"layer.{layer}.ffn" + (f".{kind}" if kind in NARROW else "")
            parts.append(FfnSection(name, layer, replace(form, kind=kind), first, end - first))
        first = end
    return parts


def group_format(model: Architecture, formats: Formats, layer: int | None = None) -> GroupFormat:
    """The format of a layer's groups, or of those of layers with no finer matrix."""
    biases = model.inputs if "inputs" in model.biases else 0
    normed = bool(model.normed_neurons)
    inputs, down = (formats.of(f"layer.{layer}.{part}", formats.ffn) for part in ("inputs", "down"))
    return GroupFormat(
        inputs, model.hidden, model.inputs, biases, model.group_neurons, normed, down if down != inputs else None
    )


def neuron_format(model: Architecture, formats: Formats) -> NeuronFormat:
    """How a bundle of `model` writes its FFN if predictors select neurons."""
    return NeuronFormat(formats.ffn, model.hidden, model.inputs, model.inputs if "inputs" in model.biases else 0)


def pair_format(model: Architecture, formats: Formats) -> NeuronFormat:
    """And if their gates do, whose rows are elsewhere."""
    return NeuronFormat(formats.ffn, model.hidden, 1)
