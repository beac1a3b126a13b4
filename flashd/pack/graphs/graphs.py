"""Builds the onnxruntime graphs that a bundle carries, so that the board needs no `onnx` package.

The same arithmetic is built in two ways, so that the logits of both agree:

- *in place*: the weights are inputs in the bundle's own format, about 4.5 bits a weight in RAM. One small graph
  serves every layer. GatherBlockQuantized widens rows and Gemm multiplies them.
- *constant*: the weights are initialisers, which MatMulNBits repacks once. They take about 7 bits a weight in RAM and
  are many times as fast. One graph has the whole model.

Between the products with large matrices there are *stages*: norms, biases, sums and attention. They are the same in
both ways. What an architecture does there is in the stages' graphs, and the engine only runs them.

MatMulNBits has no float centres. It computes (q - zero) * scale @ x, and a thin product adds the centres times the
sum of each block of x.

Layers keep x in float32 (accuracy level 1). Level 4 rounds x to 8 bits a block. It decodes a fifth faster and costs
SmolLM2 a mean KL of 0.004. But a difference in the last bit between two orders of summation then flips roundings, and
that grows to 5 % of the logits. In int4 bundles the head, which nothing follows, runs at level 4. With int8 rows,
which are meant to stay close to the source, it does not.
"""

from __future__ import annotations

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import PREDICTOR_ROWS, Chooser, Formats
from flashd.bundle.row_kinds import RowKind
from flashd.pack.graphs.products import ffn, gates, linear, neurons, pairs
from flashd.pack.graphs.resident import resident
from flashd.pack.graphs.stages import stages


def build(model: Architecture, formats: Formats, chooser: Chooser | None = None) -> dict[str, bytes]:
    """Every graph that a bundle needs, by the name of its section. `chooser` says how neurons are selected, if so."""
    rows: set[RowKind] = {formats.attention, formats.head}
    if model.experts:
        rows.add("f16")
    if chooser:
        rows.add(formats.ffn if chooser == "gate" else PREDICTOR_ROWS)
    # sorted, because a set's order changes from run to run: the same model must make the same bundle
    graphs = {f"graph.linear.{kind}": linear(kind) for kind in sorted(rows)}
    shares = {None: ffn, "predictor": neurons, "gate": pairs}
    graphs["graph.ffn"] = shares[chooser](model, formats.ffn)
    if chooser == "gate":
        graphs["graph.gate"] = gates(model)
    graphs |= stages(model)
    if not chooser and not model.experts and "f16" not in (formats.ffn, formats.attention, formats.head):
        graphs["graph.resident"] = resident(model, formats)
    return graphs
