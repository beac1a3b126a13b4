"""Perplexities of the families' tiny models, beside those of transformers and llama.cpp, as a table in Markdown.

    python -m tests.lab.perplexities

The models have random weights, so the figures say how alike the programs compute, and nothing of how well a model
speaks. tests.goldens.make and tests.goldens.by_llama_cpp say how the others were measured.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from flashd.bundle.rows.kinds import RowKind
from flashd.graphs.constant import Arithmetic
from flashd.pack.pack import pack
from tests.engine.test_paths import all_logits, opened
from tests.goldens.by_llama_cpp import FILE, perplexity
from tests.goldens.models import GOLDENS, TOKENS

WAYS: tuple[tuple[str, RowKind, float | None, Arithmetic], ...] = (
    ("f16 rows, paged", "f16", 0.5, "float32"),
    ("int8 rows, paged", "int8", 0.5, "float32"),
    ("int8 rows, whole, int8", "int8", None, "int8"),
)
"""Of flashd's columns the name, the rows, what is pinned (None: the model stays whole), and the arithmetic."""


def measured(name: str, folder: Path) -> list[float]:
    """flashd's perplexities of TOKENS, in each of WAYS."""
    golden, found = GOLDENS[name], []
    source = golden.write(folder / f"{name}.gguf")
    for number, (_, rows, pinned, arithmetic) in enumerate(WAYS):
        bundle = folder / f"{name}.{number}.flash"
        pack(source, bundle, rows, context=golden.context)
        with opened(bundle, pinned, 64, arithmetic) as model:
            found.append(perplexity(all_logits(model, TOKENS.tolist(), 48)))
    return found


def main() -> None:
    by_llama_cpp: dict[str, float] = json.loads(FILE.read_text())
    columns = ["model", "transformers", "llama.cpp", *(f"flashd, {way}" for way, *_ in WAYS)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(GOLDENS):
            other = by_llama_cpp.get(name)
            row = [f"{perplexity(GOLDENS[name].logits(name)):.2f}", f"{other:.2f}" if other else "-"]
            row += [f"{found:.2f}" for found in measured(name, Path(folder))]
            print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
