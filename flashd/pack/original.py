"""The model that is packed: its file, its weights by what they do, and what becomes of each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Formats
from flashd.bundle.row_kinds import BLOCK, Floats, RowKind
from flashd.errors import UsageError
from flashd.pack.families.properties import check_layers, model_of
from flashd.pack.families.registry import family_of
from flashd.pack.families.rope import rope_tables
from flashd.pack.lossy.calibration import Calibration
from flashd.pack.open_model import OpenModel
from flashd.pack.rounding.rows import is_ternary
from flashd.pack.shapes import check_shapes
from flashd.pack.sources.gguf import GgufModel
from flashd.pack.sources.gguf_tokenizer import check_pre
from flashd.pack.sources.safetensors import HfFolder
from flashd.pack.weights import Matrix, Numbers, Weights

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1024

GRID_BITS = 5.0
"""Bits a weight, steps included, of the finest source whose levels int4 rows hold: Q4_1."""


@dataclass(frozen=True)
class Original:
    """An open model whose parts fit together."""

    path: Path
    source: OpenModel
    model: Architecture
    rope: Floats  # see families.rope.rope_tables
    weights: Weights
    formats: Formats  # of its bundle

    @classmethod
    def open(cls, path: Path, rows: RowKind, pre: str | None = None) -> Original:
        """The model at `path`, a GGUF file or a Hugging Face folder. Raises InputMissing, DataError, UsageError.

        `pre`: the pre-tokenizer of a GGUF file, whatever the file says.
        """
        if pre is not None:
            check_pre(pre)
            if path.is_dir():
                raise UsageError(f"--pre {pre}: {path} is a folder, whose tokenizer.json says how words are split")
        source: OpenModel = HfFolder(path) if path.is_dir() else GgufModel(path, pre)
        check_layers(source.number("block_count", int), source.path)
        family = family_of(source)
        model = model_of(source, family)
        weights = Weights(source, family, model)
        check_shapes(weights, model)
        formats = _formats(weights, model, rows)
        if formats.ffn == "int4" and _finer(weights, model) > 0.5:
            log.warning("%s: most weights have 5 to 8 bits, which int4 rows round; --rows int8 keeps them", path)
        return cls(path, source, model, rope_tables(source, family), weights, formats)

    def calibration(self, texts: Sequence[Numbers]) -> Calibration:
        """Takes texts through the model as its file has it."""
        return Calibration(self.weights, self.model, self.rope, texts)


def _formats(weights: Weights, model: Architecture, rows: RowKind) -> Formats:
    """`rows` for the FFN and attention; 8 bits for a head or embedding whose source has as many.

    Measured: a 4-bit head costs SmolLM2 (source Q8_0) a mean KL of 0.056, Qwen2.5-Coder-1.5B (source Q6_K)
    0.008, where int4 rows are allowed 0.03 in all. Layers that are ternary stay so, unless f16 is asked for: they
    lose nothing by it.
    """

    def widened(matrix: Matrix) -> RowKind:
        return "int8" if rows == "int4" and matrix.bits >= 8 else rows

    ternary = rows != "f16" and model.experts is None and all(_ternary(weights, i) for i in range(model.layers))
    inner = "ternary" if ternary else rows
    return Formats(
        ffn=inner, attention=inner, head=widened(weights.head()), embedding=widened(weights.embedding())
    )  # fmt: skip


def _finer(weights: Weights, model: Architecture) -> float:
    """The share of the layers' weights that the source has rounded, but to more levels than int4 rows have.

    Measured: SmolLM2 with noise of a 4-bit step, as Q5_0, has a mean KL of 0.25 with int4 rows, 0.001 with int8.
    """
    finer = total = 0
    for i in range(model.layers):
        tensors = [part.tensor for part in (*weights.qkv(i), weights.output(i))]
        tensors += [tensor for ffn in weights.ffns(i) for tensor in (*(part.tensor for part in ffn.inputs), ffn.down)]
        for tensor in tensors:
            total += prod(tensor.shape)
            finer += prod(tensor.shape) * (GRID_BITS < tensor.bits < 16)
    return finer / total


def _ternary(weights: Weights, i: int) -> bool:
    """Whether all matrices of a layer are; of most models the first rows tell that they are not."""
    (ffn,) = weights.ffns(i)
    for matrix in (*ffn.inputs, *weights.qkv(i), weights.output(i)):
        parts = [slice(0, BLOCK), *(slice(at, at + ROWS_AT_ONCE) for at in range(0, len(matrix), ROWS_AT_ONCE))]
        if not all(is_ternary(matrix.rows(part)) for part in parts):
            return False
    return is_ternary(ffn.down.rows().T)
