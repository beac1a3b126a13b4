"""The bundle file: fixed prefix, JSON header, page-aligned sections, checksums. README holds the full text.

    0   8  magic
    8   4  version             uint32, little endian as everything here
    12  4  header length       bytes of JSON that follow the prefix
    16  8  header digest       XXH3-64 of that JSON
    24  8  file length         bytes of the whole file
    32     header              JSON, see Header
           sections            each starts on a page of 4,096 bytes
           checksums           uint64[runs]: XXH3-64 of every run of every section, in section order

A *run* is what is checked, and so read, as one: a group of bundles in an FFN section, 16 rows of the tables that
input embeddings and learned positions are read from, a mebibyte elsewhere.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import msgspec
import xxhash

from flashd.bundle.rows import (
    BLOCK,
    CODE_TYPES,
    NARROW,
    GroupFormat,
    NeuronFormat,
    PairFormat,
    RowFormat,
    RowKind,
)
from flashd.errors import NOT_JSON, DataError

MAGIC = b"\x93FLASHD\n"
VERSION = 5
PLAIN_VERSION = 4
"""Of bundles in which nothing is narrowed, selected within experts or by a gate: the flashd before this one reads
them too."""
PAGE = 4096
GAP_BYTES = 16 << 10
"""Unwanted bytes that are read rather than skipped. An SD card gives the bandwidth of one 16 KiB read for
each random read, so a smaller gap costs nothing."""
PLAIN_RUN = 1 << 20
ROWS_OF_A_RUN = 16
MAX_HEADER = 4 << 20
PREFIX = struct.Struct("<8sIIQQ")

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class NotABundle(DataError):
    """The file does not start with a bundle's magic."""


class NewerVersion(DataError):
    """The bundle was written by a later flashd."""


class OlderVersion(DataError):
    """The bundle was written by an earlier flashd whose format is no longer read."""


class TruncatedBundle(DataError):
    """The file is shorter or longer than its own header says."""


class DamagedHeader(DataError):
    """The header's digest or its contents are wrong."""


class BadSection(DataError):
    """A section lies outside the file, is not page-aligned or has the wrong size for its model."""


class DamagedRun(DataError):
    """The bytes of a run are not those that were written."""


Norm = Literal["rms", "layer"]
Block = Literal["sequential", "parallel", "post"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "drelu", "fatrelu"]
Place = Literal["attention", "query", "key", "heads", "attention_branch", "ffn", "ffn_branch", "final"]
Bias = Literal["qkv", "output", "inputs", "down", "head"]
Scores = Literal["softmax", "sigmoid"]


class AttentionKind(msgspec.Struct, frozen=True, kw_only=True):
    """How the layers of one kind attend; each kind has a graph of its own."""

    window: Count = 0  # tokens that one sees, itself included; 0: all
    rope: Count | None = None  # the table that turns queries and keys; None: they are not turned


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """An FFN that is a mixture: a token takes the share of those experts alone that its router scores highest."""

    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # E, each of neurons / E neurons, one behind the other
    used: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # by a token
    scores: Scores  # of the router's products, over all experts or each by itself
    normalised: bool  # the scores of those used are divided by their sum
    scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # and multiplied by this
    early: bool = False  # the router takes the layer's input as it is, not what the FFN takes


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to know of an architecture: sizes and properties, from which its graphs are built.

    With f a layer's attention or its FFN, and n a norm where there is one, a block is

        sequential   x + n(f(n(x))), first the attention, then the FFN
        parallel     x + n(attention(n(x))) + n(ffn(n(x))); where the FFN has no norm it takes the attention's
        post         n(x + f(x)), first the attention, then the FFN
    """

    family: str
    name: str
    hidden: Size  # H
    layers: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # L
    heads: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    kv_heads: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    head_dim: Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=8)]  # D
    neurons: Size  # of one layer's FFN, all its experts together, a multiple of 32 (of each)
    experts: Experts | None = None
    vocabulary: Size  # V
    context: Positive  # tokens that the model was trained for
    block: Block
    norm: Norm  # x / rms(x) * weight, or (x - mean) / deviation * weight + bias
    norm_epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    norm_bias: bool
    norms: list[Place]
    norm_heads: bool  # queries and keys are normed a head at a time
    biases: list[Bias]
    gated: bool  # down(f(gate x) * up x), or down(f(up x))
    activation: Activation
    threshold: float = 0.0  # below which fatrelu gives 0
    normed_neurons: Count = 0  # whose activations are divided by their root mean square before the down product
    attention: list[AttentionKind]
    layer_kinds: list[Count]  # of each layer, its number in `attention`
    ropes: Count  # tables
    attention_scale: Annotated[float, msgspec.Meta(gt=0)]  # of a query's product with a key
    attention_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # scores become cap * tanh(score / cap)
    embedding_scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    positions: Count = 0  # learned ones, added to the embeddings
    logit_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.query_width + 2 * self.kv_width

    @property
    def groups(self) -> int:
        """Groups of 32 bundles in one layer."""
        return self.neurons // BLOCK

    @property
    def ffns(self) -> int:
        """FFNs of a layer: its experts, or one."""
        return self.experts.count if self.experts else 1

    @property
    def expert_neurons(self) -> int:
        """Neurons of one of them."""
        return self.neurons // self.ffns

    @property
    def expert_groups(self) -> int:
        """Groups of one of them."""
        return self.groups // self.ffns

    @property
    def inputs(self) -> int:
        """M, the matrices that an FFN multiplies its input by."""
        return 2 if self.gated else 1

    @property
    def share_width(self) -> int:
        """Width of what a group adds to an FFN's output: H, and the sum of its squares where activations are normed.

        The weights of that norm are in the columns of down_proj; what divides them all can wait for the last group.
        """
        return self.hidden + bool(self.normed_neurons)

    def norm_vectors(self, place: Place) -> dict[str, int]:
        """The vectors of a norm and their lengths; none where there is no such norm."""
        if place not in self.norms:
            return {}
        widths = {"query": self.query_width, "key": self.kv_width, "heads": self.query_width}
        by_head = place in ("query", "key") and self.norm_heads
        width = self.head_dim if by_head else widths.get(place, self.hidden)
        parts = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{place}_norm.{part}": width for part in parts}

    def layer_vectors(self) -> dict[str, int]:
        """The vectors of a layer and their lengths, in the order in which its `vectors` section has them."""
        vectors: dict[str, int] = {}
        for place in LAYER_NORMS:
            vectors |= self.norm_vectors(place)
        widths = {"qkv": self.qkv_width, "output": self.hidden, "down": self.hidden}
        return vectors | {f"{part}.bias": width for part, width in widths.items() if part in self.biases}

    def model_vectors(self) -> dict[str, int]:
        """The same for what follows the layers, and the `vectors` section that is no layer's."""
        head = {"head.bias": self.vocabulary} if "head" in self.biases else {}
        return self.norm_vectors("final") | head


STAGES = ("graph.enter", "graph.middle", "graph.leave", "graph.finish")
"""Graphs of what stands between the products with large matrices: norms, biases and sums."""

LAYER_NORMS: tuple[Place, ...] = (
    "attention", "query", "key", "heads", "attention_branch", "ffn", "ffn_branch",
)  # fmt: skip


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


class Source(msgspec.Struct, frozen=True, kw_only=True):
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
class Part:
    """The groups of a layer that are written alike: a section."""

    section: str
    layer: int
    form: GroupFormat
    first: int  # of the layer's groups
    count: int


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON header of a bundle."""

    flashd: str
    model: Model
    formats: Formats
    text: Text
    source: Source
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
        return [*(part.section for part in self.ffn_parts), "head"]

    @property
    def ffn_parts(self) -> list[Part]:
        """All groups of all layers, in order. Of a bundle that selects neurons only the sections' names hold."""
        return [part for i in range(self.model.layers) for part in self.parts_of(i)]

    def parts_of(self, layer: int) -> list[Part]:
        """All groups of a layer, in order."""
        n, groups = self.narrowed, self.model.groups
        return layer_parts(layer, self.group, [n.int3[layer], n.int2[layer], groups] if n else [groups])

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
            lengths |= {part.section: part.count * part.form.nbytes for part in self.ffn_parts}
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
        units = {part.section: self.unit_bytes if self.selection else part.form.nbytes for part in self.ffn_parts}
        return rows | units

    def section_named(self, name: str) -> Section | None:
        return next((s for s in self.sections if s.name == name), None)


def layer_parts(layer: int, form: GroupFormat, ends: Sequence[int]) -> list[Part]:
    """The parts of a layer, written as `form` and then narrower; of each width, the group behind its last."""
    parts, first = [], 0
    for kind, end in zip((form.kind, *NARROW), ends, strict=False):
        if end > first:
            name = f"layer.{layer}.ffn" + (f".{kind}" if kind in NARROW else "")
            parts.append(Part(name, layer, replace(form, kind=kind), first, end - first))
        first = end
    return parts


def group_format(model: Model, formats: Formats) -> GroupFormat:
    """How a bundle of `model` writes its FFN."""
    biases = model.inputs if "inputs" in model.biases else 0
    return GroupFormat(formats.ffn, model.hidden, model.inputs, biases)


def neuron_format(model: Model, formats: Formats) -> NeuronFormat:
    """How a bundle of `model` writes its FFN where predictors select neurons."""
    return NeuronFormat(formats.ffn, model.hidden, model.inputs, model.inputs if "inputs" in model.biases else 0)


def pair_format(model: Model, formats: Formats) -> NeuronFormat | PairFormat:
    """And where their gates do."""
    form = PairFormat if formats.ffn in CODE_TYPES else NeuronFormat
    return form(formats.ffn, model.hidden, 1)


def align(offset: int) -> int:
    """The next page boundary."""
    return -(-offset // PAGE) * PAGE


def digest(data: bytes | memoryview) -> int:
    """The checksum of one run, XXH3-64: 10 GB/s where zlib's CRC-32 gives 1."""
    return xxhash.xxh3_64_intdigest(data)


class Prefix(NamedTuple):
    """What a bundle begins with, and a snapshot too, with another magic."""

    magic: bytes
    version: int
    length: int  # of the header, which follows
    digest: int  # of the header
    file_length: int

    @classmethod
    def read(cls, data: bytes, magic: bytes) -> Prefix | None:
        """From a file's first 32 bytes; None where they do not start with `magic`."""
        if len(data) < PREFIX.size or not data.startswith(magic):
            return None
        return cls(*PREFIX.unpack(data[: PREFIX.size]))


def sealed(magic: bytes, version: int, body: bytes, file_length: int) -> bytes:
    """Prefix and header, ready to be written at offset 0."""
    return PREFIX.pack(magic, version, len(body), digest(body), file_length) + body


def encode(header: Header, file_length: int) -> bytes:
    """Prefix and header, ready to be written at offset 0."""
    body = msgspec.json.encode(header)
    if len(body) > MAX_HEADER:
        raise ValueError(f"a header of {len(body)} bytes; {MAX_HEADER} at most")
    return sealed(MAGIC, header.version, body, file_length)


def decode_prefix(data: bytes, file_length: int) -> Prefix:
    """What a file of `file_length` bytes says in its first 32.

    Raises NotABundle, NewerVersion, OlderVersion, TruncatedBundle, DamagedHeader.
    """
    prefix = Prefix.read(data, MAGIC)
    if prefix is None:
        raise NotABundle("not a flashd bundle; make one with: flashd pack MODEL.gguf --out FILE.flash")
    if prefix.version > VERSION:
        raise NewerVersion(
            f"a bundle of format {prefix.version}, this flashd reads {VERSION}; update flashd or pack it again"
        )
    if prefix.version < PLAIN_VERSION:
        raise OlderVersion(f"a bundle of format {prefix.version}, this flashd reads {VERSION}; pack it again")
    if prefix.file_length != file_length:
        raise TruncatedBundle(
            f"the file has {file_length} bytes and should have {prefix.file_length}; copy the bundle again"
        )
    if not 0 < prefix.length <= min(MAX_HEADER, file_length - PREFIX.size):
        raise DamagedHeader(f"a header of {prefix.length} bytes; copy the bundle again or pack it again")
    return prefix


def decode_header(body: bytes, checksum: int, file_length: int) -> Header:
    """The header of a file of `file_length` bytes, every offset and size in it checked.

    Raises DamagedHeader, BadSection.
    """
    if digest(body) != checksum:
        raise DamagedHeader("the header is damaged; copy the bundle again or pack it again")
    try:
        header = msgspec.json.decode(body, type=Header)
    except NOT_JSON as error:
        raise DamagedHeader(f"the header does not make sense: {error}") from error
    _check_model(header.model)
    _check_text(header.text, header.model)
    _check_selection(header)
    _check_narrowed(header)
    _check_sections(header, file_length)
    return header


def _check_model(m: Model) -> None:
    rules = [
        (m.hidden % BLOCK == 0, f"hidden size {m.hidden} is not a multiple of {BLOCK}"),
        (m.query_width % BLOCK == 0, f"{m.heads} heads of {m.head_dim} are not a multiple of {BLOCK}"),
        (m.neurons % BLOCK == 0, f"{m.neurons} neurons are not a multiple of {BLOCK}"),
        (
            not m.experts or m.neurons % (m.experts.count * BLOCK) == 0,
            f"{m.neurons} neurons cannot be shared out to {m.experts and m.experts.count} experts by {BLOCK}",
        ),
        (
            not m.experts or m.experts.used <= m.experts.count,
            f"a token uses {m.experts and m.experts.used} experts of {m.experts and m.experts.count}",
        ),
        (m.heads % m.kv_heads == 0, f"{m.heads} heads cannot share {m.kv_heads} key-value heads"),
        (len(m.layer_kinds) == m.layers, f"{m.layers} layers and kinds of attention for {len(m.layer_kinds)}"),
        (all(k < len(m.attention) for k in m.layer_kinds), "a layer's kind of attention is not among them"),
        (all(a.rope is None or a.rope < m.ropes for a in m.attention), "a rotary table is not among them"),
    ]
    for holds, what in rules:
        if not holds:
            raise DamagedHeader(f"the header does not make sense: {what}")


def _check_text(text: Text, model: Model) -> None:
    if any(token >= model.vocabulary for token in (*text.eos, text.bos or 0)):
        raise DamagedHeader("the header does not make sense: a text begins or ends with no token of its")


def _check_selection(header: Header) -> None:
    s = header.selection
    if s is None:
        return
    m, kind = header.model, header.formats.ffn
    ranks = [0] * m.layers if header.gate_decides and not s.ranks else s.ranks
    if any(len(part) != m.layers for part in (ranks, s.thresholds, s.chosen, s.fired)):
        raise DamagedHeader(f"the header does not make sense: {m.layers} layers and other predictors")
    if kind == "ternary" or m.normed_neurons:
        raise DamagedHeader("the header does not make sense: neurons of BitNet are never selected")
    if header.gate_decides and (s.ranks or not m.gated or m.experts or "inputs" in m.biases):
        raise DamagedHeader("the header does not make sense: a gate decides in plain layers that have one, unbiased")
    if any(rank % BLOCK for rank in s.ranks):
        raise DamagedHeader(f"the header does not make sense: a predictor's rank is not a multiple of {BLOCK}")


def _check_narrowed(header: Header) -> None:
    n, m, f = header.narrowed, header.model, header.formats
    if {f.ffn, f.attention, f.head, f.embedding} & set(NARROW):
        raise DamagedHeader(f"the header does not make sense: only cold groups are {' or '.join(NARROW)}")
    if n is None:
        return
    if header.selection or m.experts or header.formats.ffn != "int4":
        raise DamagedHeader("the header does not make sense: only plain layers of int4 rows are narrowed")
    if not len(n.int3) == len(n.int2) == m.layers:
        raise DamagedHeader(f"the header does not make sense: {m.layers} layers, others are narrowed")
    if not all(int3 <= int2 <= m.groups for int3, int2 in zip(n.int3, n.int2, strict=True)):
        raise DamagedHeader(f"the header does not make sense: layers of {m.groups} groups are narrowed behind those")


def _check_sections(header: Header, file_length: int) -> None:
    first = end = 0
    for section in [*header.sections, header.checksums]:
        if section.offset % PAGE or section.end > file_length:
            raise BadSection(f"section {section.name!r} lies outside the file or off a page boundary")
        if section.offset < end:
            raise BadSection(f"section {section.name!r} begins before the one in front of it ends")
        if section is not header.checksums and section.first != first:
            raise BadSection(f"section {section.name!r} counts its checksums from {section.first}, not {first}")
        first, end = first + section.runs, section.end
    if header.checksums.length != 8 * (first - header.checksums.runs):
        raise BadSection(f"{header.checksums.length} bytes of checksums for {first} runs")
    present = {s.name: s for s in header.sections}
    if len(present) != len(header.sections):
        raise BadSection("two sections have one name")
    for name, length in header.expected_lengths().items():
        if name not in present:
            raise BadSection(f"section {name!r} is missing")
        if present[name].length != length:
            raise BadSection(f"section {name!r} has {present[name].length} bytes, its model needs {length}")
    own_runs = header.own_runs()
    for section in header.sections:
        run = own_runs.get(section.name, PLAIN_RUN)
        if section.run != run:
            raise BadSection(f"section {section.name!r} has runs of {section.run} bytes, not {run}")
    attention = [f"graph.attention.{i}" for i in range(len(header.model.attention))]
    mixture = ["graph.route", "graph.linear.f16"] if header.model.experts else []
    gate = ["graph.gate", f"graph.linear.{header.formats.ffn}"] if header.gate_decides else []
    for name in ("tokenizer", "token_bytes", "graph.ffn", *attention, *mixture, *gate, *STAGES):
        if name not in present:
            raise BadSection(f"section {name!r} is missing")
