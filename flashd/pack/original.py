"""The model that is packed: its file, its weights by what they do, and the kind of rows that each will have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Formats
from flashd.bundle.rows.kinds import BLOCK, Floats, RowKind
from flashd.errors import UsageError
from flashd.pack.families.properties import check_layers, model_of
from flashd.pack.families.registry import arranged, family_of
from flashd.pack.families.rope import rope_tables
from flashd.pack.lossy.calibration import Calibration
from flashd.pack.open_model import OpenModel
from flashd.pack.rounding.rows import is_ternary
from flashd.pack.shapes import check_heads, check_shapes
from flashd.pack.sources.gguf import GgufModel
from flashd.pack.sources.gguf_tokenizer import check_pre
from flashd.pack.sources.safetensors import HfFolder
from flashd.pack.weights import Matrix, Numbers, Weights

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1024

GRID_BITS = 5.0
"""Bits a weight, steps included, of Q4_1: the finest source whose levels int4 rows can hold."""


@dataclass(frozen=True)
class Original:
    """An open model whose parts have been checked to fit together."""

    path: Path
    source: OpenModel
    model: Architecture
    rope: list[Floats]  # [2, D / 2] each, see families.rope.rope_tables
    weights: Weights
    formats: Formats  # the kinds of rows of its bundle

    @classmethod
    def open(cls, path: Path, rows: RowKind, pre: str | None = None, context: int | None = None) -> Original:
        """Opens the model at `path`, a GGUF file or a Hugging Face folder.

        Args:
            path: the file or folder.
            rows: the kind of rows that the user asked for.
            pre: the pre-tokenizer of a GGUF file, whatever the file says.
            context: the tokens of the longest text, see families.rope.context_of.

        Raises InputMissing, DataError, UsageError.
        """
        if pre is not None:
            check_pre(pre)
            if path.is_dir():
                raise UsageError(f"--pre {pre}: {path} is a folder, whose tokenizer.json says how words are split")
        source: OpenModel = HfFolder(path) if path.is_dir() else GgufModel(path, pre)
        check_layers(source.number("block_count", int), source.path)
        check_layers(source.layers, source.path)
        source = arranged(source)
        family = family_of(source)
        model = model_of(source, family, context)
        check_heads(model, source.path)
        weights = Weights(source, family, model)
        check_shapes(weights, model)
        formats = _formats(weights, model, rows)
        if formats.ffn == "int4" and _finer(weights, model) > 0.5:
            log.warning(
                "%s: most weights are MXFP4 or have 5 to 8 bits, which int4 rows round; --rows int8 keeps them", path
            )
        if context is None and model.context < (most := source.number("context_length", int)):
            log.warning(
                "%s: packed for texts of up to %d tokens; longer ones, of which the model has up to %d, are computed"
                " in another way, see --context", path, model.context, most,
            )  # fmt: skip
        for part in sorted(source.left_out):
            log.warning("%s: %s is left out: flashd packs what speaks", path, part)
        rope = rope_tables(source, family, context)
        return cls(path, source, model, rope, weights, formats)

    def calibration(self, texts: Sequence[Numbers]) -> Calibration:
        """A calibration that takes texts, each [tokens], through the model with the file's own weights."""
        return Calibration(self.weights, self.model, self.rope, texts)


def _formats(weights: Weights, model: Architecture, rows: RowKind) -> Formats:
    """The kinds of rows: `rows` for the FFN and attention, int8 for a head or embedding whose source has 8 bits.

    Measured: a 4-bit head costs SmolLM2 (source Q8_0) a mean KL of 0.056 and Qwen2.5-Coder-1.5B (source Q6_K) 0.008.
    int4 rows may cost 0.03 in all. Ternary layers stay ternary, and experts MXFP4, unless f16 is asked for: they lose
    nothing by it.
    """

    def as_nibbles(matrix: Matrix) -> RowKind:
        return "int8" if rows == "int4" and matrix.bits >= 8 else rows

    ternary = rows != "f16" and model.experts is None and all(_ternary(weights, i) for i in range(model.layers))
    inner: RowKind = "ternary" if ternary else rows
    kept = rows != "f16" and model.experts and all(_mxfp4(weights, i) for i in model.paged_layers)
    inputs = weights.token_inputs()
    return Formats(
        ffn="mxfp4" if kept else inner, attention=inner, head=as_nibbles(weights.head()),
        embedding=as_nibbles(weights.embedding()),
        token_inputs=as_nibbles(inputs) if inputs else "f16",
    )  # fmt: skip


def _finer(weights: Weights, model: Architecture) -> float:
    """The share of the layers' weights that the source has rounded to more levels than int4 rows have, 0 to 1.

    Measured: SmolLM2 as Q5_0, with noise of a 4-bit step, has a mean KL of 0.25 with int4 rows and 0.001 with int8.
    """
    finer = total = 0
    for i in range(model.layers):
        products = [*weights.products(i), *weights.products_behind(i)]
        tensors = [part.tensor for parts in products for part in parts]
        tensors += [each for ffn in weights.every_ffn(i) for each in ffn.tensors]
        for tensor in tensors:
            total += prod(tensor.shape)
            finer += prod(tensor.shape) * (tensor.mxfp4 or GRID_BITS < tensor.bits < 16)
    return finer / total


def _mxfp4(weights: Weights, i: int) -> bool:
    """Whether all matrices of layer `i`'s FFNs are MXFP4."""
    return all(tensor.mxfp4 for ffn in weights.ffns(i) for tensor in ffn.tensors)


def _ternary(weights: Weights, i: int) -> bool:
    """Whether all matrices of layer `i` are ternary. In most models their first rows show that they are not."""
    ffns = weights.ffns(i)
    for matrix in (
        *chain.from_iterable(ffn.inputs for ffn in ffns),
        *chain.from_iterable(weights.products(i)),
        *chain.from_iterable(weights.products_behind(i)),
    ):
        parts = [slice(0, BLOCK), *(slice(at, at + ROWS_AT_ONCE) for at in range(0, len(matrix), ROWS_AT_ONCE))]
        if not all(is_ternary(matrix.rows(part)) for part in parts):
            return False
    return all(is_ternary(ffn.down.rows()) for ffn in ffns)
