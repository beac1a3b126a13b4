"""A RAM budget -> what stays in RAM, how large the window is, how long the context may be.

The budget counts everything that the process holds: what it holds when the plan is made (interpreter, libraries,
tokenizer: measured) and what is still to come (computed from the bundle's header).

A model stays whole if it fits. As many of its layers as there is room for then have the fast arithmetic, which takes
more RAM. A model that does not fit pages, in float32 if it is not a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Header
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.model.kv_cache import SPARE, cache_bytes, lendable_bytes, widened_bytes
from flashd.engine.model.states import lendable_states, states_bytes
from flashd.engine.paging.eviction import Numbers, shares
from flashd.engine.planning import parts
from flashd.engine.planning.parts import BUFFERS, EXPERT_BUFFERS, LIKELY
from flashd.errors import MemoryTooSmall, UsageError
from flashd.graphs.constant import Arithmetic
from flashd.graphs.rounding import KvFormat
from flashd.system.memory import MIB

MARGIN = 2 * MIB
"""What the libraries' measured share varies by from one start to the next."""


LIBRARIES = "interpreter, libraries, tokenizer"
"""The part of a plan that is there already."""

LEADING_FFNS = "first layers without experts"
"""The part of a mixture that every token uses."""

DRAFT = "draft"
"""The part of a small model that guesses."""

WEIGHTS = "constant weights"
"""The part of a model that stays whole."""


@dataclass(frozen=True)
class Plan:
    """What a budget buys. Sizes in bytes. The engine obeys it to the group."""

    memory: int
    context: int
    threads: int
    resident: bool  # the whole model, in graphs of whole layers
    int8_layers: int  # of a whole model, the first so many, in the fast arithmetic; the others are in float32
    int8_head: bool
    pinned: tuple[int, ...]  # of each layer with groups, its first ones that stay in RAM; of a mixture, whole experts
    groups: tuple[int, ...]  # of each of these, in all
    group_bytes: tuple[int, ...]  # that a group of each of these takes in RAM
    lent_groups: int  # of all layers, that RAM of the KV cache has room for while a text is short
    head_rows: int  # of the head, the first so many
    buffers: int
    parts: dict[str, int]
    smallest: int
    whole: int | None  # from which on the whole model stays; None: it has no such form
    card_bytes: int  # read from the card for a token while decoding; of experts, if all are as likely
    neurons: int  # of a layer
    used: float  # of what streams past, the share that a token needs: of experts, those that it uses
    kv: KvFormat = "float32"  # how keys and values are kept
    slots: tuple[int, ...] = ()  # neurons of each layer's window, if neurons are selected
    lent_card_bytes: int = 0  # of card_bytes, those that are not read while a text is short
    reuses_up_to: int = 0  # tokens of a pass that leaves room for the gaps of what is reused, see freed_memory
    draft: Plan | None = None  # of the small model that makes its guesses, see planning.draft
    arithmetic: Arithmetic = "float32"  # of a model that pages
    texts: int = 1  # answers that may share a pass, each with states of its own if layers have some

    def pinned_beside(self, lent: int) -> tuple[int, ...]:
        """Groups of each layer that there is room for with `lent` bytes of the KV cache."""
        here = sum(self.pinned)
        more = min(_groups_in(lent, self.groups, self.group_bytes, here), self.lent_groups)
        return _spread(here + more, self.groups)

    @property
    def lent_held(self) -> int:
        """Bytes in RAM of the groups that RAM of the KV cache has room for."""
        more = _spread(sum(self.pinned) + self.lent_groups, self.groups)
        return sum(
            size * (groups - here) for size, groups, here in zip(self.group_bytes, more, self.pinned, strict=True)
        )

    @property
    def least(self) -> int:
        """The smallest budget that works, as everybody names it who says so."""
        return with_margin(self.smallest)

    @property
    def whole_from(self) -> int | None:
        """The budget from which on the whole model stays, named likewise."""
        return None if self.whole is None else with_margin(self.whole)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def pinned_share(self) -> float:
        """Of the neurons, those that RAM has room for."""
        if self.slots:
            return sum(self.slots) / (len(self.slots) * self.neurons)
        return sum(self.pinned) / sum(self.groups)


def make_plan(
    header: Header, *, memory: int, context: int, threads: int, base: int, rates: Floats | None = None,
    beside: Mapping[str, int] | None = None, arithmetic: Arithmetic = "int8", kv: KvFormat = "float32",
    draft: Plan | None = None,
) -> Plan:  # fmt: skip
    """The plan for a bundle.

    Args:
        memory: bytes that the process may hold.
        context: tokens that the KV cache must have room for.
        base: bytes that the process holds now.
        beside: bytes that a service holds or may be made to hold beside the model, by what for.
        rates: how often each neuron takes part [L, F], of a bundle that selects.
        arithmetic: the fastest that a model may have which stays whole or is a mixture.
        kv: how keys and values are kept.
        draft: of a small model that is in RAM too.

    Raises MemoryTooSmall, naming the smallest budget that works; UsageError for keys that cannot be kept so.
    """
    m = header.model
    if kv != "float32" and any(kind.borrows or kind.head_dim or kind.kv_heads for kind in m.attention):
        raise UsageError(f"--kv {kv}: {m.name} has heads of several sizes, whose keys stay in float32 (kv: float32)")
    beside = dict(beside or {})
    if draft is not None:
        beside[DRAFT] = draft.total
    base += sum(beside.values())
    whole = sum(whole_parts(header, context, base, 0, False, kv).values()) if _can_be_whole(header) else None
    paged = smallest(header, context, base, kv, arithmetic)
    least = paged if whole is None else min(paged, whole)  # a tiny model takes less if it stays whole
    plan = Plan(
        memory=memory, context=context, threads=threads, resident=True, int8_layers=0, int8_head=False,
        pinned=m.paged_groups, groups=m.paged_groups, group_bytes=_group_bytes(header), lent_groups=0,
        head_rows=m.vocabulary, buffers=0, parts={}, smallest=least, whole=whole, card_bytes=0, neurons=m.neurons,
        used=m.experts.used / m.experts.count if m.experts else 1.0, kv=kv, draft=draft,
        arithmetic=_of_paged(m, arithmetic),
    )  # fmt: skip
    if whole is not None and whole <= memory:
        return _with(_whole(header, base, plan, arithmetic), beside)
    if memory < least:
        what = f"{m.name} with a context of {context}"
        raise MemoryTooSmall(memory, with_margin(least), f"{what} and its draft" if draft else what)
    if rates is not None:
        return _with(_selecting(header, rates, base, plan), beside)
    return _with(_paging(header, base, plan), beside)


def _with(plan: Plan, beside: Mapping[str, int]) -> Plan:
    """The same plan; what a service holds beside the model has lines of its own."""
    held = dict(plan.parts)
    libraries = held.pop(LIBRARIES) - sum(beside.values())
    return replace(plan, parts={LIBRARIES: libraries, **beside, **held})


def _whole(header: Header, base: int, plan: Plan, arithmetic: Arithmetic) -> Plan:
    """As many layers in the fast arithmetic as there is room for, and the head if all of them are."""
    layers = header.model.layers
    tries = [(layers, True), *((count, False) for count in range(layers, 0, -1))] if arithmetic == "int8" else []
    for count, head in (*tries, (0, False)):
        held = whole_parts(header, plan.context, base, count, head, plan.kv)
        if sum(held.values()) <= plan.memory:
            break
    return replace(plan, int8_layers=count, int8_head=head, parts=held)


def _paging(header: Header, base: int, plan: Plan) -> Plan:
    """What is left after what every token needs goes to pinned groups, and then to the rest of the head."""
    m, every = header.model, sum(plan.groups)
    layers = len(m.paged_layers)
    held = _paged_parts(header, plan.context, base, 0, kv=plan.kv, arithmetic=plan.arithmetic)
    texts, beside = parts.texts(m, plan.memory - sum(held.values()), lends=not m.experts)

    def parts_of(pinned: int, head: int = 0) -> dict[str, int]:
        return _paged_parts(header, plan.context, base, pinned, head, plan.kv, plan.arithmetic) | beside

    held |= beside
    pinned = _groups_in(plan.memory - sum(held.values()), plan.groups, plan.group_bytes)
    if m.experts:  # whole ones, as many in every layer
        pinned -= pinned % (layers * m.expert_groups)
    while pinned and sum(parts_of(pinned).values()) > plan.memory:
        pinned -= 1  # the more groups share a session, the larger its temporaries
    each = _spread(pinned, plan.groups)
    head, row = _likely(header), header.row_format("head")
    if pinned == every:
        run = max(1, parts.held(row, ROWS_OF_A_RUN, plan.arithmetic))
        more = max(0, plan.memory - sum(parts_of(pinned).values())) // run * ROWS_OF_A_RUN
        head = min(m.vocabulary, head + more)
        while more and (over := sum(parts_of(pinned, head).values()) - plan.memory) > 0:
            head -= -(-over // run) * ROWS_OF_A_RUN  # each row in RAM has logits behind every node
        head = max(head, _likely(header))
    held = parts_of(pinned, head)
    lendable = lendable_bytes(m, plan.context, plan.kv) + lendable_states(m, texts - 1)
    lent = 0 if m.experts else _groups_in(lendable, plan.groups, plan.group_bytes, pinned)
    passing = _passing_bytes(header, each)
    return replace(
        plan, resident=False, pinned=each, lent_groups=lent, head_rows=head, texts=texts,
        buffers=(EXPERT_BUFFERS if m.experts else BUFFERS) if "window and read-ahead" in held else 0, parts=held,
        card_bytes=passing + (m.vocabulary - head) * row.nbytes,
        lent_card_bytes=passing - _passing_bytes(header, _spread(pinned + lent, plan.groups)),
        reuses_up_to=parts.tokens_that_reuse(header, plan.context, max(each)),
    )  # fmt: skip


def _selecting(header: Header, rates: Floats, base: int, plan: Plan) -> Plan:
    """What is left goes to the windows of the layers, by how often their neurons take part."""
    m, size = header.model, header.unit_bytes
    held = _paged_parts(header, plan.context, base, pinned=0, kv=plan.kv)
    texts, beside = parts.texts(m, plan.memory - sum(held.values()), lends=False)
    held |= beside
    slots = min(m.layers * m.neurons, (plan.memory - sum(held.values())) // size)
    hottest = np.sort(rates.reshape(-1))[::-1]
    return replace(
        plan, resident=False, pinned=(0,) * m.layers, buffers=BUFFERS,
        parts=held | {"pinned neurons": slots * size},
        card_bytes=int(hottest[slots:].sum() * size), slots=tuple(shares(rates, slots)), texts=texts,
    )  # fmt: skip


def with_margin(least: int) -> int:
    """What to name as the smallest budget, if a plan made now needs `least` bytes: whole MiB, as users write them.

    A budget without the margin is not refused, so what one process names works in another one.
    """
    return -(-(least + MARGIN) // MIB) * MIB


def smallest(
    header: Header, context: int, base: int, kv: KvFormat = "float32", arithmetic: Arithmetic = "int8"
) -> int:
    """The smallest budget with which a model pages: nothing pinned, every group streams past."""
    paged = _paged_parts(header, context, base, 0, kv=kv, arithmetic=_of_paged(header.model, arithmetic))
    return sum(paged.values())


def _of_paged(m: Architecture, arithmetic: Arithmetic) -> Arithmetic:
    """The arithmetic of a model that pages: of a mixture what is asked for, of others the one that takes less RAM."""
    return arithmetic if m.experts else "float32"


def rates_of(bundle: Bundle) -> Floats | None:
    """How often each neuron takes part [L, F]; None if all do. Raises DamagedRun, CardError."""
    m = bundle.header.model
    return bundle.floats("rates").reshape(m.layers, m.neurons) if bundle.header.selection else None


def _spread(groups: int, every: tuple[int, ...]) -> tuple[int, ...]:
    """So many groups over layers that have `every`: as large a share of each, the first layers getting what is left.

    A layer never gets fewer if there are more.
    """
    return tuple(np.bincount(_by_turns(every)[:groups], minlength=len(every)).tolist())


def _by_turns(every: tuple[int, ...]) -> Numbers:
    """[n] the layers of all groups, in the order in which groups are pinned."""
    order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in every]), kind="stable")
    return np.repeat(np.arange(len(every)), every)[order]


def _groups_in(nbytes: int, every: tuple[int, ...], sizes: tuple[int, ...], first: int = 0) -> int:
    """How many groups, from number `first` on in the order in which they are pinned, there is room for.

    `sizes`: bytes of a group of each layer.
    """
    ends = np.cumsum(np.array(sizes)[_by_turns(every)[first:]])
    return int(np.searchsorted(ends, nbytes, side="right"))


def _likely(header: Header) -> int:
    """Rows of the head that stay in RAM in any case."""
    m = header.model
    return m.vocabulary if m.experts or header.selection else min(LIKELY, m.vocabulary)


def _group_bytes(header: Header) -> tuple[int, ...]:
    """Bytes in RAM of a group of each layer that has some."""
    return tuple(parts.group_kept(header.group_of(i), header.model) for i in header.model.paged_layers)


def _passing_bytes(header: Header, pinned: tuple[int, ...]) -> int:
    """Bytes of the groups that are not pinned and that a token needs."""
    m = header.model
    here = dict(zip(m.paged_layers, pinned, strict=True))
    passing = sum(
        part.form.nbytes * min(max(part.first + part.count - here[part.layer], 0), part.count)
        for part in header.ffn_sections
    )
    return passing * _needed(m) // m.groups


def _needed(m: Architecture) -> int:
    """Groups of a layer that a token needs."""
    return m.experts.used * m.expert_groups if m.experts else m.groups


def _common(header: Header, context: int, base: int, kv: KvFormat, together: int) -> dict[str, int]:
    m, states = header.model, states_bytes(header.model)
    # the rows behind the last token, see graphs.constant
    rows = context + SPARE
    return {
        LIBRARIES: base,
        "KV cache": cache_bytes(m, rows, kv) + widened_bytes(m, rows, kv, together),
        **({"states": states} if states else {}),
        "graphs": parts.SESSIONS,
        "texts of tokens": parts.section_bytes(header, "token_bytes"),
    }


def _paged_parts(
    header: Header, context: int, base: int, pinned: int, head: int = 0, kv: KvFormat = "float32",
    arithmetic: Arithmetic = "float32",
) -> dict[str, int]:  # fmt: skip
    """The parts of a model that pages, `pinned` groups of all layers and `head` rows in RAM."""
    m, head = header.model, head or _likely(header)
    every = sum(m.paged_groups)
    spread = _spread(pinned, m.paged_groups)
    each = max(spread)
    held = _common(header, context, base, kv, 1) | {
        "attention": parts.attention_held(header, arithmetic) + parts.rotary(m, context),
        "head": parts.head_held(header, head, arithmetic),
        "workspace": parts.workspace(
            header, context, m.expert_groups if m.experts else max(each, 1), head, arithmetic=arithmetic
        ),
        **parts.reading(header, arithmetic, head, pinned == every),
        **_tokens(header, arithmetic),
    }
    if m.experts and m.experts.leading:
        held[LEADING_FFNS] = parts.leading_held(header, arithmetic)
    if not header.selection:
        sizes = zip(spread, _group_bytes(header), strict=True)
        held["experts" if m.experts else "pinned neurons"] = sum(groups * size for groups, size in sizes)
    return held | {"opening what is pinned": _opening(header, held["workspace"] + held["KV cache"], each, arithmetic)}


def _tokens(header: Header, arithmetic: Arithmetic) -> dict[str, int]:
    held = {
        "token inputs": parts.tokens_held(header, arithmetic),
        "token states": parts.states_held(header, arithmetic),
    }
    return {name: nbytes for name, nbytes in held.items() if nbytes}


def _opening(header: Header, later: int, groups: int, arithmetic: Arithmetic) -> int:
    """What opening the largest session takes, beyond what is not touched before all of them are open."""
    m = header.model
    largest = max(
        parts.attention_opening(header, arithmetic),
        parts.tokens_opening(header, arithmetic),
        parts.states_opening(header, arithmetic),
        parts.leading_opening(header, arithmetic),
        parts.while_opening(header.row_format("head"), min(parts.head_part(header), _likely(header)), arithmetic),
        0 if header.selection or m.experts else groups * parts.group_opening(header.largest_group, arithmetic),
    )
    return max(0, largest - later)


def _can_be_whole(header: Header) -> bool:
    f = header.formats
    return not (header.selection or header.model.experts or "f16" in (f.ffn, f.attention, f.head))


def whole_parts(
    header: Header, context: int, base: int, int8_layers: int, int8_head: bool, kv: KvFormat = "float32",
    head_rows: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """The parts of a model that stays whole, with the first `head_rows` of its head. None: with all of them."""
    m, head = header.model, header.row_format("head")
    of_head: Arithmetic = "int8" if int8_head else "float32"
    weights, opening = parts.head_held(header, head_rows or m.vocabulary, of_head), 0
    kinds: dict[Arithmetic, int] = {"int8": int8_layers, "float32": m.layers - int8_layers}
    first = 0
    for kind, count in kinds.items():
        layers = range(first, first + count)
        weights += sum(m.layer_groups[i] * parts.group_held(header.group_of(i), kind) for i in layers)
        weights += parts.attention_held(header, kind, layers)
        first += count
        each = m.groups * parts.group_opening(header.largest_group, kind) + parts.attention_opening(header, kind)
        opening = max(opening, min(count, parts.layers_together(header)) * each)
    opening = max(opening, parts.while_opening(head, parts.head_part(header), of_head))
    of_tokens: Arithmetic = "int8" if int8_layers else "float32"
    opening = max(opening, parts.tokens_opening(header, of_tokens), parts.states_opening(header, of_tokens))
    workspace = parts.workspace(header, context, m.groups, m.vocabulary, whole=True) + parts.rotary(m, context)
    common = _common(header, context, base, kv, parts.layers_together(header))
    # the KV cache and the workspace are not touched before all sessions are open
    opening = max(0, opening - workspace - common["KV cache"])
    return common | {WEIGHTS: weights, "workspace": workspace, **_tokens(header, of_tokens), "opening": opening}
