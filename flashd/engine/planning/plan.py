"""A RAM budget -> what stays in RAM, how large the window is, how long the context may be.

The budget counts everything that the process holds: what it holds when the plan is made (interpreter, libraries,
tokenizer: measured) and what is still to come (computed from the bundle's header).

A model stays whole if it fits. As many of its layers as there is room for then have the fast arithmetic, which takes
more RAM. A model that does not fit pages.
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
from flashd.engine.model.kv_cache import lendable_bytes
from flashd.engine.model.states import lendable_states
from flashd.engine.paging.eviction import shares
from flashd.engine.planning import parts
from flashd.engine.planning.held import (
    LIBRARIES,
    by_turns,
    group_bytes,
    idle,
    likely,
    paged_parts,
    spread,
    whole_parts,
)
from flashd.engine.planning.parts import BUFFERS, EXPERT_BUFFERS
from flashd.errors import MemoryTooSmall, UsageError
from flashd.graphs.constant import Arithmetic
from flashd.graphs.rounding import KvFormat
from flashd.system.memory import MIB

MARGIN = 2 * MIB
"""What the libraries' measured share varies by from one start to the next."""


DRAFT = "draft"
"""The part of a small model that guesses."""


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
    lent_groups: int  # of all layers, that RAM has room for while a text is short and no prompt is read
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
    draft: Plan | None = None  # of the small model that makes its guesses, see planning.draft
    arithmetic: Arithmetic = "float32"  # of a model that pages, see held.of_sessions
    constant_experts: bool = False  # whether experts are constants of sessions: there is room for all of them
    texts: int = 1  # answers that may share a pass, each with states of its own if layers have some
    of_prompts: int = 0  # bytes of the workspace that only passes over prompts need
    of_unused: int = 0  # and those that no other pass needs for a token by which a text is shorter than the context

    def pinned_beside(self, lent: int) -> tuple[int, ...]:
        """Groups of each layer that there is room for with `lent` bytes of other parts."""
        here = sum(self.pinned)
        more = min(_groups_in(lent, self.groups, self.group_bytes, here), self.lent_groups)
        return spread(here + more, self.groups)

    @property
    def all_constant(self) -> bool:
        """Whether every product is with constants of a session, so that a pass reads and unpacks nothing."""
        return self.resident or self.constant_experts

    @property
    def of_ffns(self) -> Arithmetic:
        """The arithmetic of FFNs, of the first layers if a model that stays whole has two."""
        return "int8" if self.resident and self.int8_layers else self.arithmetic

    @property
    def computed(self) -> str:
        """How keys and values come about and are kept, in a few words. Plans with others have other last bits."""
        whole = f"{self.int8_layers} layers in int8" if self.int8_layers else "float32"
        return f"{whole if self.resident else self.arithmetic}, {self.kv}"

    @property
    def lent_held(self) -> int:
        """Bytes in RAM of the groups that are there while a text is short and no prompt is read."""
        more = spread(sum(self.pinned) + self.lent_groups, self.groups)
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
    beside: Mapping[str, int] | None = None, arithmetic: Arithmetic | None = None, kv: KvFormat = "float32",
    draft: Plan | None = None,
) -> Plan:  # fmt: skip
    """The plan for a bundle.

    Args:
        memory: bytes that the process may hold.
        context: tokens that the KV cache must have room for.
        base: bytes that the process holds now.
        beside: bytes that a service holds or may be made to hold beside the model, by what for.
        rates: how often each neuron takes part [L, F], of a bundle that selects.
        arithmetic: the one to use. None: int8, but float32 for neurons that are selected.
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
    of_paged, of_whole = _of_paged(header, arithmetic), arithmetic or "int8"
    paged = smallest(header, context, base, kv, of_paged, threads)
    least = paged if whole is None else min(paged, whole)  # a tiny model takes less if it stays whole
    plan = Plan(
        memory=memory, context=context, threads=threads, resident=True, int8_layers=0, int8_head=False,
        pinned=m.paged_groups, groups=m.paged_groups, group_bytes=group_bytes(header), lent_groups=0,
        head_rows=m.vocabulary, buffers=0, parts={}, smallest=least, whole=whole, card_bytes=0, neurons=m.neurons,
        used=m.experts.used / m.experts.count if m.experts else 1.0, kv=kv, draft=draft,
        arithmetic=of_paged,
    )  # fmt: skip
    if whole is not None and whole <= memory:
        return _with(_whole(header, base, plan, of_whole), beside)
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
    held, constant = {}, False
    if m.experts:
        held = paged_parts(header, plan.context, base, every, 0, plan.kv, plan.arithmetic, True, plan.threads)
        constant = sum(held.values()) <= plan.memory
    if not constant:
        held = paged_parts(header, plan.context, base, 0, 0, plan.kv, plan.arithmetic, threads=plan.threads)
    sizes = group_bytes(header, plan.arithmetic if constant else None)
    texts, beside = parts.texts(m, plan.memory - sum(held.values()), lends=not m.experts)

    def parts_of(pinned: int, head: int = 0) -> dict[str, int]:
        kinds = plan.kv, plan.arithmetic, constant, plan.threads
        return paged_parts(header, plan.context, base, pinned, head, *kinds) | beside

    held |= beside
    pinned = every if constant else _groups_in(plan.memory - sum(held.values()), plan.groups, sizes)
    if m.experts:  # whole ones, as many in every layer
        pinned -= pinned % (layers * m.expert_groups)
    while pinned and sum(parts_of(pinned).values()) > plan.memory:
        pinned -= 1
    each = spread(pinned, plan.groups)
    head, row = likely(header), header.row_format("head")
    if pinned == every:
        run = ROWS_OF_A_RUN * row.nbytes
        more = max(0, plan.memory - sum(parts_of(pinned).values())) // run * ROWS_OF_A_RUN
        head = min(m.vocabulary, head + more)
        while more and (over := sum(parts_of(pinned, head).values()) - plan.memory) > 0:
            head -= -(-over // run) * ROWS_OF_A_RUN  # each row in RAM has logits behind every node
        head = max(head, likely(header))
    held = parts_of(pinned, head)
    unneeded = idle(header, plan.context, head, plan.arithmetic, plan.threads)
    lendable = lendable_bytes(m, plan.context, plan.kv) + lendable_states(m, texts - 1)
    lendable += unneeded.of_prompts + plan.context * unneeded.of_unused
    lent = 0 if m.experts else _groups_in(lendable, plan.groups, plan.group_bytes, pinned)
    passing = _passing_bytes(header, each)
    return replace(
        plan, resident=False, pinned=each, lent_groups=lent, head_rows=head, texts=texts, group_bytes=sizes,
        constant_experts=constant, **unneeded._asdict(),
        buffers=(EXPERT_BUFFERS if m.experts else BUFFERS) if "window and read-ahead" in held else 0, parts=held,
        card_bytes=passing + (m.vocabulary - head) * row.nbytes,
        lent_card_bytes=passing - _passing_bytes(header, spread(pinned + lent, plan.groups)),
    )  # fmt: skip


def _selecting(header: Header, rates: Floats, base: int, plan: Plan) -> Plan:
    """What is left goes to the windows of the layers, by how often their neurons take part."""
    m, size = header.model, header.unit_bytes
    held = paged_parts(header, plan.context, base, pinned=0, kv=plan.kv, threads=plan.threads)
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
    header: Header, context: int, base: int, kv: KvFormat = "float32", arithmetic: Arithmetic | None = None,
    threads: int = 1,
) -> int:  # fmt: skip
    """The smallest budget with which a model pages: nothing pinned, every group streams past."""
    kinds = kv, _of_paged(header, arithmetic)
    return sum(paged_parts(header, context, base, 0, 0, *kinds, threads=threads).values())


def _of_paged(header: Header, asked: Arithmetic | None) -> Arithmetic:
    """The arithmetic of a model that pages. Neurons that are selected are multiplied in float32."""
    return "float32" if header.selection else asked or "int8"


def rates_of(bundle: Bundle) -> Floats | None:
    """How often each neuron takes part [L, F]; None if all do. Raises DamagedRun, CardError."""
    m = bundle.header.model
    return bundle.floats("rates").reshape(m.layers, m.neurons) if bundle.header.selection else None


def _groups_in(nbytes: int, every: tuple[int, ...], sizes: tuple[int, ...], first: int = 0) -> int:
    """How many groups, from number `first` on in the order in which they are pinned, there is room for.

    `sizes`: bytes of a group of each layer.
    """
    ends = np.cumsum(np.array(sizes)[by_turns(every)[first:]])
    return int(np.searchsorted(ends, nbytes, side="right"))


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


def _can_be_whole(header: Header) -> bool:
    f = header.formats
    return not (header.selection or header.model.experts or "f16" in (f.ffn, f.attention, f.head))
