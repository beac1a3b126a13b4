"""Measures with llama.cpp the perplexity of the goldens' tokens, which test_families.py compares flashd's with.

    pip install llama-cpp-python
    python -m tests.goldens.by_llama_cpp

flashd and its tests do not need it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.goldens.models import GOLDENS, HERE, TOKENS, Floats

FILE = HERE / "llama_cpp.json"

OTHERWISE = {
    "llama-relu", "llama-drelu", "llama-fatrelu", "phi2-relu", "falcon-two-norms",  # it does not read the activation
    "mistral", "smallthinker", "phi3", "exaone4-window",  # nor this window
    "opt", "opt-350m", "persimmon", "bitnet", "olmoe", "qwen3-bias",  # it refuses them
    "gpt-oss",  # it makes whole numbers of YaRN's bounds, which OpenAI does not; with whole ones flashd agrees
    "gemma3n-shared",  # it takes the sizes of Gemma 3n, and which layers borrow keys and have bounds, for granted
    "deepseek2",  # it knows by its 27 layers that there is no query rank; with 27 it agrees, 475.92
    "phimoe",  # it takes a softmax of two experts and root mean square norms; so computed, transformers agrees
    "mixtral",  # it rounds what the router reads, which then chooses another expert once
}  # fmt: skip
"""Goldens of which llama.cpp computes something else, and why."""


def perplexity(logits: Floats) -> float:
    """Of TOKENS, by the logits [48, V] behind each."""
    rows = logits[:-1].astype(np.float64)
    top = rows.max(1)
    lost = top + np.log(np.exp(rows - top[:, None]).sum(1)) - rows[np.arange(len(rows)), TOKENS[1:]]
    return float(np.exp(lost.mean()))


def measured(path: Path) -> float:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    model.eval(TOKENS.tolist())
    return perplexity(np.array(model.scores[: len(TOKENS)]))


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, golden in GOLDENS.items():
            if name not in OTHERWISE:
                found[name] = round(measured(golden.write(Path(folder) / f"{name}.gguf")), 3)
                print(f"{name}: {found[name]}, by transformers {perplexity(golden.logits(name)):.3f}")
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
