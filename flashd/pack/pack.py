"""A model file -> a bundle: section by section, a tensor or less in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashd.bundle.layout import ROWS_OF_A_RUN, Formats, Header, Model, Text
from flashd.bundle.rows import BLOCK, Bytes, Floats, GroupFormat, RowFormat, RowKind
from flashd.bundle.writer import BundleWriter
from flashd.errors import DataError
from flashd.pack import graphs
from flashd.pack.calibrate import Calibration, sample_tokens
from flashd.pack.families import Family, family_of, model_of, rotary_order
from flashd.pack.gguf import GgufModel
from flashd.pack.quantise import encode_groups, encode_rows
from flashd.pack.safetensors import HfFolder
from flashd.pack.shapes import check_layers, check_shapes
from flashd.pack.source import Source, Tensor

ROWS_AT_ONCE = 1024
GROUPS_AT_ONCE = 16

BENT = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What a file whose numbers contradict each other brings about in numpy and in the packages that read it."""

Progress = Callable[[int, int], None]
"""Called with (weights done, weights in all)."""


def pack(source_path: Path, out: Path, rows: RowKind, on_progress: Progress = lambda done, total: None) -> Header:
    """Packs the model at `source_path` into the bundle `out`, replacing it at the end or not at all.

    Raises:
        InputMissing, DataError: the model file is missing, damaged or of an unknown kind.
        CannotWrite: the disk is full or the folder cannot be written.
    """
    try:
        return _Packer(open_source(source_path), rows, on_progress).write(out)
    except BENT as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source_path}: its parts do not fit together ({what}); download it again") from error


def open_source(path: Path) -> Source:
    """The model at `path`: a Hugging Face folder, or a GGUF file. Raises InputMissing, DataError."""
    return HfFolder(path) if path.is_dir() else GgufModel(path)


class _Packer:
    def __init__(self, source: Source, rows: RowKind, on_progress: Progress) -> None:
        self.source = source
        check_layers(source)
        self.family: Family = family_of(source)
        self.model: Model = model_of(source, self.family)
        check_shapes(source, self.model)
        self.formats = _formats(source, rows)
        self._on_progress = on_progress
        self._done = 0
        self._total = sum(int(np.prod(source.tensor(n).shape)) for n in source.names)

    def write(self, out: Path) -> Header:
        vocabulary = self.source.vocabulary()
        with BundleWriter(out) as writer:
            writer.add("tokenizer", [vocabulary.tokenizer_json])
            writer.add("token_bytes", [vocabulary.token_bytes.to_bytes()])
            for name, graph in graphs.build(self.model, self.formats).items():
                writer.add(name, [graph])
            writer.add("norm", [self._vector("output_norm.weight").tobytes()])
            if "output.weight" in self.source.names:
                run = ROWS_OF_A_RUN * RowFormat(self.formats.embedding, self.model.hidden).nbytes
                writer.add("embedding", self._rows("token_embd.weight", self.formats.embedding), run)
                writer.add("head", self._head_rows("output.weight"))
            else:
                run = ROWS_OF_A_RUN * RowFormat(self.formats.head, self.model.hidden).nbytes
                writer.add("head", self._head_rows("token_embd.weight"), run)
            sample = sample_tokens(vocabulary.tokenizer_json)
            calibration = Calibration(self.source, self.family, self.model, sample)
            for i in range(self.model.layers):
                self._add_layer(writer, calibration, i)
            text = Text(
                eos=vocabulary.eos, bos=vocabulary.bos, add_bos=vocabulary.add_bos,
                chat_template=vocabulary.chat_template,
            )  # fmt: skip
            return writer.finish(model=self.model, formats=self.formats, text=text, source=self.source.source())

    def _add_layer(self, writer: BundleWriter, calibration: Calibration, i: int) -> None:
        m, attention = self.model, self.formats.attention
        writer.add(f"layer.{i}.vectors", [self._layer_vectors(i).tobytes()])
        qkv = [("attn_q", m.heads), ("attn_k", m.kv_heads), ("attn_v", 0)]
        writer.add(
            f"layer.{i}.qkv",
            (chunk for part, heads in qkv for chunk in self._rows(f"blk.{i}.{part}.weight", attention, heads)),
        )
        writer.add(f"layer.{i}.output", self._rows(f"blk.{i}.attn_output.weight", attention))
        form, order = GroupFormat(self.formats.ffn, m.hidden), calibration.layer(i)
        writer.add(f"layer.{i}.ffn", self._groups(i, form, order), run=form.nbytes)

    def _layer_vectors(self, i: int) -> Floats:
        """[attention norm H | ffn norm H | q, k, v bias where there is one] float32."""
        m = self.model
        parts = [self._vector(f"blk.{i}.attn_norm.weight"), self._vector(f"blk.{i}.ffn_norm.weight")]
        if m.qkv_bias:
            for part, heads in (("attn_q", m.heads), ("attn_k", m.kv_heads), ("attn_v", 0)):
                bias = self._vector(f"blk.{i}.{part}.bias")
                order = self._order(heads)
                parts.append(bias if order is None else bias[order])
        return np.concatenate(parts)

    def _vector(self, name: str) -> Floats:
        values = self.source.tensor(name).rows()
        self._count(values.size)
        return values

    def _order(self, heads: int) -> npt.NDArray[np.int64] | None:
        return rotary_order(self.family, heads, self.model.head_dim) if heads else None

    def _head_rows(self, name: str) -> Iterator[bytes]:
        return self._rows(name, self.formats.head, centred=self.formats.centred_head)

    def _rows(self, name: str, kind: RowKind, heads: int = 0, centred: bool = True) -> Iterator[bytes]:
        """A matrix's row records, chunk by chunk; with `heads`, in the engine's rotary order."""
        tensor = self.source.tensor(name)
        form = RowFormat(kind, tensor.shape[1])
        order = self._order(heads)
        if order is None:
            order = np.arange(tensor.shape[0])
        for at in range(0, len(order), ROWS_AT_ONCE):
            yield self._encode(tensor, form, order[at : at + ROWS_AT_ONCE], centred).tobytes()

    def _encode(self, tensor: Tensor, form: RowFormat, which: npt.NDArray[np.int64], centred: bool = True) -> Bytes:
        weights = tensor.rows(which)
        self._count(weights.size)
        return encode_rows(weights, form, tensor.grid(which), centred)

    def _groups(self, i: int, form: GroupFormat, order: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """A layer's groups, the hottest first. A group stays whole: its 32 columns share the source's grid."""
        inputs = [self.source.tensor(f"blk.{i}.ffn_{part}.weight") for part in ("gate", "up")]
        down_tensor = self.source.tensor(f"blk.{i}.ffn_down.weight")
        down, grid = down_tensor.rows(), down_tensor.grid()
        down = np.pad(down, ((0, 0), (0, self.model.neurons - down.shape[1])))
        for at in range(0, len(order), GROUPS_AT_ONCE):
            groups = order[at : at + GROUPS_AT_ONCE]
            neurons = (groups[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
            records = [self._padded_rows(t, form.row, neurons) for t in inputs]
            part = None if grid is None else (grid[0][:, groups], grid[1][:, groups])
            self._count(form.hidden * len(neurons))
            yield encode_groups(records, down[:, neurons], form, part).tobytes()

    def _padded_rows(self, tensor: Tensor, form: RowFormat, neurons: npt.NDArray[np.int64]) -> Bytes:
        """Row records of some neurons; those that only fill the last group are zero."""
        real = neurons < tensor.shape[0]
        out = np.zeros((len(neurons), form.nbytes), np.uint8)
        out[real] = self._encode(tensor, form, neurons[real])
        return out

    def _count(self, weights: int) -> None:
        self._done += weights
        self._on_progress(min(self._done, self._total), self._total)


def _formats(source: Source, rows: RowKind) -> Formats:
    """`rows` for the FFN and attention; 8 bits for a head or embedding whose source has as many.

    Measured: a 4-bit head costs SmolLM2 (source Q8_0) a mean KL of 0.056, Qwen2.5-Coder-1.5B (source Q6_K)
    0.008, where int4 rows are allowed 0.03 in all.
    """

    def widened(name: str) -> RowKind:
        return "int8" if rows == "int4" and source.tensor(name).bits >= 8 else rows

    tied = "output.weight" not in source.names
    return Formats(
        ffn=rows,
        attention=rows,
        head=widened("token_embd.weight" if tied else "output.weight"),
        embedding=widened("token_embd.weight"),
    )
