"""A graph under construction: nodes, inputs, initialisers, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
MICROSOFT = "com.microsoft"
Dims = Sequence[int | str]


class Graph:
    """Collects nodes. Every method that adds one returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self._residual: onnx.NodeProto | None = None

    def input(self, name: str, kind: int, dims: Dims) -> str:
        """An input of the graph. It may be asked for more than once."""
        if not any(known.name == name for known in self.inputs):
            self.inputs.append(helper.make_tensor_value_info(name, kind, list(dims)))
        return name

    def output(self, name: str, kind: int, dims: Dims, value: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, list(dims)))

    def constant(self, value: npt.ArrayLike) -> str:
        name = f"c{len(self.initialisers)}"
        self.initialisers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def shape(self, *dims: int) -> str:
        """A constant [len(dims)] int64. Equal ones are shared."""
        name = f"shape{dims}"
        if not any(i.name == name for i in self.initialisers):
            self.initialisers.append(numpy_helper.from_array(np.array(dims, np.int64), name))
        return name

    def external(self, name: str, kind: int, dims: Sequence[int]) -> str:
        """An initialiser that the engine supplies when it opens the graph."""
        tensor = T(name=name, data_type=kind, dims=dims, data_location=T.EXTERNAL)
        for key, value in (("location", "bundle"), ("offset", "0"), ("length", "0")):
            tensor.external_data.add(key=key, value=value)
        self.initialisers.append(tensor)
        return name

    def node(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        return self.nodes_out(op, *inputs, domain=domain, outputs=outputs, **attributes)[0]

    def nodes_out(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names

    def residual(self, x: str, branch: str) -> str:
        """x + branch: the residual stream, which each layer adds to."""
        total = self.node("Add", x, branch)
        self._residual = self.nodes[-1]
        return total

    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        """The norm of x's last axis. If x is the sum made just before, sum and norm become one node."""
        if self._residual is None or self._residual is not self.nodes[-1] or self._residual.output[0] != x:
            return self.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)
        inputs, normed = self.nodes.pop().input, f"{x}_normed"
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization", [*inputs, weight], [normed, "", "", x],
                domain=MICROSOFT, epsilon=epsilon,
            )
        )  # fmt: skip
        return normed

    def serialise(self, name: str) -> bytes:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initialisers)
        return bytes(helper.make_model(graph, opset_imports=OPSETS, ir_version=10).SerializeToString())
