"""Makes tiny random GGUF models with real structure: grouped heads, a padded FFN, biases, both families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, NEURONS, LAYERS = 64, 4, 2, 16, 200, 3


TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}"
    '{% for c in m.tool_calls %}<call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}{% endfor %}<|end|>{% endfor %}<|start|>"
)


def write(
    path: Path,
    family: str = "llama",
    kind: Kind = Kind.F32,
    tied: bool = True,
    seed: int = 0,
    template: str = TEMPLATE,
) -> Path:
    """A model of family `family` whose matrices have type `kind`."""
    random = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, family)
    w.add_name(f"tiny {family}")
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(NEURONS)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-5)
    vocabulary = add_vocabulary(w, template=template)

    def matrix(name: str, *shape: int) -> None:
        values = (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if kind == Kind.F32:
            w.add_tensor(name, values)
        else:
            w.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    def vector(name: str, size: int, around: float) -> None:
        w.add_tensor(name, (around + 0.1 * random.standard_normal(size)).astype(np.float32))

    matrix("token_embd.weight", vocabulary, HIDDEN)
    if not tied:
        matrix("output.weight", vocabulary, HIDDEN)
    vector("output_norm.weight", HIDDEN, 1)
    for i in range(LAYERS):
        at = f"blk.{i}."
        vector(f"{at}attn_norm.weight", HIDDEN, 1)
        vector(f"{at}ffn_norm.weight", HIDDEN, 1)
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            matrix(f"{at}attn_{part}.weight", heads * HEAD_DIM, HIDDEN)
            if family == "qwen2":
                vector(f"{at}attn_{part}.bias", heads * HEAD_DIM, 0)
        matrix(f"{at}attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(f"{at}ffn_gate.weight", NEURONS, HIDDEN)
        matrix(f"{at}ffn_up.weight", NEURONS, HIDDEN)
        if kind == Kind.F32 or NEURONS % 32 == 0:
            matrix(f"{at}ffn_down.weight", HIDDEN, NEURONS)
        else:  # a quantised row is whole blocks long and this one is not: real files fall back in the same way
            values = (random.standard_normal((HIDDEN, NEURONS)) / np.sqrt(NEURONS)).astype(np.float16)
            w.add_tensor(f"{at}ffn_down.weight", values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def add_vocabulary(w: gguf.GGUFWriter, size: int = 0, template: str = TEMPLATE) -> int:
    """Writes a tokenizer of bytes and a few merges, and a chat template; returns how many tokens there are.

    If `size` is more than these, words that no text is cut into fill the vocabulary.
    """
    texts, merges = _vocabulary()
    words = [f"Ġw{i}" for i in range(len(texts), size)]
    texts[256:256] = words
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(texts)
    w.add_token_types([1] * (len(texts) - 2) + [3, 3])
    w.add_token_merges(merges)
    w.add_eos_token_id(len(texts) - 1)
    w.add_chat_template(template)
    return len(texts)


def _vocabulary() -> tuple[list[str], list[str]]:
    """256 bytes in GPT-2's spelling, a few merges and two control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {b: chr(b) for b in printable}
    for b in range(256):
        spelled.setdefault(b, chr(256 + b - sum(p < b for p in printable)))
    texts = [spelled[b] for b in range(256)] + ["th", "he", "the", "Ġthe"]
    return [*texts, "<|start|>", "<|end|>"], ["t h", "h e", "th e", "Ġ the"]


def add_key(w: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Writes a key by the type of its value; None is left out."""
    match value:
        case None:
            """Left out."""
        case bool():
            w.add_bool(key, value)
        case int():
            w.add_uint32(key, value)
        case float():
            w.add_float32(key, value)
        case str():
            w.add_string(key, value)
        case _:
            w.add_array(key, value)
