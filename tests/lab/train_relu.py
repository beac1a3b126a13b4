"""Trains a small OPT whose neurons are ReLU, on documentation prose, and writes it as a Hugging Face folder.

    pip install torch
    python -m tests.lab.train_relu --out FOLDER [--steps N]

Nobody ships a package with a ReLU model small enough for a test of what "LLM in a flash" does with one. No
penalty makes its neurons sparse: what fires is what training left. It takes an hour or more of one core; a run
that was cut goes on from its last checkpoint. FOLDER then holds config.json, tokenizer.json, model.safetensors,
which `flashd pack` reads, and held-out.txt, which training never saw.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from tests.lab import corpus

LAYERS, HEADS, HIDDEN, NEURONS = 8, 8, 256, 2048
VOCABULARY, CONTEXT, OFFSET = 4096, 256, 2  # OPT's table of positions begins with two rows that stand for nothing
END = "</s>"

BATCH = 8  # texts of CONTEXT tokens
RATE, WEIGHT_DECAY, WARM_UP, COOL_DOWN = 2e-3, 0.1, 60, 0.4  # the last in parts of all steps
EVERY = 50  # steps from one checkpoint to the next
JUDGED = 100  # held-out texts of CONTEXT tokens

Weights = dict[str, Tensor]
"""By the names that transformers gives them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=1510)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    train, held_out = tokens_of(args.out)
    weights = fit(train, args.out / "checkpoint.pt", args.steps)
    loss, fired = judge(weights, held_out)
    save(weights, args.out)
    seen = args.steps * BATCH * CONTEXT
    facts = {"held_out_perplexity": math.exp(loss), "fired": fired, "tokens": len(train), "tokens_seen": seen}
    (args.out / "trained.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


# --- text -------------------------------------------------------------------------------------------------


def tokens_of(out: Path) -> tuple[Tensor, Tensor]:
    """(tokens to train on, held-out tokens); makes the tokenizer and held-out.txt on the way."""
    train, held_out = corpus.texts(out / "packages")
    (out / "held-out.txt").write_text("".join(held_out), "utf-8")
    path = out / "tokenizer.json"
    if not path.is_file():
        _tokenizer(train).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    order = np.random.default_rng(0).permutation(len(train))
    return _encoded(tokenizer, [train[i] for i in order]), _encoded(tokenizer, held_out)


def _tokenizer(texts: list[str]) -> Tokenizer:
    """A BPE of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    return torch.tensor([token for e in tokenizer.encode_batch(texts) for token in e.ids])


def _texts(tokens: Tensor) -> Tensor:
    """[texts, CONTEXT + 1]: what stands before each token, and the token."""
    return tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


# --- model ------------------------------------------------------------------------------------------------


def drawn() -> Weights:
    """Weights to begin with."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCABULARY, HIDDEN), "embed_positions.weight": (CONTEXT + OFFSET, HIDDEN),
        "final_layer_norm.weight": (HIDDEN,), "final_layer_norm.bias": (HIDDEN,),
    }  # fmt: skip
    parts = {f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "out")}
    parts |= {"fc1": (NEURONS, HIDDEN), "fc2": (HIDDEN, NEURONS)}
    for i in range(LAYERS):
        for part, shape in parts.items():
            shapes |= {f"layers.{i}.{part}.weight": shape, f"layers.{i}.{part}.bias": shape[:1]}
        for part in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"layers.{i}.{part}.weight": (HIDDEN,), f"layers.{i}.{part}.bias": (HIDDEN,)}
    return {f"model.decoder.{name}": _drawn(name, shape).requires_grad_() for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    deep = name.endswith(("out_proj.weight", "fc2.weight"))
    return torch.randn(shape) * (0.02 / math.sqrt(2 * LAYERS) if deep else 0.02)


def forward(weights: Weights, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """tokens [B, T] -> logits [B, T, V], and each layer's share of neurons that fired."""

    def linear(x: Tensor, part: str) -> Tensor:
        return functional.linear(x, weights[f"model.decoder.{part}.weight"], weights[f"model.decoder.{part}.bias"])

    def norm(x: Tensor, part: str) -> Tensor:
        w, b = (weights[f"model.decoder.{part}.{kind}"] for kind in ("weight", "bias"))
        return functional.layer_norm(x, (HIDDEN,), w, b)

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), -1, HEADS, HIDDEN // HEADS).transpose(1, 2)

    table = weights["model.decoder.embed_tokens.weight"]
    positions = weights["model.decoder.embed_positions.weight"][OFFSET : OFFSET + tokens.shape[1]]
    x, fired = functional.embedding(tokens, table) + positions, []
    for i in range(LAYERS):
        at = f"layers.{i}"
        h = norm(x, f"{at}.self_attn_layer_norm")
        q, k, v = (heads(linear(h, f"{at}.self_attn.{part}_proj")) for part in "qkv")
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + linear(y, f"{at}.self_attn.out_proj")
        a = functional.relu(linear(norm(x, f"{at}.final_layer_norm"), f"{at}.fc1"))
        x = x + linear(a, f"{at}.fc2")
        fired.append((a.detach() > 0).float().mean())
    return norm(x, "final_layer_norm") @ table.T, fired


# --- training ---------------------------------------------------------------------------------------------


def fit(tokens: Tensor, checkpoint: Path, steps: int) -> Weights:
    """The weights after `steps` steps of AdamW, from the last checkpoint on."""
    weights, done = drawn(), 0
    matrices = [w for w in weights.values() if w.dim() == 2]
    vectors = [w for w in weights.values() if w.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    texts, started = _texts(tokens), time.perf_counter()
    for step in range(done, steps):
        batch = texts[_order(step, len(texts))]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits, fired = forward(weights, batch[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            shares, spent = " ".join(f"{100 * share:.1f}" for share in fired), time.perf_counter() - started
            print(f"step {step + 1} of {steps}, loss {loss:.3f}, fired % {shares}, {spent:.0f} s", flush=True)
        if (step + 1) % EVERY == 0:
            state = {"weights": weights, "optimizer": optimizer.state_dict(), "done": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    return weights


def _order(step: int, texts: int) -> Tensor:
    """The texts of a step; each is seen once before one is seen again."""
    a_pass = texts // BATCH
    order = np.random.default_rng(step // a_pass).permutation(texts)
    return torch.from_numpy(order[step % a_pass * BATCH :][:BATCH])


def rate(step: int, steps: int) -> float:
    """The learning rate warms up, stays, and cools down at the end: until then a run may still be made longer."""
    return RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))


def judge(weights: Weights, tokens: Tensor) -> tuple[float, list[float]]:
    """(mean loss in nats, each layer's share of neurons that fired) over held-out tokens."""
    lost, shares = [], []
    with torch.no_grad():
        for text in _texts(tokens)[:JUDGED]:
            logits, fired = forward(weights, text[None, :-1])
            lost.append(float(functional.cross_entropy(logits[0], text[1:])))
            shares.append([float(share) for share in fired])
    return float(np.mean(lost)), np.mean(shares, 0).tolist()


def save(weights: Weights, out: Path) -> None:
    """Writes weights and configuration as transformers would."""
    save_file({name: w.detach().contiguous() for name, w in weights.items()}, out / "model.safetensors")
    config: dict[str, Any] = {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": NEURONS,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT, "word_embed_proj_dim": HIDDEN, "do_layer_norm_before": True,
        "activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


if __name__ == "__main__":
    main()
