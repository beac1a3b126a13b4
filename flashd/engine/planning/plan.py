"""The plan: from a RAM budget it says what stays in RAM and how large the windows are.

The budget covers all that the process holds: what it holds when the plan is made (interpreter, libraries, tokenizer),
which is measured, and what is still to come, which is computed from the bundle's header.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.formats import RowFormat
from flashd.bundle.header import FfnSection, Header
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import BLOCK, Floats
from flashd.engine.model.kv_cache import cache_bytes, lendable_bytes
from flashd.engine.model.sizes import KEPT_ROWS, NODES, TEMPORARY_BYTES, TOKENS_AT_ONCE
from flashd.engine.paging.card import READ_BYTES, buffer_bytes, units_of_a_read
from flashd.engine.paging.eviction import shares
from flashd.errors import MemoryTooSmall
from flashd.system.memory import MIB

LOADING, HEAP = 1.5, 40 * MIB
"""While onnxruntime 1.32 repacks constant weights, the process holds LOADING times their bytes and HEAP more, above
the weights themselves. Measured: 1.64 GiB for the 1.10 of Qwen2.5-Coder-1.5B, 195 MiB for the 106 of SmolLM2. The KV
cache and the workspace are allocated later."""

PREFILL_TOKENS = 256
"""Tokens of prompts that share one pass over the card, if every token needs all groups."""

LOGIT_ROWS = NODES + 1
"""Rows of logits over the whole vocabulary that are held at once: those of a pass, and that behind the prompt."""

BUFFERS = 6
"""Extents that are read ahead or in use: enough to keep the card busy while a layer's attention computes."""

SESSIONS = 10 * MIB
"""Bytes of the in-place graphs' sessions and the thread pool: 5 to 10 MiB on x86-64 with onnxruntime 1.32."""

MARGIN = 2 * MIB
"""By how many bytes the libraries' share varies from one start to the next."""

SLACK = 8 * MIB
"""Bytes that the allocators hold beyond those that they were asked for."""

LIKELY = 32768
"""Rows of the head that stay in RAM before any FFN group does. A draft chooses among their tokens."""

TEXTS = "token_bytes"
"""The name of the section with each token's text."""

KEPT = ("vectors", "qkv", "output", "router")
"""Names of the sections of a layer that stay in RAM."""

PREDICTOR, GATE = ("narrow", "wide", "lean"), ("gate", "floors", "steps", "groups")
"""Names of the sections of a layer that choose its neurons. They stay in RAM too."""


@dataclass(frozen=True)
class Plan:
    """What a budget buys. The engine obeys it exactly."""

    memory: int  # bytes of the budget
    context: int  # tokens
    threads: int
    resident: bool  # whether the whole model is in RAM, in one constant graph
    pinned_groups: int  # groups of each layer that stay in RAM; in a mixture those of whole experts
    groups: int  # groups of each layer in all
    lent_groups: int  # further groups of each layer that fit into the KV cache's memory while a text is short
    head_rows: int  # rows of the head that stay in RAM, the first
    passing_groups: int  # slots for groups that stream past
    buffers: int  # of reads
    parts: dict[str, int]  # what the memory is used for -> bytes
    smallest: int  # bytes of the smallest budget that works
    whole: int | None  # bytes of the budget from which on `resident` is true; None: never
    card_bytes: int  # bytes read from the card for a token while decoding; for experts, if all are used alike
    slots: tuple[int, ...] = ()  # of each layer's window, if the bundle selects neurons

    def groups_beside(self, lent: int, group_bytes: int) -> int:
        """Groups of each layer that there is room for if the KV cache lends `lent` bytes.

        `group_bytes` is the size of one group in each of the layers together.
        """
        return self.pinned_groups + min(lent // group_bytes, self.lent_groups)

    @property
    def total(self) -> int:
        """Bytes that the plan uses."""
        return sum(self.parts.values())

    @property
    def pinned_share(self) -> float:
        """The share of the neurons that RAM has room for, 0 to 1."""
        neurons = len(self.slots) * self.groups * BLOCK
        return sum(self.slots) / neurons if neurons else self.pinned_groups / self.groups


def make_plan(
    header: Header, *, memory: int, context: int, threads: int, base: int, rates: Floats | None = None
) -> Plan:
    """The plan for a bundle.

    Args:
        memory: bytes that the process may hold.
        context: tokens that the KV cache must have room for.
        threads: threads to compute with.
        base: bytes that the process holds now.
        rates: how often each neuron takes part, [L, F]; None if the bundle selects no neurons.

    Raises MemoryTooSmall, which names the smallest budget that works.
    """
    m, form = header.model, header.group
    cache = cache_bytes(m, context)
    resident = _resident_parts(header, context)
    whole = None if resident is None else base + cache + sum(resident.values())
    if resident and whole and whole <= memory:
        parts = {"interpreter, libraries, tokenizer": base, "KV cache": cache, **resident}
        return Plan(
            memory=memory, context=context, threads=threads, resident=True, pinned_groups=m.groups,
            groups=m.groups, lent_groups=0, head_rows=m.vocabulary, passing_groups=0, buffers=0, parts=parts,
            smallest=smallest(header, context, base), whole=whole, card_bytes=0,
        )  # fmt: skip
    least = smallest(header, context, base)
    if memory < least:
        raise MemoryTooSmall(
            f"{memory / MIB:.0f}M is too small for {m.name} with a context of {context};"
            f" the smallest that works is --memory {-(-(least + MARGIN) // MIB)}M"
        )
    parts = {"interpreter, libraries, tokenizer": base, "KV cache": cache, **_paged_parts(header, context)}
    if rates is not None:
        return _selecting(header, rates, memory, context, threads, parts, least)
    a_group_a_layer = m.layers * form.nbytes
    pinned = min(m.groups, (memory - sum(parts.values())) // a_group_a_layer)
    if m.experts:  # whole experts only
        pinned -= pinned % m.expert_groups
    parts["experts" if m.experts else "pinned neurons"] = pinned * a_group_a_layer
    head, row = _likely(header), header.row_format("head").nbytes
    if pinned == m.groups:
        more = (memory - sum(parts.values())) // row // ROWS_OF_A_RUN * ROWS_OF_A_RUN
        head = min(m.vocabulary, head + more)
        parts["head"] = head * row
    passing = passing_groups(header)
    if pinned == m.groups and head == m.vocabulary:
        passing = 0
        parts["window and read-ahead"] = 0
    lent = 0 if m.experts else min(m.groups - pinned, lendable_bytes(m, context) // a_group_a_layer)
    return Plan(
        memory=memory, context=context, threads=threads, resident=False, pinned_groups=pinned, groups=m.groups,
        lent_groups=lent, head_rows=head, passing_groups=passing, buffers=BUFFERS, parts=parts, smallest=least,
        whole=whole,
        card_bytes=_needed(m) * _passing_bytes(header, pinned) // m.groups + (m.vocabulary - head) * row,
    )  # fmt: skip


def _selecting(
    header: Header, rates: Floats, memory: int, context: int, threads: int, parts: dict[str, int], least: int
) -> Plan:
    """The plan of a bundle that selects neurons: the memory that is left goes to the windows, by `rates` [L, F]."""
    m, size = header.model, header.unit_bytes
    slots = min(m.layers * m.neurons, (memory - sum(parts.values())) // size)
    hottest = np.sort(rates.reshape(-1))[::-1]
    parts["pinned neurons"] = slots * size
    return Plan(
        memory=memory, context=context, threads=threads, resident=False, pinned_groups=0, groups=m.groups,
        lent_groups=0, head_rows=m.vocabulary, passing_groups=0, buffers=BUFFERS, parts=parts, smallest=least,
        whole=None,
        card_bytes=int(hottest[slots:].sum() * size), slots=tuple(shares(rates, slots)),
    )  # fmt: skip


def smallest(header: Header, context: int, base: int) -> int:
    """Bytes of the smallest budget that works. Nothing is pinned then, and every group streams past."""
    return base + cache_bytes(header.model, context) + sum(_paged_parts(header, context).values())


def _likely(header: Header) -> int:
    """Rows of the head that stay in RAM under any budget."""
    m = header.model
    return m.vocabulary if m.experts or header.selection else min(LIKELY, m.vocabulary)


def _needed(m: Architecture) -> int:
    """Groups of a layer that a token needs."""
    return m.experts.used * m.expert_groups if m.experts else m.groups


def passing_groups(header: Header) -> int:
    """The most groups that one read fetches, of any section. There are so many slots for groups that stream past."""
    return max(_of_a_read(header, part) for part in header.ffn_sections)


def _of_a_read(header: Header, part: FfnSection) -> int:
    """The most groups of a section that one read fetches."""
    return min(header.model.expert_groups, units_of_a_read(part.form.nbytes))


def _passing_bytes(header: Header, pinned: int) -> int:
    """Bytes of the groups that are not pinned."""
    return sum(
        part.form.nbytes * min(max(part.first + part.count - pinned, 0), part.count) for part in header.ffn_sections
    )


def rates_of(bundle: Bundle) -> Floats | None:
    """How often each neuron takes part, [L, F]; None if all take part always. Raises DamagedRun, CardError."""
    m = bundle.header.model
    return bundle.floats("rates").reshape(m.layers, m.neurons) if bundle.header.selection else None


def _paged_parts(header: Header, context: int) -> dict[str, int]:
    """Bytes of all that a model which does not fit must have in RAM, but the KV cache."""
    m, head = header.model, _likely(header)
    attention = sum(_section(header, f"layer.{i}.{p}") for i in range(m.layers) for p in KEPT)
    return {
        "graphs": SESSIONS,
        "texts of tokens": _section(header, TEXTS),
        "attention": attention + _rotary(m, context),
        "head": head * header.row_format("head").nbytes,
        "workspace": _workspace(header, context) + SLACK,
        **_reading_parts(header),
    }


def _reading_parts(header: Header) -> dict[str, int]:
    """Bytes of what reads go through, and of what chooses neurons: their sections, scores and maps."""
    m, size = header.model, header.unit_bytes
    if header.selection is None:
        passing = passing_groups(header) * size
        rows = READ_BYTES if _likely(header) < m.vocabulary else 0
        reads = [_of_a_read(header, part) * part.form.nbytes for part in header.ffn_sections]
        return {"window and read-ahead": passing + rows + BUFFERS * buffer_bytes(max(rows, *reads))}
    name, sections = ("gates", GATE) if header.gate_decides else ("predictors", PREDICTOR)
    # bytes of a neuron in a token: its score or activation, and masks; bytes of the columns' steps gathered at once
    of_token, gathered = (24, 2 * TEMPORARY_BYTES) if header.gate_decides else (8, 0)
    return {
        name: sum(_section(header, f"layer.{i}.{part}") for i in range(m.layers) for part in sections),
        # the neurons of a read are there twice: as they came, and those of them that were wanted
        "window and read-ahead": (BUFFERS + 1) * buffer_bytes(max(READ_BYTES, size))
        + 20 * m.layers * m.neurons
        + of_token * TOKENS_AT_ONCE * m.neurons
        + gathered,
    }


def pass_tokens(header: Header) -> int:
    """The most tokens of prompts that a pass takes, of a model that does not fit. More tokens need fewer passes."""
    return TOKENS_AT_ONCE if header.selection or header.model.experts else PREFILL_TOKENS


def _workspace(header: Header, context: int) -> int:
    """Bytes of the temporaries of the largest pass: widened rows, activations, attention scores, logits."""
    m, tokens, more = header.model, min(TOKENS_AT_ONCE, context), pass_tokens(header) - TOKENS_AT_ONCE
    activations = 4 * tokens * (8 * m.hidden + 2 * m.qkv_width + 2 * 2 * BLOCK * 16) + 4 * KEPT_ROWS * m.hidden
    # the hidden states of tokens that are not in a product at the moment, and the bias of their attention
    activations += 4 * more * (5 * m.hidden + 2 * context)
    scores = _scores(m, tokens, context)
    # twice if a graph follows that caps them or adds a bias
    logits = 4 * LOGIT_ROWS * m.vocabulary * (2 if m.logit_cap or "head" in m.biases else 1)
    shares = 4 * tokens * m.hidden * (m.experts.used + 1) if m.experts else 0
    return 4 * TEMPORARY_BYTES + activations + scores + logits + shares


def _scores(m: Architecture, tokens: int, context: int) -> int:
    """Bytes of the attention scores of one layer."""
    return 4 * tokens * context * m.heads


def _rotary(m: Architecture, context: int) -> int:
    """Bytes of the tables of attention.Rotary."""
    return 4 * m.ropes * m.head_dim * context


def _resident_parts(header: Header, context: int) -> dict[str, int] | None:
    """Bytes of all that a model in one constant graph takes while it is loaded, but the KV cache.

    None if the bundle has no such graph.
    """
    f = header.formats
    if header.selection or header.model.experts or "f16" in (f.ffn, f.attention, f.head):
        return None
    m = header.model
    weights = 0
    for form, rows in (
        (header.row_format("head"), m.vocabulary),
        *[
            (header.row_format("qkv"), m.qkv_width * m.layers),
            (header.row_format("output"), m.hidden * m.layers),
        ],
        (RowFormat(f.ffn, m.hidden), m.inputs * m.neurons * m.layers),
        (RowFormat(f.ffn, m.neurons), m.hidden * m.layers),
    ):
        # ternary rows are nibbles here
        packed, steps = rows * form.width * max(form.bits, 4) // 8, 4 * rows * form.blocks
        weights += packed + 2 * steps
    cache, workspace = cache_bytes(m, context), _resident_workspace(m, context) + SLACK
    return {
        "graphs": SESSIONS, "texts of tokens": _section(header, TEXTS), "constant weights": weights,
        "workspace": workspace,
        "weights while loading": max(0, int(LOADING * weights) + HEAP - cache - workspace),
    }  # fmt: skip


def _resident_workspace(m: Architecture, context: int) -> int:
    """Bytes of the temporaries of the largest pass of a model that fits."""
    tokens = min(TOKENS_AT_ONCE, context)
    activations = 4 * tokens * (8 * m.hidden + 2 * m.qkv_width + 4 * m.neurons) + 4 * KEPT_ROWS * m.hidden
    return activations + _scores(m, tokens, context) + _rotary(m, context) + 12 * m.vocabulary


def _section(header: Header, name: str) -> int:
    """Bytes of a section; 0 if there is none of the name."""
    section = header.section_named(name)
    return section.length if section else 0
