"""The graphs between the products with large matrices: norms, biases, sums, attention, the choice of experts."""

from __future__ import annotations

from collections.abc import Callable

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import AttentionKind, Recurrent, TokenInputs
from flashd.graphs.kinds.latent import given
from flashd.graphs.kinds.recurrent import recur
from flashd.graphs.kinds.routing import route
from flashd.graphs.layer_stages import LayerStages, added
from flashd.graphs.nodes import Graph, Vector
from flashd.graphs.onnx_bytes import T


def stages(model: Architecture) -> dict[str, bytes]:
    """The graphs between the products with weights in place, by the names of their sections. x and h are [T, H].

        enter      x -> x, h, the input of the attention's product; x is the layer's own, [T, stream_width]
        attention  qkv [1, T, ...] -> y [1, T, query width], the new keys and values; one graph a kind of attention
        recurrent  inner [1, T, ...] (a layer's inner values) -> y [1, T, ...], what its last product takes, and its
                   state; one graph a kind of layer that has a state in place of keys
        middle     x, h, branch (the attention's output), and low (laurel_right's product) in models that have one
                   -> x, h, the input of the FFN
        leave      x [T, carried_width], branch (the FFN's output, share_width wide) -> x of the next layer, or what
                   token_leave takes, and h, what the layer's token input is gated by
        token_inputs  products [T, L P], of embeddings, and rows [T, L P] of the table -> y [L, T, P]; only in models
                   that have token inputs, like the next two
        token_gate    products [T, P] of x behind the FFN, input [T, P] -> y [T, P], what token_out takes
        token_leave   x, branch (token_out's product) -> x of the next layer
        spread     x, products (stream_projection's) -> x of the first layer; only in models with several states
        finish     x, and products (stream_out's) in these models -> h, the input of the head
        bound.N    h, products (the gates') -> h [T, ffn_input_width] of layer N; only in models with bounds
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
    h, wide = model.hidden, model.stream_width
    low = {"low": h} if model.laurel_rank else {}
    projected = {"products": wide - h} if model.streams else {}
    between = model.carried_width if model.streams else h  # an FFN that all tokens use comes behind `middle`
    plan: list[tuple[str, Callable[..., str | tuple[str, str]], dict[str, int], dict[str, int]]] = [
        ("enter", LayerStages.enter, {"x": wide}, {"x": wide, "h": h}),
        ("middle", LayerStages.middle, {"x": wide, "h": h, "branch": h} | low, {"x": between, "h": h}),
        ("leave", LayerStages.leave, {"x": model.carried_width, "branch": model.share_width}, {"x": wide, "h": h}),
        ("finish", LayerStages.finish, {"x": wide} | projected, {"h": h}),
    ]
    if model.streams:
        plan.append(("spread", LayerStages.spread, {"x": h} | projected, {"x": wide}))
    for name, stage, inputs, outputs in plan:
        g = Graph()
        values = [g.input(part, T.FLOAT, ["T", width]) for part, width in inputs.items()]
        made = stage(LayerStages(g, model, _vector_inputs(g)), *values)
        for (part, width), value in zip(outputs.items(), made if isinstance(made, tuple) else (made,), strict=True):
            g.output(f"{part}_out", T.FLOAT, ["T", width], value)
        out[name] = g.serialise(name)
    for i, bound in enumerate(model.bounds):
        g = Graph()
        h_in = g.input("h", T.FLOAT, ["T", h])
        products = g.input("products", T.FLOAT, ["T", bound.neurons]) if bound else ""
        bounded = LayerStages(g, model, _vector_inputs(g)).bounded(h_in, bound, products)
        g.output("h_out", T.FLOAT, ["T", model.ffn_input_width], bounded)
        out[f"bound.{i}"] = g.serialise("bound")
    if model.changes_logits:
        g = Graph()
        logits = g.input("x", T.FLOAT, ["R", model.vocabulary])
        g.output("x_out", T.FLOAT, ["R", model.vocabulary], LayerStages(g, model, _vector_inputs(g)).logits(logits))
        out["logits"] = g.serialise("logits")
    if model.experts:
        out["route"] = route(model, model.experts)
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
    wide = {"x": model.stream_width, "branch": model.hidden}
    x, branch = (leave.input(name, T.FLOAT, ["T", width]) for name, width in wide.items())
    x = LayerStages(leave, model, _vector_inputs(leave)).leave_token(x, branch)
    leave.output("x_out", T.FLOAT, ["T", model.stream_width], x)
    graphs = {"token_inputs": g, "token_gate": gate, "token_leave": leave}
    return {name: made.serialise(name) for name, made in graphs.items()}


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
    out, key, value = LayerStages(g, model, _vector_inputs(g), multiply=given(g)).attend(qkv, kind, "", tree)
    g.output("y", T.FLOAT, [1, "T", model.query_width(kind)], out)
    added(g, model, kind, key, value)
    return g.serialise("attention")


def _recurrent_stage(model: Architecture, kind: Recurrent) -> bytes:
    g = Graph()
    *first, last = kind.products(model.hidden)
    inner = g.input("inner", T.FLOAT, [1, "T", sum(product.rows for product in first)])
    g.output("y", T.FLOAT, [1, "T", last.width], recur(g, model, kind, inner, _vector_inputs(g), ""))
    return g.serialise("recurrent")
