"""The graphs between the products with large matrices: norms, biases, sums, attention, the choice of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flashd.bundle.architecture import Architecture, Bias, Experts, Place
from flashd.bundle.layer_kinds import AttentionKind, Recurrent, TokenInputs
from flashd.graphs.nodes import Graph, Vector
from flashd.graphs.onnx_bytes import MICROSOFT, Dims, T
from flashd.graphs.products import activated
from flashd.graphs.recurrent import recur
from flashd.graphs.rounding import KvFormat, rounded

QUERY_AND_KEY: tuple[Place, Place] = ("query", "key")


def stages(model: Architecture) -> dict[str, bytes]:
    """The graphs between the products with weights in place, by the names of their sections. x and h are [T, H].

        enter      x -> h, the input of the attention's product
        attention  qkv [1, T, ...] -> y [1, T, query width]; keys and values are kept; one graph a kind of attention
        recurrent  inner [1, T, ...] (a layer's inner values) -> y [1, T, ...], what its last product takes, and its
                   state; one graph a kind of layer that has a state in place of keys
        middle     x, h, branch (the attention's output) -> x, h, the input of the FFN
        leave      x, branch (the FFN's output, Architecture.share_width wide) -> x of the next layer, or what its
                   token input is gated by; this x is Architecture.carried_width wide
        token_inputs  products [T, L P], of embeddings, and rows [T, L P] of the table -> y [L, T, P]; only in models
                   that have token inputs, like the next two
        token_gate    products [T, P] of x behind the FFN, input [T, P] -> y [T, P], what token_out takes
        token_leave   x, branch (token_out's product) -> x of the next layer
        finish     x -> h, the input of the head
        logits     x (logits [R, V]) -> x; only in models that cap logits or add a bias
        beside     x, h, branch (the shared expert's output) -> x [T, carried_width], and h [T, ffn_input_width],
                   which the other experts take; only in mixtures that have one
        route      scores [T, E] (the router's product) -> used [T, K] int64, the experts that each token uses, the
                   highest score first, and weights [T, K]; only in mixtures

    Each graph also takes the vectors that it needs, by their names in Architecture.layer_vectors, expert_vectors and
    model_vectors.
    """
    out = {f"attention.{i}": _attention_stage(model, kind) for i, kind in enumerate(model.attention)}
    out |= {f"recurrent.{i}": _recurrent_stage(model, kind) for i, kind in enumerate(model.recurrent)}
    plan: list[tuple[str, Callable[..., str | tuple[str, str]], list[str], list[str]]] = [
        ("enter", LayerStages.enter, ["x"], ["h"]),
        ("middle", LayerStages.middle, ["x", "h", "branch"], ["x", "h"]),
        ("leave", LayerStages.leave, ["x", "branch"], ["x"]),
        ("finish", LayerStages.finish, ["x"], ["h"]),
    ]
    for name, stage, inputs, outputs in plan:
        g = Graph()
        wide = {"x": model.carried_width, "branch": model.share_width} if name == "leave" else {}
        values = [g.input(part, T.FLOAT, ["T", wide.get(part, model.hidden)]) for part in inputs]
        made = stage(LayerStages(g, model, _vector_inputs(g)), *values)
        for part, value in zip(outputs, made if isinstance(made, tuple) else (made,), strict=True):
            g.output(f"{part}_out", T.FLOAT, ["T", model.hidden], value)
        out[name] = g.serialise(name)
    if model.changes_logits:
        g = Graph()
        logits = g.input("x", T.FLOAT, ["R", model.vocabulary])
        g.output("x_out", T.FLOAT, ["R", model.vocabulary], LayerStages(g, model, _vector_inputs(g)).logits(logits))
        out["logits"] = g.serialise("logits")
    if model.experts:
        out["route"] = _route(model, model.experts)
    if model.experts and model.experts.shared:
        out["beside"] = _beside(model)
    return out | (_token_stages(model, model.token_inputs) if model.token_inputs else {})


def _token_stages(model: Architecture, inputs: TokenInputs) -> dict[str, bytes]:
    g, every = Graph(), model.token_width
    products, rows = (g.input(name, T.FLOAT, ["T", every]) for name in ("products", "rows"))
    y = LayerStages(g, model, _vector_inputs(g)).token_inputs(products, rows)
    g.output("y", T.FLOAT, [model.layers, "T", inputs.width], y)
    gate = Graph()
    products, token = (gate.input(name, T.FLOAT, ["T", inputs.width]) for name in ("products", "token"))
    gate.output(
        "y", T.FLOAT, ["T", inputs.width], LayerStages(gate, model, _vector_inputs(gate)).gated(products, token)
    )
    leave = Graph()
    x, branch = (leave.input(name, T.FLOAT, ["T", model.hidden]) for name in ("x", "branch"))
    x = LayerStages(leave, model, _vector_inputs(leave)).leave_token(x, branch)
    leave.output("x_out", T.FLOAT, ["T", model.hidden], x)
    graphs = {"token_inputs": g, "token_gate": gate, "token_leave": leave}
    return {name: made.serialise(name) for name, made in graphs.items()}


def _route(model: Architecture, experts: Experts) -> bytes:
    g = Graph()
    scores = g.input("scores", T.FLOAT, ["T", experts.count])
    if "router" in model.biases:
        scores = g.node("Add", scores, g.input("router.bias", T.FLOAT, [experts.count]))
    scores = g.node("Sigmoid", scores) if experts.scores == "sigmoid" else g.node("Softmax", scores, axis=1)
    chosen = g.node("Add", scores, g.input("choice.bias", T.FLOAT, [experts.count])) if experts.leaned else scores
    weights, used = g.nodes_out("TopK", chosen, g.constant(np.array([experts.used])), outputs=2, axis=1)
    if experts.leaned:
        weights = g.node("GatherElements", scores, used, axis=1)
    if experts.normalised:
        weights = g.node("Div", weights, g.node("ReduceSum", weights, g.shape(1)))
    if experts.scale != 1:
        weights = g.node("Mul", weights, g.constant(np.float32(experts.scale)))
    if experts.weights_scaled:
        weights = g.node("Mul", weights, g.node("Gather", g.input("down.scale", T.FLOAT, [experts.count]), used))
    g.output("used", T.INT64, ["T", experts.used], used)
    g.output("weights", T.FLOAT, ["T", experts.used], weights)
    return g.serialise("route")


def _beside(model: Architecture) -> bytes:
    g = Graph()
    parts = [g.input(name, T.FLOAT, ["T", model.hidden]) for name in ("x", "h", "branch")]
    x, h = LayerStages(g, model, _vector_inputs(g)).beside(*parts)
    g.output("x_out", T.FLOAT, ["T", model.carried_width], x)
    g.output("h_out", T.FLOAT, ["T", model.ffn_input_width], h)
    return g.serialise("beside")


def _vector_inputs(g: Graph) -> Vector:
    return lambda name, length: g.input(name, T.FLOAT, [length])


def _attention_stage(model: Architecture, kind: AttentionKind) -> bytes:
    g = Graph()
    qkv = g.input("qkv", T.FLOAT, [1, "T", sum(model.qkv_widths(kind)) + model.gate_width(kind)])
    tree = [g.input("positions", T.INT64, [1, "T"]), g.input("bias", T.FLOAT, [1, 1, "T", "all"])]
    out, key, value = LayerStages(g, model, _vector_inputs(g)).attend(qkv, kind, "", tree)
    g.output("y", T.FLOAT, [1, "T", model.query_width(kind)], out)
    for name, kept in (("present_key", key), ("present_value", value)):
        present(g, model, kind, name, kept)
    return g.serialise("attention")


def _recurrent_stage(model: Architecture, kind: Recurrent) -> bytes:
    g = Graph()
    *first, last = kind.products(model.hidden)
    inner = g.input("inner", T.FLOAT, [1, "T", sum(product.rows for product in first)])
    g.output("y", T.FLOAT, [1, "T", last.width], recur(g, model, kind, inner, _vector_inputs(g), ""))
    return g.serialise("recurrent")


def present(g: Graph, model: Architecture, kind: AttentionKind, name: str, value: str) -> None:
    """Gives the KV cache out, which is written in place."""
    g.named_output(name, T.FLOAT, [1, model.kv_heads_of(kind), "C", model.head_dim_of(kind)], value)


def vectors_behind_ffn(model: Architecture) -> set[str]:
    """The layer's vectors that `leave` takes, behind the FFN. The attention's graph has no place for them."""
    norms = model.norm_vectors("ffn_branch") | (model.norm_vectors("ffn") if model.block == "post" else {})
    norms |= model.norm_vectors("experts_branch") | model.norm_vectors("token_branch")
    return {"down.bias", *norms, "scale.weight"}


class LayerStages:
    """Adds the stages of one layer to a graph. Each method returns the names of its outputs."""

    def __init__(self, g: Graph, model: Architecture, vector: Vector, kv: KvFormat = "float32") -> None:
        self._g, self._model, self._vector, self._kv = g, model, vector, kv

    def enter(self, x: str) -> str:
        return x if self._model.block == "post" else self._normed(x, "attention")

    def middle(self, x: str, h: str, branch: str) -> tuple[str, str]:
        branch = self._normed(self._biased(branch, "output"), "attention_branch")
        after = self._g.residual(x, self._scaled(branch))
        if self._model.block == "post":
            after = self._normed(after, "attention")
            return after, after
        if self._model.block == "sequential":
            return after, self._normed(after, "ffn")
        return after, self._normed(x, "ffn") if "ffn" in self._model.norms else h

    def beside(self, x: str, h: str, branch: str) -> tuple[str, str]:
        """x with the output of the expert that every token uses, and what the others take; h is what it took.

        If the sum of all their outputs is normed, this one's stands behind x: see Architecture.carried_width.
        """
        g, m, experts = self._g, self._model, self._model.experts
        if experts and experts.shared and experts.shared.weighed:
            products = g.node("Mul", h, self._vector("shared_weight.weight", self._model.hidden))
            branch = g.node("Mul", branch, g.node("Sigmoid", g.node("ReduceSum", products, g.shape(-1))))
        branch = self._normed(branch, "shared_branch")
        h = self._normed(x, "experts") if "experts" in m.norms else h
        if experts and experts.router_scaled:
            own = g.rms_norm(x, self._vector("router_scale.weight", m.hidden), m.norm_epsilon)
            h = g.node("Concat", h, own, axis=-1)
        together = m.carried_width != m.hidden
        return (g.node("Concat", x, branch, axis=-1) if together else g.node("Add", x, self._scaled(branch))), h

    def leave(self, x: str, branch: str) -> str:
        branch = self._divided(branch)
        if not self._model.experts:  # their biases are weighed as they are
            branch = self._biased(branch, "down")
        branch = self._normed(branch, "experts_branch")
        if self._model.carried_width != self._model.hidden:
            x, beside = self._g.nodes_out("Split", x, outputs=2, axis=-1, num_outputs=2)
            branch = self._g.node("Add", beside, branch)
        branch = self._normed(branch, "ffn_branch")
        after = self._g.residual(x, self._scaled(branch))
        after = self._normed(after, "ffn") if self._model.block == "post" else after
        return after if self._model.token_inputs else self._rescaled(after)

    def token_inputs(self, products: str, rows: str) -> str:
        """products, rows [..., T, L P] -> [L, T, P], see architecture.TokenInputs."""
        g, m = self._g, self._model
        assert m.token_inputs
        inputs, shape = m.token_inputs, g.shape(-1, m.layers, m.token_inputs.width)
        context = g.node("Mul", products, g.constant(np.float32(inputs.projected)))
        context = g.rms_norm(
            g.node("Reshape", context, shape), self._vector("token_norm.weight", inputs.width), m.norm_epsilon
        )
        own = g.node("Mul", g.node("Reshape", rows, shape), g.constant(np.float32(inputs.scale)))
        both = g.node("Mul", g.node("Add", context, own), g.constant(np.float32(inputs.both)))
        return g.node("Transpose", both, perm=[1, 0, 2])

    def gated(self, products: str, token: str) -> str:
        """products, token [..., P] -> what the product that makes the token's branch takes."""
        return self._g.node("Mul", activated(self._g, self._model, products), token)

    def leave_token(self, x: str, branch: str) -> str:
        return self._rescaled(self._g.residual(x, self._normed(branch, "token_branch")))

    def _rescaled(self, x: str) -> str:
        """x times the layer's own numbers, if the model has them."""
        m = self._model
        return self._g.node("Mul", x, self._vector("scale.weight", m.hidden)) if m.layer_scales else x

    def _scaled(self, branch: str) -> str:
        scale = self._model.branch_scale
        return branch if scale == 1 else self._g.node("Mul", branch, self._g.constant(np.float32(scale)))

    def _divided(self, branch: str) -> str:
        """An FFN's output [..., H + 1] divided by the root mean square of its activations -> [..., H].

        The last number of its input is the sum of their squares. Other models' output is left as it is.
        """
        g, m = self._g, self._model
        if not m.normed_neurons:
            return branch
        y, squares = g.nodes_out("Split", branch, g.shape(m.hidden, 1), outputs=2, axis=-1)
        mean = g.node("Div", squares, g.constant(np.float32(m.normed_neurons)))
        return g.node("Div", y, g.node("Sqrt", g.node("Add", mean, g.constant(np.float32(m.norm_epsilon)))))

    def finish(self, x: str) -> str:
        return self._normed(x, "final")

    def logits(self, logits: str) -> str:
        g, m = self._g, self._model
        logits = self._biased(logits, "head", m.vocabulary)
        if m.logit_cap:
            cap = g.constant(np.float32(m.logit_cap))
            logits = g.node("Mul", g.node("Tanh", g.node("Div", logits, cap)), cap)
        return logits

    def attend(self, qkv: str, kind: AttentionKind, suffix: str, tree: Sequence[str] = ()) -> tuple[str, str, str]:
        """qkv [1, T, ...] -> (output [1, T, query width], keys, values).

        `tree` has positions [1, T] and a bias of the scores [1, 1, T, past + T], if new tokens may form a tree.
        """
        g, m, heads, width = self._g, self._model, self._model.kv_heads_of(kind), sum(self._model.qkv_widths(kind))
        gate = ""
        if m.attention_gated:
            qkv, gate = g.nodes_out("Split", qkv, g.shape(width, m.gate_width(kind)), outputs=2, axis=2)
        cache: Dims = [1, heads, "C", m.head_dim_of(kind)]
        past = [g.input(f"past_{part}{suffix}", T.FLOAT, cache) for part in ("key", "value")]
        parts, rounds = [self._biased(qkv, "qkv", width), "", ""], self._kv == "int8"
        turned = (m.norm_turned or rounds or kind.borrows) and kind.rope is not None
        if kind.borrows:
            query = self._ready(parts[0], "query", kind, tree, turned)
            parts = [query, *(self._kept(each, query, kind) for each in past)]
        elif "query" in m.norms or rounds or m.norm_values or not kind.values:
            parts = self._apart(parts[0], kind, tree, turned)
        if rounds:
            both = rounded(g, g.node("Concat", *parts[1:], axis=2), m.head_dim_of(kind))
            parts[1:] = g.nodes_out("Split", both, outputs=2, axis=2, num_outputs=2)
        positions = [g.input("last", T.INT32, [1]), g.input("total", T.INT32, [])]
        attributes: dict[str, Any] = {}
        if kind.rope is not None and not turned:
            positions += self._tables(kind)
            attributes["do_rotary"] = 1
        elif tree or m.sinks:
            positions += ["", ""]
        if kind.window:
            attributes["local_window_size"] = kind.window
        if m.attention_cap:
            attributes["softcap"] = m.attention_cap
        where = [*tree] if tree or not m.sinks else ["", ""]
        sinks = [self._vector("sinks.weight", m.heads)] if m.sinks else []
        out, keys, values = g.nodes_out(
            "GroupQueryAttention", *parts, *past, *positions, *where, *sinks, domain=MICROSOFT, outputs=3,
            num_heads=m.heads, kv_num_heads=heads, scale=m.attention_scale, **attributes,
        )  # fmt: skip
        if gate:
            out = g.node("Mul", out, g.node("Sigmoid", gate))
        return self._normed(out, "heads", kind), keys, values

    def _kept(self, past: str, query: str, kind: AttentionKind) -> str:
        """[1, T, kv width]: the keys or values of the tokens of a pass [1, T, ...] that another layer has written.

        They are written again where they are, which changes nothing.
        """
        g = self._g
        first = self._first(query)
        end = g.node("Add", g.node("Cast", g.input("last", T.INT32, [1]), to=T.INT64), g.shape(1))
        rows = g.node("Slice", past, first, end, g.shape(2))  # [1, kv heads, T, D]
        return g.node(
            "Reshape", g.node("Transpose", rows, perm=[0, 2, 1, 3]), g.shape(1, -1, self._model.kv_width(kind))
        )

    def _first(self, x: str) -> str:
        """[1] int64: where the first token of a pass [1, T, ...] stands."""
        g = self._g
        rows = g.node("Slice", g.node("Shape", x), g.shape(1), g.shape(2))  # [1]: T
        last = g.node("Cast", g.input("last", T.INT32, [1]), to=T.INT64)
        return g.node("Sub", g.node("Add", last, g.shape(1)), rows)

    def _apart(self, qkv: str, kind: AttentionKind, tree: Sequence[str], turned: bool) -> list[str]:
        """qkv -> queries, keys and values [1, T, ...], queries and keys normed, and turned if `turned` says so."""
        g, widths = self._g, self._model.qkv_widths(kind)
        split = g.nodes_out("Split", qkv, g.shape(*widths), outputs=len(widths), axis=2)
        pair = zip(split[:2], QUERY_AND_KEY, strict=True)
        return [
            *(self._ready(x, place, kind, tree, turned) for x, place in pair), self._normed_values(split[-1], kind),
        ]  # fmt: skip

    def _ready(self, x: str, place: Place, kind: AttentionKind, tree: Sequence[str], turned: bool) -> str:
        """Queries or keys [1, T, ...], normed if the model does so, and turned if `turned` says so."""
        m = self._model
        heads = m.heads if place == "query" else m.kv_heads_of(kind)
        if turned and m.norm_turned:
            x = self._turned(x, heads, kind, tree)
        if place in m.norms:
            x = self._normed_heads(x, place, kind)
        return self._turned(x, heads, kind, tree) if turned and not m.norm_turned else x

    def _tables(self, kind: AttentionKind) -> list[str]:
        """cos and sin [positions, D / 2] of layers that turn queries and keys."""
        table: Dims = ["positions", self._model.head_dim_of(kind) // 2]
        return [self._g.input(f"{part}.{kind.rope}", T.FLOAT, table) for part in ("cos", "sin")]

    def _turned(self, x: str, heads: int, kind: AttentionKind, tree: Sequence[str]) -> str:
        """Queries or keys [1, T, heads D], turned. Without a tree they stand one behind the other up to `last`."""
        at = tree[0] if tree else self._first(x)
        return self._g.node("RotaryEmbedding", x, at, *self._tables(kind), domain=MICROSOFT, num_heads=heads)

    def _biased(self, x: str, part: Bias, width: int = 0) -> str:
        if part not in self._model.biases:
            return x
        return self._g.node("Add", x, self._vector(f"{part}.bias", width or self._model.hidden))

    def _normed_heads(self, x: str, place: Place, kind: AttentionKind) -> str:
        """The norm of queries or keys [1, T, width], head by head if the model does it so."""
        g, m = self._g, self._model
        if not m.norm_heads:
            return self._normed(x, place, kind)
        normed = self._normed(g.node("Reshape", x, g.shape(0, 0, -1, m.head_dim_of(kind))), place, kind)
        return g.node("Reshape", normed, g.shape(0, 0, -1))

    def _normed_values(self, x: str, kind: AttentionKind) -> str:
        """Values [1, T, width], divided by their root mean square head by head if the model does so."""
        g, m, width = self._g, self._model, self._model.head_dim_of(kind)
        if not m.norm_values:
            return x
        heads = g.node("Reshape", x, g.shape(0, 0, -1, width))
        normed = g.rms_norm(heads, g.constant(np.ones(width, np.float32)), m.norm_epsilon)
        return g.node("Reshape", normed, g.shape(0, 0, -1))

    def _normed(self, x: str, place: Place, kind: AttentionKind | None = None) -> str:
        """The norm of x's last axis, or x if the model has none at that place."""
        g, m = self._g, self._model
        vectors = [self._vector(name, length) for name, length in m.norm_vectors(place, kind).items()]
        if not vectors:
            return x
        if m.norm == "layer":
            return g.node("LayerNormalization", x, *vectors, axis=-1, epsilon=m.norm_epsilon)
        return g.rms_norm(x, vectors[0], m.norm_epsilon)
