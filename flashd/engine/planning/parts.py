"""How many bytes each part of the engine holds, computed from the bundle's header.

What a constant takes was measured with onnxruntime 1.32 on x86-64 and is exact to 0.1 %: the packed weights, their
float32 scales, and at accuracy level 4 the sums of blocks. While a session is opened there are also the arrays that
it is opened from. It reads them in place, see graphs.unread.
"""

from __future__ import annotations

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Header
from flashd.bundle.layer_kinds import AttentionKind, LayerProduct
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.engine.model.kv_cache import SPARE
from flashd.engine.model.sizes import (
    AT_WORK,
    KEPT_ROWS,
    LOGIT_ROWS,
    MOST_TEXTS,
    NODES,
    TEMPORARY_BYTES,
    TOKENS_AT_ONCE,
    TOKENS_ATTENDING,
    TREE_NODES,
    at_work,
)
from flashd.engine.model.states import states_bytes
from flashd.engine.paging.card import READ_BYTES, buffer_bytes, units_of_a_read
from flashd.engine.planning import unpacked
from flashd.graphs.constant import Arithmetic
from flashd.system.memory import MIB

PREFILL_TOKENS = 256
"""Tokens of a prompt that share one pass over the card, in models of which they need the same groups or experts."""

WHOLE_TOKENS, WHOLE_LOGIT_ROWS = 64, 2
"""Tokens of a pass of a model that stays whole, and of its logits those that are held at once."""

BUFFERS = 3
"""Extents read ahead or in use: enough to keep the card busy while a layer's attention computes."""

SPARE_BUFFERS = 2
"""Buffers that are planned for beside those that are there. Without them the peak of Qwen2.5-Coder-1.5B was 1.5 MiB
above a budget of 512 MiB in one run of six: what the allocators hold differs by 15 MiB from run to run."""

EXPERT_BUFFERS = 8
"""The same of experts, of which those that the next layer may need are read ahead."""

SESSIONS = 10 * MIB
"""The thread pool and the small graphs, measured 5 to 10 MiB on x86-64 with onnxruntime 1.32."""

SESSION = 160 << 10
"""A session, whatever is in it, and a thread of its own."""

SLACK, PAGED_SLACK = 10 * MIB, 20 * MIB
"""What the allocators hold beyond what was asked of them, of a model that stays whole and of one that pages.

It has to be there while sessions are opened too: a tiny model that stays whole takes all of it then."""

LIKELY = 32768
"""Rows of the head that stay in RAM before any FFN group does: the tokens among which a draft chooses."""

HEAD_WEIGHTS, LAYER_WEIGHTS = 4 << 20, 16 << 20
"""Weights of one session of the head, and of whole layers: the more, the more is held while one is opened."""

BESIDE = "states of further answers"
"""The part of a plan that answers beside the first one take. It is lent while they are not there."""

PREDICTOR, GATE = ("narrow", "wide", "lean"), ("gate", "floors")
"""Sections of what chooses neurons."""


def held(form: RowFormat, rows: int, arithmetic: Arithmetic) -> int:
    """Bytes of constant rows in an open session."""
    weights, bits = rows * (form.width + form.digits), _bits(form)
    if form.kind == "f16":
        return 4 * weights
    planes = 2 if bits == 8 and arithmetic == "float32" else 1
    return weights * (bits + (2 if arithmetic == "int8" else 1) * planes) // 8


def while_opening(form: RowFormat, rows: int, arithmetic: Arithmetic) -> int:
    """Bytes that opening a session of them takes beside what it then holds."""
    weights = rows * (form.width + form.digits)
    if form.kind == "f16":
        return 4 * weights
    # the rows as they were read, and the arrays of the session
    return weights * (2 * _bits(form) + (1 if arithmetic == "int8" else 0)) // 8


def _bits(form: RowFormat) -> int:
    """Bits of a quantised weight in a product."""
    return 8 if form.kind == "mxfp4" else max(form.bits, 4)


def group_held(form: GroupFormat, arithmetic: Arithmetic) -> int:
    """Bytes of a group in an open session."""
    rows = held(form.row, form.inputs * form.neurons, arithmetic) + held(form.column, form.hidden, arithmetic)
    return rows + 4 * (form.biases + form.normed) * form.neurons


def expert_held(form: GroupFormat, m: Architecture, arithmetic: Arithmetic) -> int:
    """Bytes of an expert that is the constants of a session."""
    return m.expert_groups * group_held(form, arithmetic) + SESSION


def group_opening(form: GroupFormat, arithmetic: Arithmetic) -> int:
    rows = form.inputs * form.neurons
    return while_opening(form.row, rows, arithmetic) + while_opening(form.column, form.hidden, arithmetic)


def attention_kept(header: Header) -> int:
    """Bytes of the attention of all layers in RAM as the card has it, their small vectors included."""
    m, total, graphs = header.model, 0, set()
    for i in range(m.layers):
        forms = [(header.product_format(i, product), product.rows) for product in m.products(i)]
        total += sum(unpacked.kept(form.planes(rows)) for form, rows in forms) + 4 * sum(m.layer_vectors(i).values())
        graphs.add((m.layer_kinds[i], m.bound(i), tuple(forms)))
    total += m.layers * sum(held(header.product_format(0, p), p.rows, "float32") for p in m.products_behind())
    return total + (4 * len(graphs) + (m.layers if m.products_behind() else 0)) * SESSION


def attention_held(header: Header, arithmetic: Arithmetic, layers: range | None = None) -> int:
    """Bytes of the attention of some layers, or of all, their small vectors included."""
    m, total, some = header.model, 0, range(header.model.layers) if layers is None else layers
    for i in some:
        total += sum(held(header.product_format(i, p), p.rows, arithmetic) for p in _products(m, i))
        total += 4 * sum(m.layer_vectors(i).values())
    routers = m.experts.count * header.row_format("router").nbytes if m.experts else 0
    routers += 4 * sum(m.expert_vectors().values())
    sessions = 2 if m.token_inputs or layers else 1  # one for what is behind the FFN, or for the FFN
    return total + len(m.paged_layers) * routers + len(some) * sessions * SESSION


def leading_held(header: Header, arithmetic: Arithmetic) -> int:
    """Bytes of the FFNs of a mixture's first layers, which have no experts."""
    experts = header.model.experts
    if experts is None or experts.leading is None:
        return 0
    form = header.of_leading(experts.leading).group
    return experts.first * (experts.leading.groups * group_held(form, arithmetic) + SESSION)


def leading_opening(header: Header, arithmetic: Arithmetic) -> int:
    """Bytes that opening one of them takes beside what it then holds."""
    ffn = header.model.leading_ffn(0)
    return ffn.groups * group_opening(header.of_leading(ffn).group, arithmetic) if ffn else 0


def attention_opening(header: Header, arithmetic: Arithmetic) -> int:
    m = header.model
    return max(
        sum(while_opening(header.product_format(i, p), p.rows, arithmetic) for p in _products(m, i))
        for i in range(m.layers)
    )


def _products(m: Architecture, layer: int) -> list[LayerProduct]:
    return [*m.products(layer), *m.products_behind()]


def tokens_held(header: Header, arithmetic: Arithmetic) -> int:
    """Bytes of what makes the token inputs: the projection, the rows that are kept, a pass's inputs of all layers."""
    m = header.model
    if m.token_inputs is None:
        return 0
    projection = held(header.row_format("token_projection"), m.token_width, arithmetic) + SESSION
    of_pass = 4 * m.token_width * (2 * pass_tokens(header) + 4 * TOKENS_AT_ONCE)
    return projection + KEPT_ROWS * header.row_format("token_inputs").nbytes + of_pass


def tokens_opening(header: Header, arithmetic: Arithmetic) -> int:
    m = header.model
    return while_opening(header.row_format("token_projection"), m.token_width, arithmetic) if m.token_inputs else 0


def states_held(header: Header, arithmetic: Arithmetic) -> int:
    """Bytes of what makes several states of an embedding, and one of them again."""
    m, row = header.model, header.row_format("stream_out")
    if m.streams is None:
        return 0
    count = m.streams.count
    return 2 * held(row, m.stream_width - m.hidden, arithmetic) + 2 * SESSION + (count - 1) * SESSION // 4


def states_opening(header: Header, arithmetic: Arithmetic) -> int:
    m = header.model
    return while_opening(header.row_format("stream_out"), m.stream_width - m.hidden, arithmetic) if m.streams else 0


def texts(model: Architecture, left: int, lends: bool) -> tuple[int, dict[str, int]]:
    """How many answers may share a pass, and the part of the plan that their states take.

    Args:
        left: bytes beside what one answer needs.
        lends: whether what is not used of them holds neurons. If so they may be half of what is left, else a quarter.
    """
    if not model.recurrent:
        return MOST_TEXTS, {}
    each = states_bytes(model, beside=True)
    further = min(MOST_TEXTS - 1, max(0, left) // (2 if lends else 4) // each)
    return 1 + further, {BESIDE: further * each} if further else {}


def head_part(header: Header) -> int:
    """Rows of the head in one session, whole runs."""
    rows = HEAD_WEIGHTS // header.model.hidden // ROWS_OF_A_RUN * ROWS_OF_A_RUN
    return min(max(rows, ROWS_OF_A_RUN), header.model.vocabulary)


def head_held(header: Header, rows: int, arithmetic: Arithmetic) -> int:
    """Bytes of the head's first rows, in their sessions."""
    return held(header.row_format("head"), rows, arithmetic) + -(-rows // head_part(header)) * SESSION


def layers_together(header: Header) -> int:
    """Layers in one session of a model that stays whole."""
    m = header.model
    if any(kind.borrows for kind in m.attention):
        return 1  # a layer that borrows keys reads them when the one that keeps them has run
    inner = max(sum(product.weights for product in _products(m, i)) for i in range(m.layers))
    weights = m.inputs * m.neurons * m.hidden + m.neurons * m.hidden + inner
    return max(1, min(m.layers, LAYER_WEIGHTS // weights))


def section_bytes(header: Header, name: str) -> int:
    section = header.section_named(name)
    return section.length if section else 0


def rotary(m: Architecture, context: int) -> int:
    """Its tables, see forward.attention.Rotary."""
    return 4 * sum(m.rope_widths) * (context + SPARE)


def scores(m: Architecture, tokens: int, context: int) -> int:
    """Attention's, of one layer, and the biases that are added to them, one for each width of a window."""
    windows = len({kind.window for kind in m.attention if kind.window})
    return 4 * (tokens + 2) * (context + 2) * (m.heads + 2 + windows)


def attended(m: Architecture, tokens: int, context: int) -> int:
    """What attention of tokens in branches takes, see graphs.tree_attention.

    Scores and values are there in float32 and in float64 while one is made of the other.
    """
    values = max((m.kv_width(kind) for kind in m.attention), default=0)
    return scores(m, tokens, context) + 8 * (tokens + 2) * (context + 2) * m.heads + 12 * (context + 2) * values


def groups_of_a_read(form: GroupFormat, m: Architecture) -> int:
    """Groups that one read fetches at the most."""
    return min(m.expert_groups, units_of_a_read(form.nbytes))


def pass_tokens(header: Header) -> int:
    """Tokens of prompts that a pass of a model that does not fit takes: the more, the fewer passes they need."""
    return TOKENS_AT_ONCE if header.selection else PREFILL_TOKENS


def workspace(header: Header, context: int, groups: int, head: int, whole: bool = False) -> int:
    """Temporaries of the largest pass: activations of a chunk of tokens, attention scores, logits.

    Args:
        groups: of a layer, the most that are in one session.
        head: of the head, the rows in RAM.
        whole: whether the model stays whole.
    """
    m, tokens = header.model, min(WHOLE_TOKENS if whole else TOKENS_AT_ONCE, context) + 2
    activations = tokens * _of_token(m, groups) + 4 * KEPT_ROWS * m.hidden
    logits = _some(m, 4 * WHOLE_LOGIT_ROWS * m.vocabulary) if whole else _some(m, _logits(m, head))
    logits += 4 * (WHOLE_LOGIT_ROWS if whole else TREE_NODES + 1) * head_part(header)
    more = 0 if whole else _waiting(header, pass_tokens(header), context)
    shares = _shares(header, min(pass_tokens(header), context), m.experts.used + 1) if m.experts else 0
    attending = min(TOKENS_ATTENDING, context) + 2
    attention = scores(m, tokens, context) if whole else attended(m, attending, context)
    return activations + more + attention + logits + shares + (SLACK if whole else PAGED_SLACK)


def unpacked_workspace(
    header: Header, context: int, head: int, arithmetic: Arithmetic, threads: int, most: int = PREFILL_TOKENS
) -> int:
    """The same of a model that pages, whose rows are in RAM as the card has them. A pass has up to `most` tokens.

    What attention holds while it runs is free when an FFN does, and the FFN's when the head does.
    """
    m, tokens = header.model, min(TOKENS_ATTENDING, most, context) + 2
    kept = unpacked.scratch(header, arithmetic, threads) + unpacked.attention_scratch(header, arithmetic)
    attention = tokens * _of_token(m, 1) + attended(m, tokens, context)
    attention += unpacked.attention_temporary(header, arithmetic, tokens - 2)
    logits = _some(m, _logits(m, head)) + 4 * (TREE_NODES + 1) * head_part(header)
    arrays = max(logits, _shares(header, min(most, context), at_work(threads) + 2))
    largest = max(attention, unpacked.temporary(header, arithmetic, threads, most))
    return kept + largest + arrays + _waiting(header, most, context) + 4 * KEPT_ROWS * m.hidden + PAGED_SLACK


def _waiting(header: Header, most: int, context: int) -> int:
    """What a pass has of the tokens that are not in a product at the moment, and what they may look at."""
    m, more = header.model, max(most - TOKENS_AT_ONCE, 0)
    return 4 * more * (2 * m.hidden + m.stream_width + m.carried_width + m.ffn_input_width + 2 * context)


def _shares(header: Header, tokens: int, count: int) -> int:
    """So many shares in an FFN of a pass's tokens, and what goes into groups while it is rounded."""
    m = header.model
    return 4 * (tokens + 2) * (m.share_width * count + 4 * (m.hidden + header.group.row.digits))


def _some(m: Architecture, logits: int) -> int:
    """Twice if a graph follows that caps them or adds a bias."""
    return logits * (2 if m.changes_logits else 1)


def _logits(m: Architecture, head: int) -> int:
    """Bytes of the logits that a pass with drafts holds at once, if the head's first `head` rows are in RAM."""
    if head == m.vocabulary:
        return 4 * (NODES + 1) * m.vocabulary
    return 4 * (LOGIT_ROWS * m.vocabulary + (most_nodes(m, head) + 1) * head)


def most_nodes(m: Architecture, head: int) -> int:
    """The most nodes of a pass that checks drafts, if the head's first `head` rows are in RAM and others stream past.

    Behind each node there are logits of the rows in RAM, see forward.head. More nodes than NODES take no more RAM.
    """
    return max(NODES, min(TREE_NODES, (NODES + 1 - LOGIT_ROWS) * m.vocabulary // head - 1))


def _of_token(m: Architecture, groups: int) -> int:
    """Bytes of the activations of a token in a product."""
    leading = m.leading_ffn(0)
    neurons = max(groups * m.group_neurons, leading.neurons if leading else 0)
    inner = neurons * (m.inputs + 2)
    mixed = 0
    for i in range(m.layers):
        state, bound = m.state_kind(i), m.bound(i)
        first = sum(product.rows for mixer in m.mixers(i) for product in mixer.inner) + (
            bound.neurons if bound else 0
        )
        # what sums over all tokens has its rows as they came, convolved, and apart
        rows = state.row_width(m.hidden) if state and state.sums else 0
        kind = m.kind(i)
        if isinstance(kind, AttentionKind) and kind.latent:  # queries for the row, and what each head saw of it
            rows += m.heads * kind.latent.row
        mixed = max(mixed, 3 * first + 3 * rows)
    states = 8 * (m.stream_width - m.hidden)  # predicted, corrected, and apart
    return 4 * (6 * m.hidden + states + m.carried_width + m.ffn_input_width + mixed + inner)


def reading(header: Header, head_rows: int, all_pinned: bool, threads: int) -> dict[str, int]:
    """What reads go through, and what was read and is not multiplied yet."""
    m = header.model
    if header.selection is not None:
        return _selecting(header)
    if m.experts:
        return {} if all_pinned else _reading_experts(header)
    streams_head = head_rows < m.vocabulary
    if all_pinned and not streams_head:
        return {}
    buffer = READ_BYTES if streams_head else 0
    if not all_pinned:
        buffer = max(buffer, *(groups_of_a_read(part.form, m) * part.form.nbytes for part in header.ffn_sections))
    most = max(1, *(groups_of_a_read(part.form, m) for part in header.ffn_sections))  # pieces of one read
    if streams_head:
        most = max(most, unpacked.head_rows_of_a_read(header)[0])
    used = at_work(threads)  # buffers whose groups are multiplied
    held = (BUFFERS + used + SPARE_BUFFERS) * buffer_bytes(buffer)
    if streams_head or header.narrowed:
        held += (BUFFERS * most + used + 2) * unpacked.passing_bytes(header)
    return {"window and read-ahead": held}


def _reading_experts(header: Header) -> dict[str, int]:
    """What reads go through, groups that were read, and experts that have come and wait to be multiplied."""
    m, form = header.model, header.largest_group
    count = groups_of_a_read(form, m)
    groups = EXPERT_BUFFERS * count + (AT_WORK + 2) * m.expert_groups
    return {
        "window and read-ahead": EXPERT_BUFFERS * buffer_bytes(count * form.nbytes)
        + groups * unpacked.group_kept(form)
    }


def _selecting(header: Header) -> dict[str, int]:
    """Where neurons are selected: what chooses them, the policies' scores and maps too."""
    m, size = header.model, header.unit_bytes
    name, sections = ("gates", GATE) if header.gate_decides else ("predictors", PREDICTOR)
    # bytes of a neuron in a token: its score or activation, and masks of it
    of_token = 24 if header.gate_decides else 8
    return {
        name: sum(section_bytes(header, f"layer.{i}.{part}") for i in range(m.layers) for part in sections),
        # a read's neurons are there twice: as they came, and those that were wanted
        "window and read-ahead": (BUFFERS + 1) * buffer_bytes(max(READ_BYTES, size))
        + 20 * m.layers * m.neurons
        + of_token * TOKENS_AT_ONCE * m.neurons
        + 4 * TEMPORARY_BYTES,
    }
