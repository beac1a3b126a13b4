"""Rows in RAM that lie side by side, as products take them, and how they are unpacked.

A block of all rows is contiguous, so that numpy unpacks it at the speed of memory. Groups lie on the card like that.
Rows of attention and of the head are transposed when they come.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.arrays import Groups, Mxfp4Rows, PlainRows, QuantRows, Rows, TernaryRows
from flashd.bundle.rows import mxfp4
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.bundle.rows.kinds import BLOCK, NARROW, Bytes, Floats
from flashd.engine.planning.unpacked import ALIGNED
from flashd.graphs import unpacked
from flashd.graphs.constant import Arithmetic
from flashd.system.onnx_session import open_session

Array = npt.NDArray[Any]

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows in RAM. Each of their arrays [n, m] is [m, n] here."""

    form: RowFormat
    rows: Rows

    def row(self, number: int) -> Rows:
        """One of them as the card has it: arrays [1, m]."""
        arrays: list[Array] = [array[:, number][None] for array in self.rows.arrays()]
        return type(self.rows)(*arrays)


@dataclass(frozen=True, eq=False)
class Kept:
    """A group in RAM."""

    form: GroupFormat
    record: Bytes  # [bytes], as on the card

    @property
    def groups(self) -> Groups:
        """The group alone."""
        return self.form.views(self.record[None])

    @cached_property
    def inputs(self) -> Rows:
        """As in KeptRows."""
        return _side_by_side(self.groups.inputs)

    @cached_property
    def down(self) -> Rows:
        """As in KeptRows."""
        return _side_by_side(self.groups.down)

    @cached_property
    def vectors(self) -> dict[str, Floats]:
        """`bias` [M N] and `norm` [N], if the model has them."""
        vectors = {"bias": self.groups.bias[0], "norm": self.groups.norm[0]}
        return {name: vector for name, vector in vectors.items() if vector.size}


def _side_by_side(rows: Rows) -> Rows:
    """Of a group's rows, [1, n, m] each, the arrays [m, n]."""
    arrays: list[Array] = [array[0].T for array in rows.arrays()]
    return type(rows)(*arrays)


class Scratch:
    """Memory to unpack into. New memory for each product would cost more than the unpacking."""

    def __init__(self) -> None:
        self._memory: dict[str, Bytes] = {}

    def array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
        """An array for what is called `name`. The next one of this name overwrites it, whatever its shape."""
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        if name not in self._memory or len(self._memory[name]) < nbytes:
            self._memory[name] = np.empty(nbytes, np.uint8)
        made: Array = self._memory[name][:nbytes].view(dtype).reshape(shape)
        return made


class ScratchOfThread(threading.local, Scratch):
    """The same, of each thread that asks."""


class Shelf:
    """Memory for rows. What some had that are gone, others of the same size get. Several threads may use it.

    Args:
        slot: the least bytes of a piece of memory. If it is the size of the largest, each may take any other's place.
    """

    def __init__(self, slot: int = 0) -> None:
        self._slot = slot
        self._idle: dict[int, list[Bytes]] = defaultdict(list)
        self._scratch = ScratchOfThread()

    def keep(self, form: GroupFormat, groups: Groups) -> Kept:
        """A copy of the first of some groups, whose rows have the form of `form`."""
        kept = self._room_for(form)
        for to, array in zip(kept.groups.arrays(), groups.arrays(), strict=True):
            to[0] = array[0]
        return kept

    def copy(self, kept: Kept) -> Kept:
        """A copy of a group that is in other memory."""
        copied = self._room_for(kept.form)
        copied.record[:] = kept.record
        return copied

    def keep_rows(self, form: RowFormat, rows: Rows) -> KeptRows:
        """A copy of rows [n, ...]."""
        arrays: list[Array] = list(rows.arrays())
        sizes = [-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays]
        memory = self._take(sum(sizes))
        copies = [
            memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape[::-1])
            for at, array in zip(accumulate(sizes, initial=0), arrays, strict=False)
        ]
        for copy, array in zip(copies, arrays, strict=True):
            if array.dtype == np.uint8:
                self._transpose(array, copy)
            else:
                copy[:] = array.T
        return self._lent(KeptRows(form, type(rows)(*copies)), memory)

    def _room_for(self, form: GroupFormat) -> Kept:
        """A group whose bytes are not written yet."""
        memory = self._take(form.nbytes)
        return self._lent(Kept(form, memory[: form.nbytes]), memory)

    def _lent(self, kept: R, memory: Bytes) -> R:
        """`kept`, when it is gone its memory is idle."""
        weakref.finalize(kept, self._idle[len(memory)].append, memory).atexit = False
        return kept

    def _take(self, nbytes: int) -> Bytes:
        nbytes = max(nbytes, self._slot)
        try:
            return self._idle[nbytes].pop()
        except IndexError:
            self.empty()  # of other sizes
            return np.empty(nbytes, np.uint8)

    def empty(self) -> None:
        """Gives idle memory to the system."""
        for idle in list(self._idle.values()):
            idle.clear()

    def _transpose(self, array: Bytes, to: Bytes) -> None:
        """array [n, m] into `to` [m, n]. onnxruntime takes arrays that are contiguous, and is three times as fast."""
        if not array.flags.c_contiguous:
            copy = self._scratch.array("copy", np.uint8, array.shape)
            np.copyto(copy, array)
            array = copy
        binding = self._transposing.io_binding()
        binding.bind_cpu_input("x", array)
        binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(to))
        self._transposing.run_with_iobinding(binding)

    @cached_property
    def _transposing(self) -> ort.InferenceSession:
        return open_session(unpacked.transpose())


class Unpacker:
    """Makes of rows what a product in this arithmetic takes."""

    def __init__(self, arithmetic: Arithmetic, scratch: Scratch) -> None:
        self._arithmetic, self._scratch = arithmetic, scratch

    def __call__(self, name: str, form: RowFormat, rows: Rows, place: str = "") -> dict[str, Array]:
        """The inputs called `name` of a graph for `rows`, which are transposed.

        They are valid until the next call with the same place, which is the name if none is given.
        """
        if isinstance(rows, PlainRows):
            return {f"{name}.w": rows.w}
        place = place or name
        weights = {f"{name}.w": self._unpacked(place, rows, form)}
        if isinstance(rows, QuantRows):
            return weights | {f"{name}.codes": rows.scale[:, None], f"{name}.step": rows.step[:, None]}
        scale = rows.scale if isinstance(rows, TernaryRows) else mxfp4.scales(rows.exponent)
        return weights | {f"{name}.scale": scale[:, None]}  # [B, 1, n], or [1, 1, n]

    def _unpacked(self, name: str, rows: QuantRows | TernaryRows | Mxfp4Rows, form: RowFormat) -> Array:
        """[B, 32, n] of rows whose bytes are [B 32 bits / 8, n]. They are around 0 if inputs are not rounded."""
        planes, n = unpacked.planes(form), rows.q.shape[1]
        rounds = unpacked.rounds(form, self._arithmetic)
        if planes == 1 and rounds:
            return rows.q.reshape(-1, BLOCK, n)
        out = self._scratch.array(f"{name}.w", np.uint8, ((form.width + form.digits) // BLOCK, BLOCK, n))
        if form.kind in NARROW:
            self._unpack_narrow(name, rows.q, form, out)
        else:
            q = rows.q.reshape(-1, BLOCK // planes, n)
            for plane, part in enumerate(_planes(out, planes)):
                if isinstance(rows, Mxfp4Rows):
                    part[:] = np.take(mxfp4.BYTES[plane], q)
                else:
                    _unpack(q, plane, 8 // planes, part)
        if not rounds:
            np.subtract(out, unpacked.ZEROS[form.kind], out=out)
        return out.view(np.int8) if unpacked.signed(form, self._arithmetic) else out

    def _unpack_narrow(self, name: str, q: Bytes, form: RowFormat, out: Bytes) -> None:
        """Into `out` [B, 32, n] of rows of 3 or 2 bits, see bits.pack_bits, and of the nibbles behind them."""
        n, blocks, count = q.shape[1], form.blocks, unpacked.planes(form)
        weights, digits = out[:blocks], out[blocks:]
        nibbles = q[form.weight_bytes :].reshape(len(digits), BLOCK // 2, n)
        for plane, part in enumerate(_planes(digits, count)):
            _unpack(nibbles[:, plane // 2 :: count // 2], plane % 2, 4, part)
        digits -= np.uint8(8 - unpacked.ZEROS[form.kind])
        if form.bits == 2:
            fours = q[: form.weight_bytes].reshape(blocks, BLOCK // 4, n)
            for plane, part in enumerate(_planes(weights, 4)):
                _unpack(fours, plane, 2, part)
            return
        thirds = q[: form.weight_bytes].reshape(3, blocks, 4, n)
        *whole, seventh, eighth = _planes(weights, 8)
        for plane, part in enumerate(whole):
            _unpack(thirds[plane // 2], plane % 2, 3, part)
        lower = self._scratch.array(f"{name}.lower", np.uint8, seventh.shape)
        for part, byte, shift in ((seventh, thirds[0], 4), (eighth, thirds[1], 5)):
            np.right_shift(thirds[2], shift, out=part)
            np.bitwise_and(part, 4, out=part)
            np.right_shift(byte, 6, out=lower)
            np.bitwise_or(part, lower, out=part)


def _planes(out: Bytes, count: int) -> list[Bytes]:
    """The parts of blocks [B, 32, n] that are the first, second ... weights of bytes, [B, 32 / count, n] each."""
    rows = BLOCK // count
    return [out[:, at : at + rows] for at in range(0, BLOCK, rows)]


def _unpack(q: Bytes, plane: int, bits: int, out: Bytes) -> None:
    """Of each byte, `bits` bits, from bit `plane` bits on."""
    if bits == 8:
        np.copyto(out, q)
        return
    if plane:
        np.right_shift(q, plane * bits, out=out)
    if (plane + 1) * bits < 8:
        np.bitwise_and(out if plane else q, (1 << bits) - 1, out=out)
