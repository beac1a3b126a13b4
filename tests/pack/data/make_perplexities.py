"""Measures with llama.cpp and transformers the perplexities that test_cases.py compares flashd's with.

    pip install torch transformers gguf safetensors llama-cpp-python
    python -m tests.pack.data.make_perplexities [llama.cpp | transformers]

flashd and its tests need none of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.pack import variants
from tests.pack.variants import DATA, FOLDERS, GGUF, TEXT, Floats


def perplexity(logits: Floats, tokens: list[int]) -> float:
    """Of tokens [T], by the logits [T, V] behind each."""
    rows = logits[: len(tokens) - 1].astype(np.float64)
    top = rows.max(1)
    lost = top + np.log(np.exp(rows - top[:, None]).sum(1)) - rows[np.arange(len(rows)), tokens[1:]]
    return float(np.exp(lost.mean()))


def by_llama_cpp(path: Path, most: int = 400) -> float:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=400, logits_all=True, verbose=False)
    tokens = model.tokenize(TEXT.read_bytes(), add_bos=False)
    assert len(tokens) <= 400
    tokens = tokens[:most]
    model.eval(tokens)
    return perplexity(np.array(model.scores[: len(tokens)]), tokens)


def by_transformers(path: Path) -> float:
    import tokenizers
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT.read_text()).ids
    with torch.no_grad():
        return perplexity(model(torch.tensor([tokens])).logits[0].numpy(), tokens)


def main() -> None:
    file = DATA / "perplexities.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for program in sys.argv[1:] or ["llama.cpp", "transformers"]:
            if program == "llama.cpp":
                paths = {name: variants.write(Path(folder) / f"{name}.gguf", keys) for name, keys in GGUF.items()}
                found[program] = {name: round(by_llama_cpp(path), 3) for name, path in paths.items()}
                mixed = variants.retyped(variants.BASE, Path(folder) / "mixed.gguf", variants.mixed)
                found["mixed"] = {program: round(by_llama_cpp(mixed, 100), 3)}
            else:
                paths = {name: variants.write_folder(Path(folder) / name, keys) for name, keys in FOLDERS.items()}
                found[program] = {name: round(by_transformers(path), 3) for name, path in paths.items()}
    file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
