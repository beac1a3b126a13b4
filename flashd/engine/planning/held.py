"""What a model holds in RAM, part by part, in each of the ways in which it may stay there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashd.bundle.header import Header
from flashd.engine.model.kv_cache import SPARE, cache_bytes, widened_bytes
from flashd.engine.model.sizes import TREE_NODES
from flashd.engine.model.states import states_bytes
from flashd.engine.paging.eviction import Numbers
from flashd.engine.planning import parts, unpacked
from flashd.engine.planning.parts import LIKELY, PREFILL_TOKENS
from flashd.graphs.constant import Arithmetic
from flashd.graphs.rounding import KvFormat

LIBRARIES = "interpreter, libraries, tokenizer"
"""The part of a plan that is there already."""

LEADING_FFNS = "first layers without experts"
"""The part of a mixture that every token uses."""

WEIGHTS = "constant weights"
"""The part of a model that stays whole."""


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


def paged_parts(
    header: Header, context: int, base: int, pinned: int, head: int = 0, kv: KvFormat = "float32",
    arithmetic: Arithmetic = "float32", constant_experts: bool = False, threads: int = 1,
) -> dict[str, int]:  # fmt: skip
    """The parts of a model that pages, `pinned` groups of all layers and `head` rows in RAM.

    `constant_experts`: those of a mixture, which all are in RAM, are constants of sessions.
    """
    m, head, sessions = header.model, head or likely(header), of_sessions(header, arithmetic)
    every = sum(m.paged_groups)
    here = spread(pinned, m.paged_groups)
    if unpacked.streams(header):
        attention, rows = parts.attention_kept(header), unpacked.rows_kept(header.row_format("head"), head)
    else:
        attention, rows = parts.attention_held(header, sessions), parts.head_held(header, head, sessions)
    held = _common(header, context, base, kv, 1) | {
        "attention": attention + parts.rotary(m, context),
        "head": rows,
        "workspace": _workspace(header, context, head, arithmetic, constant_experts, threads),
        **parts.reading(header, head, pinned == every, threads),
        **_tokens(header, sessions),
    }
    if m.experts and m.experts.leading:
        held[LEADING_FFNS] = parts.leading_held(header, arithmetic)
    if not header.selection:
        sizes = zip(here, group_bytes(header, arithmetic if constant_experts else None), strict=True)
        held["experts" if m.experts else "pinned neurons"] = sum(groups * size for groups, size in sizes)
    later = held["workspace"] + held["KV cache"]
    opened = m.expert_groups if constant_experts else 0  # groups in one session
    return held | {"opening what is constant": _opening(header, later, opened, sessions)}


def _workspace(
    header: Header, context: int, head: int, arithmetic: Arithmetic, constant_experts: bool, threads: int
) -> int:
    m = header.model
    if unpacked.streams(header):
        return parts.unpacked_workspace(header, context, head, arithmetic, threads)
    workspace = parts.workspace(header, context, m.expert_groups if m.experts else 1, head)
    if header.selection or constant_experts:
        return workspace
    return workspace + unpacked.scratch(header, arithmetic, threads) + unpacked.temporary(header, arithmetic, threads)


class Idle(NamedTuple):
    """Bytes of the workspace of a model that pages, which hold groups while an answer is decoded."""

    of_prompts: int = 0  # that only passes over more than TREE_NODES tokens need: those that read a prompt
    of_unused: int = 0  # that no other pass needs for a token by which a text is shorter than the context


def idle(header: Header, context: int, head: int, arithmetic: Arithmetic, threads: int) -> Idle:
    """What is idle with the first `head` rows of the head in RAM. Only groups that stream past borrow it."""
    if not unpacked.streams(header):
        return Idle()
    every, few, short = (
        parts.unpacked_workspace(header, length, head, arithmetic, threads, most)
        for length, most in ((context, PREFILL_TOKENS), (context, TREE_NODES), (TREE_NODES, TREE_NODES))
    )
    return Idle(every - few, max(0, few - short) // context)


def of_sessions(header: Header, arithmetic: Arithmetic) -> Arithmetic:
    """The arithmetic of what is constant in a model that pages in `arithmetic`.

    In int8 a constant takes more RAM, which mixtures have.
    """
    return arithmetic if header.model.experts else "float32"


def _tokens(header: Header, arithmetic: Arithmetic) -> dict[str, int]:
    held = {
        "token inputs": parts.tokens_held(header, arithmetic),
        "token states": parts.states_held(header, arithmetic),
    }
    return {name: nbytes for name, nbytes in held.items() if nbytes}


def _opening(header: Header, later: int, groups: int, arithmetic: Arithmetic) -> int:
    """What opening the largest session takes, beyond what is not touched before all of them are open."""
    sessions = [
        parts.tokens_opening(header, arithmetic),
        parts.states_opening(header, arithmetic),
        parts.leading_opening(header, arithmetic),
    ]
    if not unpacked.streams(header):  # else attention and the head stay as the card has them
        head = min(parts.head_part(header), likely(header))
        sessions.append(parts.attention_opening(header, arithmetic))
        sessions.append(parts.while_opening(header.row_format("head"), head, arithmetic))
    if groups:
        sessions.append(groups * parts.group_opening(header.largest_group, arithmetic))
    return max(0, max(sessions) - later)


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


def spread(groups: int, every: tuple[int, ...]) -> tuple[int, ...]:
    """So many groups over layers that have `every`: as large a share of each, the first layers getting what is left.

    A layer never gets fewer if there are more.
    """
    return tuple(np.bincount(by_turns(every)[:groups], minlength=len(every)).tolist())


def by_turns(every: tuple[int, ...]) -> Numbers:
    """[n] the layers of all groups, in the order in which groups are pinned."""
    order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in every]), kind="stable")
    return np.repeat(np.arange(len(every)), every)[order]


def likely(header: Header) -> int:
    """Rows of the head that stay in RAM in any case."""
    m = header.model
    return m.vocabulary if m.experts or header.selection else min(LIKELY, m.vocabulary)


def group_bytes(header: Header, constant: Arithmetic | None = None) -> tuple[int, ...]:
    """Bytes in RAM of a group of each layer that has some. `constant`: of experts in sessions, in this arithmetic."""
    m = header.model
    forms = (header.group_of(i) for i in m.paged_layers)
    if constant is None:
        return tuple(unpacked.group_kept(form) for form in forms)
    return tuple(-(-parts.expert_held(form, m, constant) // m.expert_groups) for form in forms)
