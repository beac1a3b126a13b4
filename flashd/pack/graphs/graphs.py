"""Builds the onnxruntime graphs that a bundle carries, so that the board needs no `onnx` package.

Two lowerings of the same arithmetic, so that their logits agree:

- *in place*: the weights are inputs, in the bundle's own bytes (4.5 bits a weight in RAM). One small graph
  serves every layer. GatherBlockQuantized widens rows, Gemm multiplies them.
- *constant*: the weights are initialisers, for MatMulNBits to repack once (about 7 bits a weight in RAM,
  and many times faster). One graph for the whole model.

Between the products with large matrices stand *stages*, the same in both lowerings: norms, biases, sums and
attention itself. Whatever an architecture does there is in the stages' graphs, and the engine only runs them.

MatMulNBits knows no float centre, so y = (q - zero) * scale @ x is its share and the centres' share is a
thin product with the sum of each block of x.

Layers keep x in float32 (accuracy level 1). Level 4, which rounds x to 8 bits a block, is a fifth faster at
decoding and costs SmolLM2 a mean KL of 0.004; worse, a last-bit difference between two orders of summation
then flips roundings that grow to 5 % of the logits. The head of int4 bundles, which nothing follows, does run
at level 4; with int8 rows, for which closeness to the source is all, it does not.
"""

from __future__ import annotations

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import PREDICTOR_ROWS, Chooser, Formats
from flashd.bundle.row_kinds import RowKind
from flashd.pack.graphs.products import ffn, gates, linear, neurons, pairs
from flashd.pack.graphs.resident import resident
from flashd.pack.graphs.stages import stages


def build(model: Architecture, formats: Formats, chooser: Chooser | None = None) -> dict[str, bytes]:
    """Every graph of a bundle, by the name of its section; of one whose neurons are selected, those that it needs."""
    rows: set[RowKind] = {formats.attention, formats.head}
    if model.experts:
        rows.add("f16")
    if chooser:
        rows.add(formats.ffn if chooser == "gate" else PREDICTOR_ROWS)
    # sorted: a set's order changes from run to run, and the same model makes the same bundle
    graphs = {f"graph.linear.{kind}": linear(kind) for kind in sorted(rows)}
    shares = {None: ffn, "predictor": neurons, "gate": pairs}
    graphs["graph.ffn"] = shares[chooser](model, formats.ffn)
    if chooser == "gate":
        graphs["graph.gate"] = gates(model)
    graphs |= stages(model)
    if not chooser and not model.experts and "f16" not in (formats.ffn, formats.attention, formats.head):
        graphs["graph.resident"] = resident(model, formats)
    return graphs
