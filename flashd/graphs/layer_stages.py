"""The stages of a layer between its large products: norms, biases, sums, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from flashd.bundle.architecture import Architecture, Bias, Place
from flashd.bundle.layer_kinds import AttentionKind, Bound
from flashd.graphs.kinds.latent import LatentStages, Multiply
from flashd.graphs.kinds.streams import behind as what_is_behind
from flashd.graphs.kinds.streams import corrected, first, merged, predicted, spread, told
from flashd.graphs.nodes import Graph, Vector
from flashd.graphs.onnx_bytes import MICROSOFT, Dims, T
from flashd.graphs.products import activated
from flashd.graphs.rounding import KvFormat, rounded
from flashd.graphs.tree_attention import Heads, attend, by_head

NO_LEAST = np.float32(-1e30)
"""What is left of a gate's product at the least, if its layer has no bound."""

NEVER = np.float32(-1e30)
"""Added to a score, what takes a key out of attention."""

QUERY_AND_KEY: tuple[Place, Place] = ("query", "key")


def present(g: Graph, model: Architecture, kind: AttentionKind, name: str, value: str) -> None:
    """Gives the KV cache out, which is written in place."""
    g.named_output(name, T.FLOAT, [1, model.kv_heads_of(kind), "C", model.head_dim_of(kind)], value)


def added(g: Graph, model: Architecture, kind: AttentionKind, key: str, value: str) -> None:
    """Gives out what goes into the KV cache, if tokens may stand in branches."""
    shape: Dims = [1, model.kv_heads_of(kind), "T", model.head_dim_of(kind)]
    if not kind.borrows:
        g.output("key", T.FLOAT, shape, key)
        g.output("value", T.FLOAT, shape, value)


def vectors_behind_ffn(model: Architecture) -> set[str]:
    """The layer's vectors that `leave` takes, behind the FFN. The attention's graph has no place for them."""
    norms = model.norm_vectors("ffn_branch") | (model.norm_vectors("ffn") if model.block == "post" else {})
    norms |= model.norm_vectors("experts_branch") | model.norm_vectors("token_branch")
    return {"down.bias", *norms, "scale.weight", *_both(model), "stream_correct.weight", "stream_scale.weight"}


def vectors_before_ffn(model: Architecture) -> set[str]:
    """Those that the attention's graph takes though `leave` takes them too."""
    return set(_both(model))


def _both(model: Architecture) -> list[str]:
    return ["stream_norm.weight", "stream_router.weight"] if model.streams else []


class LayerStages:
    """Adds the stages of one layer to a graph. Each method returns the names of its outputs."""

    def __init__(
        self, g: Graph, model: Architecture, vector: Vector, kv: KvFormat = "float32",
        multiply: Multiply | None = None,
    ) -> None:  # fmt: skip
        self._g, self._model, self._vector, self._kv = g, model, vector, kv
        self._multiply = multiply  # a layer's products that take what others made

    def enter(self, x: str) -> tuple[str, str]:
        if self._model.streams:
            x = predicted(self._g, self._model, x, self._vector)
        return x, x if self._model.block == "post" else self._normed(self._state(x), "attention")

    def _state(self, x: str) -> str:
        """The state that a layer computes with."""
        return first(self._g, self._model, x) if self._model.streams else x

    def spread(self, x: str, products: str) -> str:
        return spread(self._g, self._model, x, products)

    def middle(self, x: str, h: str, branch: str, low: str = "") -> tuple[str, str]:
        if self._model.streams:
            after, h = self._middle(first(self._g, self._model, x), h, branch, low)
            return self._g.node("Concat", after, x, axis=-1), h
        return self._middle(x, h, branch, low)

    def _middle(self, x: str, h: str, branch: str, low: str) -> tuple[str, str]:
        branch = self._normed(self._biased(branch, "output"), "attention_branch")
        after = self._g.residual(x, self._scaled(branch))
        if low:
            both = self._g.node("Add", after, self._g.node("Add", h, self._normed(low, "laurel_branch")))
            after = self._g.node("Mul", both, self._g.constant(np.float32(math.sqrt(0.5))))
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
        x = g.node("Concat", x, branch, axis=-1) if m.normed_together else g.node("Add", x, self._scaled(branch))
        return x, h

    def bounded(self, h: str, bound: Bound | None, products: str) -> str:
        """h [..., H], and behind it the bound of the FFN's gates and the least that is left of them."""
        g = self._g
        if bound is None:
            none = g.node("Mul", g.node("Slice", h, g.shape(0), g.shape(1), g.shape(-1)), g.constant(np.float32(0)))
            return g.node("Concat", h, none, g.node("Add", none, g.constant(NO_LEAST)), axis=-1)
        mean = g.node("ReduceMean", products, g.shape(-1), keepdims=1)
        off = g.node("Sub", products, mean)
        deviation = g.node("Sqrt", g.node("ReduceMean", g.node("Mul", off, off), g.shape(-1), keepdims=1))
        over = g.node("Mul", deviation, g.constant(np.float32(bound.deviations)))
        least = g.node("Mul", deviation, g.constant(np.float32(0)))
        return g.node("Concat", h, g.node("Add", mean, over), least, axis=-1)

    def leave(self, x: str, branch: str) -> tuple[str, str]:
        """(x, what the layer's token input is gated by)"""
        if self._model.streams:
            g, m = self._g, self._model
            y, predictions = first(g, m, x), what_is_behind(g, m, x)
            x = corrected(g, m, predictions, self._left(y, branch), self._vector)
            return x, g.node("Mul", first(g, m, x), self._vector("stream_scale.weight", m.hidden))
        x = self._left(x, branch)
        return x, x

    def _left(self, x: str, branch: str) -> str:
        branch = self._divided(branch)
        if not self._model.experts:  # their biases are weighed as they are
            branch = self._biased(branch, "down")
        branch = self._normed(branch, "experts_branch")
        if self._model.normed_together:
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
        branch = self._normed(branch, "token_branch")
        if self._model.streams:
            return told(self._g, self._model, x, branch)
        return self._rescaled(self._g.residual(x, branch))

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

    def finish(self, x: str, products: str = "") -> str:
        return self._normed(merged(self._g, self._model, x, products) if products else x, "final")

    def logits(self, logits: str) -> str:
        g, m = self._g, self._model
        logits = self._biased(logits, "head", m.vocabulary)
        if m.logit_cap:
            cap = g.constant(np.float32(m.logit_cap))
            logits = g.node("Mul", g.node("Tanh", g.node("Div", logits, cap)), cap)
        return logits

    def attend(self, qkv: str, kind: AttentionKind, suffix: str, tree: Sequence[str] = ()) -> tuple[str, str, str]:
        """qkv [1, T, ...] -> (output [1, T, query width], keys, values).

        Keys and values are the cache's, which are written in place. `tree` has positions [1, T] and a bias of the
        scores [1, 1, T, past + T], if new tokens may form a tree. The bias then takes out of attention what is behind
        the window too. Keys and values are [1, kv heads, T, D] then, those of the new tokens; empty if the layer
        borrows them.
        """
        g, m, width = self._g, self._model, sum(self._model.qkv_widths(kind))
        gate = ""
        if m.attention_gated:
            qkv, gate = g.nodes_out("Split", qkv, g.shape(width, m.gate_width(kind)), outputs=2, axis=2)
        cache: Dims = [1, m.kv_heads_of(kind), "C", m.head_dim_of(kind)]
        past = [g.input(f"past_{part}{suffix}", T.FLOAT, cache) for part in ("key", "value")]
        made, latent = self._biased(qkv, "qkv", width), self._latent(kind, tree)
        if tree:
            parts = self._parts(made, past, kind, tree, latent, turned=kind.rope is not None)
            out, keys, values = self._seen_in_branches(parts, past, kind, tree[1])
        else:
            before = m.norm_turned or self._kv == "int8" or kind.borrows or latent is not None
            turned = before and kind.rope is not None
            out, keys, values = self._seen(self._parts(made, past, kind, tree, latent, turned), past, kind, turned)
        if latent:
            out = latent.seen(out)
        if gate:
            out = g.node("Mul", out, g.node("Sigmoid", gate))
        return self._normed(out, "heads", kind), keys, values

    def _parts(
        self, qkv: str, past: Sequence[str], kind: AttentionKind, tree: Sequence[str], latent: LatentStages | None,
        turned: bool,
    ) -> list[str]:  # fmt: skip
        """Queries, keys and values [1, T, ...]. Without a tree the first may be all of them."""
        m, rounds = self._model, self._kv == "int8"
        if latent:
            query, row = latent.apart(qkv)
            parts = [query, row, row]
        elif kind.borrows:
            query = self._ready(qkv, "query", kind, tree, turned)
            if tree:
                return [query, "", ""]  # the cache has them
            parts = [query, *(self._kept(each, query, kind) for each in past)]
        elif tree or "query" in m.norms or rounds or m.norm_values or not kind.values:
            parts = self._apart(qkv, kind, tree, turned)
        else:
            return [qkv, "", ""]
        return [parts[0], *(self._rounded(parts[1:], kind) if rounds else parts[1:])]

    def _seen(self, parts: Sequence[str], past: Sequence[str], kind: AttentionKind, turned: bool) -> list[str]:
        """Output, keys and values of tokens that stand one behind the other."""
        g, m = self._g, self._model
        positions = [g.input("last", T.INT32, [1]), g.input("total", T.INT32, [])]
        attributes: dict[str, Any] = {}
        if kind.rope is not None and not turned:
            positions += self._tables(kind)
            attributes["do_rotary"] = 1
        elif m.sinks:
            positions += ["", ""]
        if kind.window:
            attributes["local_window_size"] = kind.window
        if m.attention_cap:
            attributes["softcap"] = m.attention_cap
        sinks = ["", "", self._vector("sinks.weight", m.heads)] if m.sinks else []
        return g.nodes_out(
            "GroupQueryAttention", *parts, *past, *positions, *sinks, domain=MICROSOFT, outputs=3,
            num_heads=m.heads, kv_num_heads=m.kv_heads_of(kind), scale=m.attention_scale, **attributes,
        )  # fmt: skip

    def _seen_in_branches(
        self, parts: Sequence[str], past: Sequence[str], kind: AttentionKind, bias: str
    ) -> tuple[str, str, str]:
        """Output, and the new tokens' keys and values; empty if the cache has them."""
        g, m = self._g, self._model
        sinks = self._vector("sinks.weight", m.heads) if m.sinks else ""
        heads = Heads(m.heads, m.kv_heads_of(kind), m.head_dim_of(kind), m.attention_scale, m.attention_cap, sinks)
        query, keys, values = parts
        if kind.borrows:
            end = self._end()
            every_key, every_value = (self._until(each, end) for each in past)
            return attend(g, heads, query, every_key, every_value, bias), "", ""
        first, key = self._first(query), by_head(g, keys, heads)
        every_key = g.node("Concat", self._until(past[0], first), key, axis=2)
        if values == keys:  # one row stands for both
            return attend(g, heads, query, every_key, every_key, bias), key, key
        value = by_head(g, values, heads)
        every_value = g.node("Concat", self._until(past[1], first), value, axis=2)
        return attend(g, heads, query, every_key, every_value, bias), key, value

    def _until(self, past: str, end: str) -> str:
        """Keys or values of the cache's first tokens: [1, kv heads, end, D]."""
        return self._g.node("Slice", past, self._g.shape(0), end, self._g.shape(2))

    def _rounded(self, parts: list[str], kind: AttentionKind) -> list[str]:
        """Keys and values [1, T, ...], rounded to what the cache holds."""
        g, width = self._g, self._model.head_dim_of(kind)
        if kind.latent:
            return [rounded(g, parts[0], width)] * 2
        both = rounded(g, g.node("Concat", *parts, axis=2), width)
        return g.nodes_out("Split", both, outputs=2, axis=2, num_outputs=2)

    def _latent(self, kind: AttentionKind, tree: Sequence[str]) -> LatentStages | None:
        if kind.latent is None:
            return None
        assert self._multiply
        turned = partial(self._turned, kind=kind, tree=tree)
        return LatentStages(self._g, self._model, kind.latent, self._vector, self._multiply, turned)

    def _kept(self, past: str, query: str, kind: AttentionKind) -> str:
        """[1, T, kv width]: the keys or values of the tokens of a pass [1, T, ...] that another layer has written.

        They are written again where they are, which changes nothing.
        """
        g = self._g
        rows = g.node("Slice", past, self._first(query), self._end(), g.shape(2))  # [1, kv heads, T, D]
        return g.node(
            "Reshape", g.node("Transpose", rows, perm=[0, 2, 1, 3]), g.shape(1, -1, self._model.kv_width(kind))
        )

    def _end(self) -> str:
        """[1] int64: the number of tokens, those of the pass included."""
        g = self._g
        return g.node("Add", g.node("Cast", g.input("last", T.INT32, [1]), to=T.INT64), g.shape(1))

    def _first(self, x: str) -> str:
        """[1] int64: where the first token of a pass [1, T, ...] stands."""
        g = self._g
        rows = g.node("Slice", g.node("Shape", x), g.shape(1), g.shape(2))  # [1]: T
        return g.node("Sub", self._end(), rows)

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
        table: Dims = ["positions", self._model.turned_of(kind) // 2]
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
