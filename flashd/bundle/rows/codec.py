"""Turns prefix and header into bytes and back. Whatever is read is checked before it is used."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from flashd.bundle.architecture import OF_EXPERTS, Architecture
from flashd.bundle.errors import BadSection, DamagedHeader, NewerVersion, NotABundle, OlderVersion, TruncatedBundle
from flashd.bundle.header import Header, Text
from flashd.bundle.layer_kinds import AttentionKind
from flashd.bundle.prefix import (
    MAGIC,
    MAX_HEADER,
    PAGE,
    PLAIN_RUN,
    PREFIX,
    VERSION,
    Prefix,
    digest,
    sealed,
)
from flashd.bundle.rows.kinds import BLOCK, NARROW
from flashd.errors import NOT_JSON

LARGEST = float(np.finfo(np.float32).max)
"""The largest number in float32."""


def encode(header: Header, file_length: int) -> bytes:
    """The bytes of prefix and header, which stand at offset 0. Raises ValueError if the header is too long."""
    body = msgspec.json.encode(header)
    if len(body) > MAX_HEADER:
        raise ValueError(f"a header of {len(body)} bytes; {MAX_HEADER} at most")
    return sealed(MAGIC, VERSION, body, file_length)


def decode_prefix(data: bytes, file_length: int) -> Prefix:
    """The prefix of a file of `file_length` bytes, from its first 32.

    Raises NotABundle, NewerVersion, OlderVersion, TruncatedBundle, DamagedHeader.
    """
    prefix = Prefix.read(data, MAGIC)
    if prefix is None:
        raise NotABundle("not a flashd bundle; make one with: flashd pack MODEL.gguf --out FILE.flash")
    if prefix.version > VERSION:
        raise NewerVersion(
            f"a bundle of format {prefix.version}, but this flashd reads {VERSION}; update flashd or pack it again"
        )
    if prefix.version < VERSION:
        raise OlderVersion(f"a bundle of format {prefix.version}, this flashd reads {VERSION}; pack it again")
    if prefix.file_length != file_length:
        raise TruncatedBundle(
            f"the file has {file_length} bytes and should have {prefix.file_length}; copy the bundle again"
        )
    if not 0 < prefix.length <= min(MAX_HEADER, file_length - PREFIX.size):
        raise DamagedHeader(f"a header of {prefix.length} bytes; copy the bundle again or pack it again")
    return prefix


def decode_header(body: bytes, checksum: int, file_length: int) -> Header:
    """The header of a file of `file_length` bytes, with every offset and size in it checked.

    Raises DamagedHeader, BadSection.
    """
    if digest(body) != checksum:
        raise DamagedHeader("the header is damaged; copy the bundle again or pack it again")
    try:
        header = msgspec.json.decode(body, type=Header)
    except NOT_JSON as error:
        raise DamagedHeader(f"the header does not make sense: {error}") from error
    _check_numbers(msgspec.to_builtins(header))
    _check_model(header.model)
    _check_text(header.text, header.model)
    _check_selection(header)
    _check_narrowed(header)
    _check_finer(header)
    _check_sections(header, file_length)
    return header


def _check_numbers(value: Any) -> None:
    """Whether each number with a fraction is one in float32 too, as graphs have them."""
    match value:
        case float():
            if abs(value) > LARGEST:
                raise DamagedHeader(f"the header does not make sense: {value:g} is too large for float32")
        case dict():
            _check_numbers(list(value.values()))
        case list():
            for each in value:
                _check_numbers(each)


def _check_model(m: Architecture) -> None:
    leading = m.experts.leading if m.experts else None
    _check_rules([
        (len(m.layer_kinds) == m.layers, f"{m.layers} layers, but kinds of attention for {len(m.layer_kinds)}"),
        (
            all(k < len(m.attention) + len(m.recurrent) for k in m.layer_kinds),
            "a layer's kind of attention does not exist",
        ),
        (all(a.rope is None or a.rope < m.ropes for a in m.attention), "a rotary table does not exist"),
        (
            all(a.beside is None or a.beside < len(m.recurrent) for a in m.attention),
            "what is beside attention does not exist",
        ),
    ])  # fmt: skip
    _check_rules([
        (m.hidden % BLOCK == 0, f"hidden size {m.hidden} is not a multiple of {BLOCK}"),
        (
            all(m.query_width(kind) % BLOCK == 0 for kind in m.attention),
            f"{m.heads} heads of {m.head_dim} are not a multiple of {BLOCK}",
        ),
        (m.group_neurons % BLOCK == 0, f"groups of {m.group_neurons} neurons are not a multiple of {BLOCK}"),
        (m.neurons % m.group_neurons == 0, f"{m.neurons} neurons do not make whole groups of {m.group_neurons}"),
        (
            not m.layer_neurons or (len(m.layer_neurons) == m.layers and max(m.layer_neurons) == m.neurons),
            f"{m.layers} layers of up to {m.neurons} neurons, but {len(m.layer_neurons)} widths of up to others",
        ),
        (
            all(n % m.group_neurons == 0 for n in m.layer_neurons) and not (m.layer_neurons and m.experts),
            f"the neurons of a layer do not make whole groups of {m.group_neurons}",
        ),
        (
            not m.experts or m.neurons % (m.experts.count * m.group_neurons) == 0,
            f"{m.neurons} neurons do not share out to {m.experts and m.experts.count} experts in groups",
        ),
        (
            not m.experts or m.experts.used <= m.experts.count,
            f"a token uses {m.experts and m.experts.used} experts of {m.experts and m.experts.count}",
        ),
        (_groups_fit(m), "groups of experts do not fit the experts"),
        (all(kind.fits for kind in m.recurrent), "heads of a layer that keeps a state do not fit together"),
        (_shared_fits(m), "an expert that all tokens use has no place in such layers"),
        (_apart_fits(m), "norms of experts, or a router that takes its own, without an expert that all use"),
        (
            not m.experts or (m.experts.first < m.layers and bool(m.experts.first) == bool(m.experts.leading)),
            f"the first {m.experts and m.experts.first} of {m.layers} layers have no experts and no other FFN",
        ),
        (
            not leading or (leading.group_neurons % BLOCK == 0 and leading.neurons % leading.group_neurons == 0),
            "the FFN of the first layers has neurons that make no whole groups",
        ),
        (not leading or not {"inputs", "down"} & set(m.biases), "the FFN of the first layers has biases"),
        (
            m.heads % m.kv_heads == 0 and all(m.heads % m.kv_heads_of(kind) == 0 for kind in m.attention),
            f"{m.heads} heads cannot share {m.kv_heads} key-value heads",
        ),
        (bool(m.attending), "no layer attends"),
        (
            all(a.rope is None or m.rope_widths[a.rope] == m.turned_of(a) for a in m.attention),
            "heads of two sizes share a rotary table",
        ),
        (all(_latent_fits(m, a) for a in m.attention if a.latent), "latents do not fit into attention"),
        (all(m.has_keys(layer) for layer in m.attending), "a layer finds no keys to borrow"),
        (_streams_fit(m), "several states of a token, or a bound of gates, in a model that has no place for them"),
    ])  # fmt: skip


def _check_rules(rules: list[tuple[bool, str]]) -> None:
    for holds, what in rules:
        if not holds:
            raise DamagedHeader(f"the header does not make sense: {what}")


def _latent_fits(m: Architecture, kind: AttentionKind) -> bool:
    """Whether nothing else is said of layers whose heads share what is kept, which would change what they do."""
    kinds = kind.window or kind.head_dim or kind.kv_heads or kind.borrows or not kind.values or kind.rope is None
    kinds = kinds or kind.beside is not None
    norms = m.norm_values or {"query", "key", "heads"} & set(m.norms)
    return not (kinds or norms or m.sinks or m.attention_gated or "qkv" in m.biases)


def _groups_fit(m: Architecture) -> bool:
    """Whether the best groups of experts have as many as a token uses."""
    groups = m.experts and m.experts.groups
    if not m.experts or not groups:
        return True
    each, rest = divmod(m.experts.count, groups.count)
    return not rest and groups.best <= each and groups.used <= groups.count and m.experts.used <= groups.used * each


def _shared_fits(m: Architecture) -> bool:
    """Whether what the shared expert adds may be added before the other experts' output is."""
    shared = m.experts and m.experts.shared
    return not shared or (
        shared.neurons % BLOCK == 0 and m.block != "post" and not {"inputs", "down"} & set(m.biases)
        and not m.normed_neurons and not ("ffn_branch" in m.norms and m.experts and m.experts.leading)
    )  # fmt: skip


def _apart_fits(m: Architecture) -> bool:
    """Whether what stands between the shared expert and the others does so in every layer."""
    e = m.experts
    if not OF_EXPERTS & set(m.norms) and not (e and e.router_scaled):
        return True
    return bool(e and e.shared and not e.leading and not e.early and "ffn_branch" in m.norms)


def _streams_fit(m: Architecture) -> bool:
    """Whether the states of tokens, what stands beside the attention, and bounds of gates are in a plain model."""
    if not (m.streams or m.laurel_rank or m.bounds):
        return "laurel_branch" not in m.norms
    filled = [
        0 <= m.neurons_of(i) - bound.neurons < BLOCK for i, bound in enumerate(m.bounds) if bound and i < m.layers
    ]
    return (
        m.block == "sequential" and m.norm == "rms" and not m.norm_bias and not m.experts and not m.layer_scales
        and m.gated and not m.biases and not m.normed_neurons and not m.recurrent and m.branch_scale == 1
        and m.laurel_rank % BLOCK == 0 and bool(m.laurel_rank) == ("laurel_branch" in m.norms)
        and len(m.bounds) in (0, m.layers) and all(filled)
    )  # fmt: skip


def _check_text(text: Text, model: Architecture) -> None:
    c = text.channels
    of_channels = [c.start, c.channel, c.message, c.end, *c.opens, *c.final] if c else []
    if any(token >= model.vocabulary for token in (*text.eos, text.bos or 0, *of_channels)):
        raise DamagedHeader("the header does not make sense: a token that begins or ends texts does not exist")


def _check_selection(header: Header) -> None:
    s = header.selection
    if s is None:
        return
    m, kind = header.model, header.formats.ffn
    ranks = [0] * m.layers if header.gate_decides and not s.ranks else s.ranks
    if any(len(part) != m.layers for part in (ranks, s.thresholds, s.chosen, s.fired)):
        raise DamagedHeader(f"the header does not make sense: not every one of {m.layers} layers has a predictor")
    if m.layer_neurons:
        raise DamagedHeader("the header does not make sense: neurons of FFNs of several widths are never selected")
    if m.bounds:
        raise DamagedHeader("the header does not make sense: neurons whose gates have a bound are never selected")
    if kind == "ternary" or m.normed_neurons:
        raise DamagedHeader("the header does not make sense: neurons of BitNet are never selected")
    if header.gate_decides and (s.ranks or not m.gated or m.experts or "inputs" in m.biases):
        raise DamagedHeader(
            "the header does not make sense: a gate decides only in layers that have one, without biases or experts"
        )
    if m.experts and (m.experts.leading or m.experts.router_scaled or "down" in m.biases):
        raise DamagedHeader(
            "the header does not make sense: neurons are selected behind first layers without experts, of experts"
            " whose outputs have a bias, or whose router takes something of its own"
        )
    if any(rank % BLOCK for rank in s.ranks):
        raise DamagedHeader(f"the header does not make sense: a predictor's rank is not a multiple of {BLOCK}")


def _check_narrowed(header: Header) -> None:
    n, m, f = header.narrowed, header.model, header.formats
    if {f.ffn, f.attention, f.head, f.embedding, f.token_inputs} & set(NARROW):
        raise DamagedHeader(f"the header does not make sense: only narrowed groups can be {' or '.join(NARROW)}")
    if n is None:
        return
    if header.selection or header.formats.ffn != "int4":
        raise DamagedHeader("the header does not make sense: only groups of int4 rows can be narrowed")
    if not len(n.int3) == len(n.int2) == m.layers:
        raise DamagedHeader(f"the header does not make sense: it does not say what is narrowed for {m.layers} layers")
    if not all(int3 <= int2 <= every for int3, int2, every in zip(n.int3, n.int2, m.layer_groups, strict=True)):
        raise DamagedHeader(f"the header does not make sense: groups are narrowed that are not among {m.groups}")
    if m.experts and not {*n.int3, *n.int2} <= {0, m.groups}:
        raise DamagedHeader("the header does not make sense: of a mixture, experts of whole layers are narrowed")


def _check_finer(header: Header) -> None:
    finer = header.formats.finer
    if unknown := sorted(set(finer) - header.int4_matrices):
        raise DamagedHeader(
            f"the header does not make sense: {unknown[0]!r} is not a matrix that may have finer rows"
        )
    if len(set(finer)) < len(finer):
        raise DamagedHeader("the header does not make sense: a matrix with finer rows is named twice")


def _check_sections(header: Header, file_length: int) -> None:
    first = end = 0
    for section in [*header.sections, header.checksums]:
        if section.offset % PAGE or section.end > file_length:
            raise BadSection(f"section {section.name!r} lies outside the file or off a page boundary")
        if section.offset < end:
            raise BadSection(f"section {section.name!r} begins before the section in front of it ends")
        if section is not header.checksums and section.first != first:
            raise BadSection(f"section {section.name!r} counts its checksums from {section.first}, not {first}")
        first, end = first + section.runs, section.end
    if header.checksums.length != 8 * (first - header.checksums.runs):
        raise BadSection(f"{header.checksums.length} bytes of checksums for {first} runs")
    present = {s.name: s for s in header.sections}
    if len(present) != len(header.sections):
        raise BadSection("two sections have the same name")
    for name, length in header.expected_lengths().items():
        if name not in present:
            raise BadSection(f"section {name!r} is missing")
        if present[name].length != length:
            raise BadSection(f"section {name!r} has {present[name].length} bytes, but its model needs {length}")
    own_runs = header.own_runs()
    for section in header.sections:
        run = own_runs.get(section.name, PLAIN_RUN)
        if section.run != run:
            raise BadSection(f"section {section.name!r} has runs of {section.run} bytes, not {run}")
    texts = {"tokenizer", "token_bytes"}
    if missing := sorted(texts - present.keys()):
        raise BadSection(f"section {missing[0]!r} is missing")
    if unknown := sorted(present.keys() - texts - header.expected_lengths().keys()):
        raise BadSection(f"section {unknown[0]!r} is not known")
