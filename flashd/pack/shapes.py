"""Whether a model file's tensors have the shapes that its numbers say, before anything is made of them."""

from __future__ import annotations

from flashd.bundle.layout import Model
from flashd.errors import DataError
from flashd.pack.source import Source

MOST_LAYERS = 1024


def check_layers(source: Source) -> None:
    """Raises DataError where a file claims more layers than a bundle may have, or none."""
    layers = source.number("block_count", int)
    if not 1 <= layers <= MOST_LAYERS:
        raise DataError(f"{source.path}: {layers} layers; 1 to {MOST_LAYERS} are possible")


def check_shapes(source: Source, model: Model) -> None:
    """Raises DataError where a tensor is missing or has another shape than the model needs."""
    m, neurons = model, source.number("feed_forward_length", int)
    if m.heads % max(1, m.kv_heads) or m.kv_heads < 1:
        raise DataError(f"{source.path}: {m.heads} heads cannot share {m.kv_heads} key-value heads")
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (m.vocabulary, m.hidden), "output_norm.weight": (m.hidden,)
    }  # fmt: skip
    if "output.weight" in source.names:
        wanted["output.weight"] = (m.vocabulary, m.hidden)
    for i in range(m.layers):
        at = f"blk.{i}."
        wanted |= {f"{at}attn_norm.weight": (m.hidden,), f"{at}ffn_norm.weight": (m.hidden,)}
        for part, width in (("q", m.query_width), ("k", m.kv_width), ("v", m.kv_width)):
            wanted[f"{at}attn_{part}.weight"] = (width, m.hidden)
            if m.qkv_bias:
                wanted[f"{at}attn_{part}.bias"] = (width,)
        wanted |= {
            f"{at}attn_output.weight": (m.hidden, m.query_width), f"{at}ffn_gate.weight": (neurons, m.hidden),
            f"{at}ffn_up.weight": (neurons, m.hidden), f"{at}ffn_down.weight": (m.hidden, neurons),
        }  # fmt: skip
    for name, shape in wanted.items():
        found = source.tensor(name).shape
        if found != shape or 0 in shape:
            raise DataError(f"{source.path}: tensor {name!r} has the shape {found}, the model needs {shape}")
