"""A graph under construction: nodes, inputs, initialisers, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flashd.graphs.onnx_bytes import MICROSOFT, Attribute, Constant, Dims, External, Node, T, Value, model

Vector = Callable[[str, int], str]
"""(name, length) -> the name of the value that holds this vector of the model."""


class Graph:
    """Collects nodes. Every method that adds one returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._inputs: dict[str, Value] = {}
        self._outputs: list[Value] = []
        self._initialisers: dict[str, Constant | External] = {}
        self._residual: Node | None = None

    def input(self, name: str, kind: T, dims: Dims) -> str:
        """An input of the graph, which may be asked for again."""
        self._inputs.setdefault(name, Value(name, kind, tuple(dims)))
        return name

    def output(self, name: str, kind: T, dims: Dims, value: str) -> None:
        """Gives `value` out under a name of its own."""
        self.nodes.append(Node("Identity", [value], [name]))
        self._outputs.append(Value(name, kind, tuple(dims)))

    def named_output(self, name: str, kind: T, dims: Dims, value: str) -> None:
        """Gives `value` out with no Identity, which would copy it: the node that makes it names it so."""
        for node in self.nodes:
            node.outputs = [name if out == value else out for out in node.outputs]
        self._outputs.append(Value(name, kind, tuple(dims)))

    def constant(self, value: npt.ArrayLike) -> str:
        name = f"c{len(self._initialisers)}"
        self._initialisers[name] = Constant(name, np.asarray(value))
        return name

    def shape(self, *dims: int) -> str:
        """A constant shape, shared by all that have the same."""
        name = f"shape{dims}"
        self._initialisers.setdefault(name, Constant(name, np.array(dims, np.int64)))
        return name

    def external(self, name: str, kind: T, dims: Sequence[int]) -> str:
        """An initialiser that the engine supplies when it opens the graph."""
        self._initialisers[name] = External(name, kind, tuple(dims))
        return name

    def node(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Attribute) -> str:
        return self.nodes_out(op, *inputs, domain=domain, outputs=outputs, **attributes)[0]

    def nodes_out(
        self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Attribute
    ) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(Node(op, list(inputs), names, domain, attributes))
        return names

    def residual(self, x: str, branch: str) -> str:
        """x + branch, the stream that a layer adds to."""
        total = self.node("Add", x, branch)
        self._residual = self.nodes[-1]
        return total

    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        """The norm of x's last axis; one node with the sum that x is, if nothing came in between."""
        if self._residual is None or self._residual is not self.nodes[-1] or self._residual.outputs[0] != x:
            return self.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)
        inputs, normed = self.nodes.pop().inputs, f"{x}_normed"
        self.nodes.append(
            Node(
                "SkipSimplifiedLayerNormalization", [*inputs, weight], [normed, "", "", x],
                MICROSOFT, {"epsilon": float(epsilon)},
            )
        )  # fmt: skip
        return normed

    def serialise(self, name: str) -> bytes:
        return model(name, self.nodes, self._inputs.values(), self._outputs, self._initialisers.values())
