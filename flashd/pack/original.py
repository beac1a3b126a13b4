"""The model that is packed: its file, its weights by what they do, and the kind of rows that each will have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import msgspec

from flashd.bundle.architecture import Architecture
from flashd.bundle.rows.kinds import BLOCK, Floats, RowKind
from flashd.bundle.rows.of_matrices import LEADING, STATES_AND_TOKENS, Formats
from flashd.errors import UsageError
from flashd.pack.families.properties import check_layers, model_of
from flashd.pack.families.registry import arranged, family_of
from flashd.pack.families.rope import rope_tables
from flashd.pack.lossy.calibration import Calibration
from flashd.pack.open_model import OpenModel, Tensor
from flashd.pack.rounding.rows import is_ternary
from flashd.pack.shapes import check_heads, check_shapes
from flashd.pack.sources.gguf import GgufModel
from flashd.pack.sources.gguf_tokenizer import check_pre
from flashd.pack.sources.safetensors import HfFolder
from flashd.pack.weights.matrix import Matrix, Numbers
from flashd.pack.weights.weights import Weights

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1024

MOST_BITS = 5.0
"""Bits a weight, steps included, of a source that int4 rows are for: those of Q4_1, whose levels they can hold. Other
types have at most 4.5 or at least 5.5."""


@dataclass(frozen=True)
class Original:
    """An open model whose parts have been checked to fit together."""

    path: Path
    source: OpenModel
    model: Architecture
    rope: list[Floats]  # [2, D / 2] each, see families.rope.rope_tables
    weights: Weights
    formats: Formats  # the kinds of rows of its bundle
    on_layer: Callable[[int], None] = lambda _: None  # told how many layers a calibration has taken its texts through

    @classmethod
    def open(cls, path: Path, rows: RowKind | None, pre: str | None = None, context: int | None = None) -> Original:
        """Opens the model at `path`, a GGUF file or a Hugging Face folder.

        Args:
            path: the file or folder.
            rows: the kind of rows that the user asked for. None: each matrix has the bits that keep it.
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
        if _rounded(weights, model, formats) > 0.5:
            log.warning("%s: most weights are of types that int4 rows round; --rows int8 keeps them", path)
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
        return Calibration(self.weights, self.model, self.rope, texts, self.on_layer)


def _formats(weights: Weights, model: Architecture, rows: RowKind | None) -> Formats:
    """The kinds of rows of all matrices.

    Ternary layers stay ternary, and experts MXFP4, unless f16 is asked for: they lose nothing by it. If int4 is asked
    for, a head or embedding whose source has 8 bits has int8. Measured: a 4-bit head costs SmolLM2 (source Q8_0) a
    mean KL of 0.056 and Qwen2.5-Coder-1.5B (source Q6_K) 0.008. int4 rows may cost 0.03 in all.
    Token inputs are int4 then: they are the largest table of such a model, and most files of it give them less than
    8 bits.
    """

    def of_table(matrix: Matrix) -> RowKind:
        if rows is None:
            return "int8" if _fine([matrix]) else "int4"
        return "int8" if rows == "int4" and matrix.bits >= 8 else rows

    ternary = rows != "f16" and model.experts is None and all(_ternary(weights, i) for i in range(model.layers))
    inner: RowKind = "ternary" if ternary else rows or "int4"
    kept = rows != "f16" and model.experts and all(_mxfp4(weights, i) for i in model.paged_layers)
    inputs = weights.token_inputs()
    formats = Formats(
        ffn="mxfp4" if kept else inner, attention=inner, head=of_table(weights.head()),
        embedding=of_table(weights.embedding()),
        token_inputs=(rows or of_table(inputs)) if inputs else "f16",
    )  # fmt: skip
    return by_tensor(weights, model, formats) if rows is None else formats


def by_tensor(weights: Weights, model: Architecture, formats: Formats) -> Formats:
    """These formats, with int8 rows for each int4 matrix that has a tensor of more bits, F16 and F32 too.

    Measured: SmolLM2 as Q5_0, with noise of a 4-bit step, has a mean KL of 0.25 with int4 rows and 0.001 with int8.
    """
    ffn, attention = _of_ffns(weights, model), _of_products(weights, model)
    finer: list[str] = []
    changed: dict[str, RowKind] = {}
    for place, fine in (("ffn", ffn), ("attention", attention)):
        if getattr(formats, place) == "int4":
            if fine and all(fine.values()):
                changed[place] = "int8"
            else:
                finer += [name for name, more in fine.items() if more]
    return msgspec.structs.replace(formats, finer=tuple(finer), **changed)


def _of_ffns(weights: Weights, model: Architecture) -> dict[str, bool]:
    """By the names of Formats.of, whether int4 rows have too few bits for a matrix of the FFNs or experts."""
    out = {}
    for i in model.paged_layers:
        if ffns := weights.ffns(i):
            out[f"layer.{i}.inputs"] = any(_fine(ffn.inputs) for ffn in ffns)
            out[f"layer.{i}.down"] = any(_fine_tensor(ffn.down) for ffn in ffns)
    return out


def _of_products(weights: Weights, model: Architecture) -> dict[str, bool]:
    """Likewise of all other matrices of layers, the FFNs of a mixture's first layers too."""
    out = {}
    for i in range(model.layers):
        known = [*model.products(i), *model.products_behind()]
        found = [*weights.products(i), *weights.products_behind(i)]
        for product, parts in zip(known, found, strict=True):
            if not product.fine:
                out[f"layer.{i}.{product.name}"] = _fine(parts)
    leading = [ffn for ffn in map(weights.leading, range(model.layers)) if ffn]
    if leading:
        out[LEADING] = any(_fine_tensor(tensor) for ffn in leading for tensor in ffn.tensors)
    return out | {part: _fine(matrices) for part, matrices in beside_layers(weights, model).items()}


def beside_layers(weights: Weights, model: Architecture) -> dict[str, list[Matrix]]:
    """The matrices of those of STATES_AND_TOKENS that a model has."""
    tokens = [weights.token_projection()] if model.token_inputs else []
    parts = {part: tokens if part == "token_projection" else weights.states(part) for part in STATES_AND_TOKENS}
    return {part: matrices for part, matrices in parts.items() if matrices}


def _fine(parts: Sequence[Matrix]) -> bool:
    return any(_fine_tensor(part.tensor) or part.projection is not None for part in parts)


def _fine_tensor(tensor: Tensor) -> bool:
    return tensor.mxfp4 or tensor.bits > MOST_BITS


def _rounded(weights: Weights, model: Architecture, formats: Formats) -> float:
    """The share of the layers' weights that have levels which their rows lack, 0 to 1.

    Weights that the source has not rounded do not count.
    """
    rounded = total = 0
    for i in range(model.layers):
        names = [f"layer.{i}.{p.name}" for p in (*model.products(i), *model.products_behind())]
        products = [*weights.products(i), *weights.products_behind(i)]
        kinds = [formats.of(name, formats.attention) for name in names]
        tensors = [(part.tensor, kind) for parts, kind in zip(products, kinds, strict=True) for part in parts]
        leading = i not in model.paged_layers
        for ffn in weights.every_ffn(i)[:1]:  # experts are alike
            others = formats.of_leading.ffn if leading else formats.ffn
            inputs, down = (formats.of(f"layer.{i}.{part}", others) for part in ("inputs", "down"))
            tensors += [(part.tensor, inputs) for part in ffn.inputs] + [(ffn.down, down)]
        for tensor, kind in tensors:
            total += prod(tensor.shape)
            rounded += prod(tensor.shape) * (kind == "int4" and not _keeps_in_int4(tensor))
    return rounded / max(total, 1)


def _keeps_in_int4(tensor: Tensor) -> bool:
    return tensor.bits >= 16 or (not _fine_tensor(tensor) and tensor.grid(slice(1)) is not None)


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
