"""The small graphs of a model by name: stages between products, and products with rows that are not constant.

Rows that are chosen anew for each token (predictors, gates, neurons) are inputs, in the bundle's own bytes: one graph
serves every layer. GatherBlockQuantized widens rows, Gemm multiplies them.
"""

from __future__ import annotations

from flashd.bundle.header import Header
from flashd.bundle.rows.kinds import ROW_KINDS
from flashd.graphs.products import gates, linear, neurons
from flashd.graphs.stages import stages


def graph(header: Header, name: str) -> bytes:
    """The graph called `name`: linear.KIND, neurons, gate, or a stage. Raises KeyError if the model has no such."""
    kind = next((kind for kind in ROW_KINDS if name == f"linear.{kind}"), None)
    if kind:
        return linear(kind)
    if name == "neurons":
        return neurons(header.model, header.formats.ffn, header.gate_decides)
    if name == "gate":
        return gates(header.model)
    return stages(header.model)[name]
