"""The graph that chooses the experts of each token."""

from __future__ import annotations

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import ExpertGroups, Experts
from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import T


def route(model: Architecture, experts: Experts) -> bytes:
    """scores [T, E] (the router's product) -> used [T, K] int64, weights [T, K], see graphs.stages.stages."""
    g = Graph()
    scores = g.input("scores", T.FLOAT, ["T", experts.count])
    if "router" in model.biases:
        scores = g.node("Add", scores, g.input("router.bias", T.FLOAT, [experts.count]))
    if experts.scores != "sparsemixer":
        scores = g.node("Sigmoid", scores) if experts.scores == "sigmoid" else g.node("Softmax", scores, axis=1)
    chosen = g.node("Add", scores, g.input("choice.bias", T.FLOAT, [experts.count])) if experts.leaned else scores
    places = ""
    if experts.groups:
        places = g.node("Cast", g.input("places", T.FLOAT, [experts.count]), to=T.INT64)
        chosen = _of_best_groups(g, g.node("Gather", chosen, places, axis=1), experts, experts.groups)
    weights, used = _highest(g, chosen, experts.used)
    if places:
        used = g.node("Gather", places, used)
    if experts.leaned or places:
        weights = g.node("GatherElements", scores, used, axis=1)
    if experts.scores == "sparsemixer":
        weights = _mixed(g, scores, weights, used, experts)
    if experts.normalised:
        weights = g.node("Div", weights, g.node("ReduceSum", weights, g.shape(1)))
    if experts.scale != 1:
        weights = g.node("Mul", weights, g.constant(np.float32(experts.scale)))
    if experts.weights_scaled:
        weights = g.node("Mul", weights, g.node("Gather", g.input("down.scale", T.FLOAT, [experts.count]), used))
    g.output("used", T.INT64, ["T", experts.used], used)
    g.output("weights", T.FLOAT, ["T", experts.used], weights)
    return g.serialise("route")


def _of_best_groups(g: Graph, scores: str, experts: Experts, groups: ExpertGroups) -> str:
    """scores [T, E] in the file's order, where those of experts outside a token's best groups cannot be chosen."""
    by_group = g.node("Reshape", scores, g.shape(-1, groups.count, experts.count // groups.count))  # [T, G, E / G]
    sums = g.node("ReduceSum", _highest(g, by_group, groups.best, axis=2)[0], g.shape(2), keepdims=0)  # [T, G]
    best = _highest(g, sums, groups.used)[1]
    zero = g.node("Sub", sums, sums)
    never = g.node("Sub", zero, g.constant(np.float32(np.inf)))
    taken = g.node("ScatterElements", never, best, g.node("GatherElements", zero, best, axis=1), axis=1)
    bounded = g.node("Add", by_group, g.node("Unsqueeze", taken, g.shape(2)))
    return g.node("Reshape", bounded, g.shape(-1, experts.count))


def _mixed(g: Graph, scores: str, highest: str, used: str, experts: Experts) -> str:
    """[T, K]: what SparseMixer makes of the `highest` scores [T, K], those of the experts `used`."""
    tops = g.nodes_out("Split", highest, outputs=experts.used, axis=1, num_outputs=experts.used)  # [T, 1] each
    places = g.nodes_out("Split", used, outputs=experts.used, axis=1, num_outputs=experts.used)
    weights, left, never = [], scores, g.constant(np.float32(-np.inf))
    for top, place in zip(tops, places, strict=True):
        size = g.node("Max", g.node("Abs", scores), top)
        gap = g.node("Div", g.node("Sub", top, scores), size)
        far = g.node("Greater", gap, g.constant(np.float32(experts.margin)))
        # a softmax of a row does not depend on how many rows there are, as sums of exponentials might
        shares = g.node("Softmax", g.node("Where", far, never, left), axis=1)
        weights.append(g.node("GatherElements", shares, place, axis=1))
        left = g.node("ScatterElements", left, place, g.node("Add", top, never), axis=1)
    return g.node("Concat", *weights, axis=1)


def _highest(g: Graph, scores: str, count: int, axis: int = 1) -> list[str]:
    """(the highest `count` scores of an axis, the highest first; their places)."""
    return g.nodes_out("TopK", scores, g.constant(np.array([count])), outputs=2, axis=axis)
