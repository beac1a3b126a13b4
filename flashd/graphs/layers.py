"""What a layer is beside its FFN: attention, or what is in its place, and what is behind the FFN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import AttentionKind, LayerProduct
from flashd.graphs.kinds.recurrent import recur
from flashd.graphs.layer_stages import LayerStages, added, present
from flashd.graphs.nodes import Graph, Vector
from flashd.graphs.onnx_bytes import T
from flashd.graphs.products import activated, gated
from flashd.graphs.rounding import KvFormat


class Products(Protocol):
    """Adds products with large matrices to a graph: constants of it, or its inputs."""

    def __call__(self, x: str, name: str, n: int, k: int) -> str:
        """x [1, T, K] times rows [n, K] -> [1, T, n]"""

    def by_head(self, x: str, name: str, product: LayerProduct) -> str:
        """x [1, T, heads K], of which each head's part is multiplied by rows of its own -> [1, T, rows]"""


class Layers:
    """Puts layers into a graph, all but their FFNs.

    Args:
        products: multiply with the large matrices.
        vectors: is told how the names of a layer's vectors begin, and returns what adds them.
        kv: how keys and values are kept.
    """

    def __init__(
        self, g: Graph, model: Architecture, products: Products, vectors: Callable[[str], Vector],
        kv: KvFormat = "float32",
    ) -> None:  # fmt: skip
        self._g, self._model, self._products, self._vectors, self._kv = g, model, products, vectors, kv

    def attention_graph(self, i: int) -> bytes:
        """x [1, T, H] of a layer -> `x_out`, `h_out` behind its attention; tokens may stand in branches."""
        g, m = self._g, self._model
        x = g.input("x", T.FLOAT, [1, "T", m.stream_width])
        tree = []
        if isinstance(m.kind(i), AttentionKind):
            tree = [g.input("positions", T.INT64, [1, "more"]), g.input("bias", T.FLOAT, [1, 1, "more", "all"])]
        x, h, _ = self.attention(i, x, "", tree)
        g.output("x_out", T.FLOAT, [1, "T", m.carried_width], x)
        g.output("h_out", T.FLOAT, [1, "T", m.ffn_input_width], h)
        return g.serialise("attention")

    def attention(self, i: int, x: str, suffix: str, tree: Sequence[str] = ()) -> tuple[str, str, LayerStages]:
        """x [1, T, H] -> (x [1, T, carried_width], h [1, T, ffn_input_width], the layer's block)."""
        m, at = self._model, f"layer.{i}."
        vector = self._vectors(at)
        block = LayerStages(self._g, m, vector, self._kv, lambda y, product: self._product(y, at, product))
        x, h = block.enter(x)
        branch = ""
        for mixer in m.mixers(i):
            parts = [self._product(h, at, product) for product in mixer.inner if not product.inner]
            inner = self._g.node("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]
            if isinstance(mixer.kind, AttentionKind):
                mixed = self._attended(block, inner, mixer.kind, suffix, tree)
            else:
                mixed = recur(self._g, m, mixer.kind, inner, vector, suffix)
            one = self._product(mixed, at, mixer.output)
            branch = self._g.node("Add", branch, one) if branch else one
        others = {product.name: product for product in m.products(i)[len(m.mixing(i)) :]}
        low = self._low(h, at, others) if m.laurel_rank else ""
        x, h = block.middle(x, h, branch, low)
        if "shared_inputs" in others:
            x, h = block.beside(x, h, self._shared(h, at, others))
        if m.bounds:
            gates = self._product(h, at, others["bound"]) if "bound" in others else ""
            h = block.bounded(h, m.bound(i), gates)
        return x, h, block

    def _low(self, h: str, at: str, others: dict[str, LayerProduct]) -> str:
        """The product of h with two matrices of low rank."""
        return self._product(self._product(h, at, others["laurel_left"]), at, others["laurel_right"])

    def _shared(self, h: str, at: str, others: dict[str, LayerProduct]) -> str:
        """The output of the expert that every token uses."""
        inputs, down = others["shared_inputs"], others["shared_down"]
        a = self._product(h, at, inputs)
        if self._model.gated:
            a = gated(self._g, self._model, *self._g.nodes_out("Split", a, outputs=2, axis=2, num_outputs=2))
        else:
            a = activated(self._g, self._model, a)
        return self._product(a, at, down)

    def _product(self, x: str, at: str, product: LayerProduct) -> str:
        name = f"{at}{product.name}"
        if product.heads > 1:
            return self._products.by_head(x, name, product)
        return self._products(x, name, product.rows, product.width)

    def _attended(self, block: LayerStages, qkv: str, kind: AttentionKind, suffix: str, tree: Sequence[str]) -> str:
        heads, key, value = block.attend(qkv, kind, suffix, tree)
        if tree:
            added(self._g, self._model, kind, key, value)
        else:
            present(self._g, self._model, kind, f"present_key{suffix}", key)
            present(self._g, self._model, kind, f"present_value{suffix}", value)
        return heads

    def leave(self, i: int, x: str, branch: str, block: LayerStages, token: str) -> str:
        """x [1, T, H] of the next layer, of x and the FFN's output. `token` [1, T, P]: the layer's token inputs."""
        x, gating = block.leave(x, branch)
        if not token:
            return x
        at, (gate, out) = f"layer.{i}.", self._model.products_behind()
        a = block.gated(self._product(gating, at, gate), token)
        return block.leave_token(x, self._product(a, at, out))
