"""A RAM budget -> what stays in RAM, how large the window is, how long the context may be.

The budget counts everything that the process holds: what it holds when the plan is made (interpreter, libraries,
tokenizer: measured) and what is still to come (computed from the bundle's header).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.formats import RowFormat
from flashd.bundle.header import Header, Part
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
"""What is held of constant weights beside them while onnxruntime 1.32 repacks them, in parts of them and beside: 1.64
GiB for Qwen2.5-Coder-1.5B's 1.10, 195 MiB for SmolLM2's 106. The KV cache and the workspace come later."""

PREFILL_TOKENS = 256
"""Tokens of a prompt that share one pass over the card, where all of them need all groups."""

LOGIT_ROWS = NODES + 1
"""Logits over the whole vocabulary that a pass holds at once: of a tree, and behind the prompt."""

BUFFERS = 6
"""Extents read ahead or in use: enough to keep the card busy while a layer's attention computes."""

SESSIONS = 10 * MIB
"""The in-place graphs' sessions and the thread pool, measured 5 to 10 MiB on x86-64 with onnxruntime 1.32."""

MARGIN = 2 * MIB
"""What the libraries' measured share varies by from one start to the next."""

SLACK = 8 * MIB
"""What the allocators hold beyond what was asked of them."""


LIKELY = 32768
"""Rows of the head that stay in RAM before any FFN group does: the tokens among which a draft chooses."""

TEXTS = "token_bytes"
"""The section of what each token stands for."""

KEPT = ("vectors", "qkv", "output", "router")
"""Sections of a layer that stay in RAM."""

PREDICTOR, GATE = ("narrow", "wide", "lean"), ("gate", "floors", "steps", "groups")
"""And those of what chooses neurons."""


@dataclass(frozen=True)
class Plan:
    """What a budget buys. Sizes in bytes. The engine obeys it to the slot."""

    memory: int
    context: int
    threads: int
    resident: bool
    pinned_groups: int  # of every layer; of a mixture, those of the experts that it has room for
    groups: int  # of every layer, in all
    lent_groups: int  # of every layer, that RAM of the KV cache has room for while a text is short
    head_rows: int  # of the head, the first so many
    passing_groups: int  # slots for what streams past
    buffers: int
    parts: dict[str, int]
    smallest: int
    whole: int | None  # from which on the whole model stays, in constant graphs; None: it has none
    card_bytes: int  # read from the card for a token while decoding; of experts, if all are as likely
    slots: tuple[int, ...] = ()  # of each layer's window, where neurons are selected

    def groups_beside(self, lent: int, group_bytes: int) -> int:
        """Groups of every layer that there is room for with `lent` bytes of the KV cache.

        `group_bytes` is what a group of every layer takes together.
        """
        return self.pinned_groups + min(lent // group_bytes, self.lent_groups)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def pinned_share(self) -> float:
        """Of the neurons, those that RAM has room for."""
        neurons = len(self.slots) * self.groups * BLOCK
        return sum(self.slots) / neurons if neurons else self.pinned_groups / self.groups


def make_plan(
    header: Header,
    *,
    memory: int,
    context: int,
    threads: int,
    base: int,
    rates: Floats | None = None,
    clients: int = 0,
) -> Plan:
    """The plan for a bundle.

    Args:
        memory: bytes that the process may hold.
        context: tokens that the KV cache must have room for.
        base: bytes that the process holds now.
        clients: bytes that a service's clients may make it hold.
        rates: how often each neuron takes part [L, F], of a bundle that selects.

    Raises MemoryTooSmall, naming the smallest budget that works.
    """
    m, form = header.model, header.group
    held = {"interpreter, libraries, tokenizer": base, **({"clients": clients} if clients else {})}
    base += clients
    cache = cache_bytes(m, context)
    resident = _resident_parts(header, context)
    whole = None if resident is None else base + cache + sum(resident.values())
    if resident and whole and whole <= memory:
        parts = {**held, "KV cache": cache, **resident}
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
    parts = {**held, "KV cache": cache, **_paged_parts(header, context)}
    if rates is not None:
        return _selecting(header, rates, memory, context, threads, parts, least)
    a_group_a_layer = m.layers * form.nbytes
    pinned = min(m.groups, (memory - sum(parts.values())) // a_group_a_layer)
    if m.experts:  # whole ones
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
    """What is left goes to the windows of the layers, by how often their neurons take part."""
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
    """The smallest budget that works: nothing pinned, every group streams past."""
    return base + cache_bytes(header.model, context) + sum(_paged_parts(header, context).values())


def _likely(header: Header) -> int:
    """Rows of the head that stay in RAM in any case."""
    m = header.model
    return m.vocabulary if m.experts or header.selection else min(LIKELY, m.vocabulary)


def _needed(m: Architecture) -> int:
    """Groups of a layer that a token needs."""
    return m.experts.used * m.expert_groups if m.experts else m.groups


def passing_groups(header: Header) -> int:
    """Slots for the groups of one read."""
    return max(_of_a_read(header, part) for part in header.ffn_parts)


def _of_a_read(header: Header, part: Part) -> int:
    """Groups that one read fetches at the most."""
    return min(header.model.expert_groups, units_of_a_read(part.form.nbytes))


def _passing_bytes(header: Header, pinned: int) -> int:
    """Bytes of the groups that are not pinned."""
    return sum(
        part.form.nbytes * min(max(part.first + part.count - pinned, 0), part.count) for part in header.ffn_parts
    )


def rates_of(bundle: Bundle) -> Floats | None:
    """How often each neuron takes part [L, F]; None where all do. Raises DamagedRun, CardError."""
    m = bundle.header.model
    return bundle.floats("rates").reshape(m.layers, m.neurons) if bundle.header.selection else None


def _paged_parts(header: Header, context: int) -> dict[str, int]:
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
    """What reads go through; where neurons are selected, what chooses them, the policies' scores and maps too."""
    m, size = header.model, header.unit_bytes
    if header.selection is None:
        passing = passing_groups(header) * size
        rows = READ_BYTES if _likely(header) < m.vocabulary else 0
        reads = [_of_a_read(header, part) * part.form.nbytes for part in header.ffn_parts]
        return {"window and read-ahead": passing + rows + BUFFERS * buffer_bytes(max(rows, *reads))}
    name, sections = ("gates", GATE) if header.gate_decides else ("predictors", PREDICTOR)
    # bytes of a neuron in a token: its score or activation, and masks of it; and what is gathered of columns' steps
    of_token, gathered = (24, 2 * TEMPORARY_BYTES) if header.gate_decides else (8, 0)
    return {
        name: sum(_section(header, f"layer.{i}.{part}") for i in range(m.layers) for part in sections),
        # a read's neurons are there twice: as they came, and those that were wanted
        "window and read-ahead": (BUFFERS + 1) * buffer_bytes(max(READ_BYTES, size))
        + 20 * m.layers * m.neurons
        + of_token * TOKENS_AT_ONCE * m.neurons
        + gathered,
    }


def pass_tokens(header: Header) -> int:
    """Tokens of prompts that a pass of a model that does not fit takes: the more, the fewer passes they need."""
    return TOKENS_AT_ONCE if header.selection or header.model.experts else PREFILL_TOKENS


def _workspace(header: Header, context: int) -> int:
    """Temporaries of the largest pass: widened rows, activations of a chunk of tokens, attention scores."""
    m, tokens, more = header.model, min(TOKENS_AT_ONCE, context), pass_tokens(header) - TOKENS_AT_ONCE
    activations = 4 * tokens * (8 * m.hidden + 2 * m.qkv_width + 2 * 2 * BLOCK * 16) + 4 * KEPT_ROWS * m.hidden
    # what a pass has of the tokens that are not in a product at the moment, and what they may look at
    activations += 4 * more * (5 * m.hidden + 2 * context)
    scores = _scores(m, tokens, context)
    # twice where a graph follows that caps them or adds a bias
    logits = 4 * LOGIT_ROWS * m.vocabulary * (2 if m.logit_cap or "head" in m.biases else 1)
    shares = 4 * tokens * m.hidden * (m.experts.used + 1) if m.experts else 0
    return 4 * TEMPORARY_BYTES + activations + scores + logits + shares


def _scores(m: Architecture, tokens: int, context: int) -> int:
    """Attention's, of one layer."""
    return 4 * tokens * context * m.heads


def _rotary(m: Architecture, context: int) -> int:
    """Its tables, see graph.Rotary."""
    return 4 * m.ropes * m.head_dim * context


def _resident_parts(header: Header, context: int) -> dict[str, int] | None:
    """Peak bytes while constant graphs are loaded: what goes in and, repacked, what stays; None without them."""
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
    tokens = min(TOKENS_AT_ONCE, context)
    activations = 4 * tokens * (8 * m.hidden + 2 * m.qkv_width + 4 * m.neurons) + 4 * KEPT_ROWS * m.hidden
    return activations + _scores(m, tokens, context) + _rotary(m, context) + 12 * m.vocabulary


def _section(header: Header, name: str) -> int:
    section = header.section_named(name)
    return section.length if section else 0
