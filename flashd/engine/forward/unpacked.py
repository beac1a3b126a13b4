"""Groups that stay in RAM as the card has them, and their products: bytes are unpacked just before.

A group is transposed once, when it comes: its rows lie side by side then, so that a block of all of them is
contiguous. numpy unpacks that at the speed of memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.arrays import Groups, Mxfp4Rows, PlainRows, QuantRows, Rows, TernaryRows
from flashd.bundle.header import Header
from flashd.bundle.rows import mxfp4
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.bundle.rows.kinds import BLOCK, Bytes, Floats
from flashd.engine.forward.constants import at_least_two
from flashd.engine.forward.products import fill_scales
from flashd.engine.model.sizes import TOKENS_UNPACKED
from flashd.engine.planning.parts import ALIGNED
from flashd.graphs import unpacked
from flashd.graphs.constant import Arithmetic
from flashd.system.onnx_session import open_session

Array = npt.NDArray[Any]

Entering = dict[str, Array]
"""What goes into all groups of a layer, [T, ...] each, see graphs.unpacked.entering."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A group in RAM. Each array [n, m] of its rows is [m, n] here."""

    form: GroupFormat
    inputs: Rows
    down: Rows
    bias: Floats  # [M N], or empty


class Shelf:
    """Memory for groups. What a group had that is gone, another one of its size gets. Several threads may use it."""

    def __init__(self) -> None:
        self._idle: dict[int, list[Bytes]] = defaultdict(list)
        self._transpose = open_session(unpacked.transpose())

    def keep(self, form: GroupFormat, groups: Groups) -> Kept:
        """A copy of a single group, whose rows have the form of `form`."""
        arrays = [*groups.inputs.arrays(), *groups.down.arrays()]
        sizes = [-(-array.nbytes // ALIGNED) * ALIGNED for array in (*arrays, groups.bias)]
        memory = self._take(sum(sizes))
        at, copies = 0, []
        for array, size in zip(arrays, sizes, strict=False):
            n, m = array.shape[1:]
            copy = memory[at : at + array.nbytes].view(array.dtype).reshape(m, n)
            copy[:] = self._transposed(array[0])
            copies.append(copy)
            at += size
        bias = memory[at : at + groups.bias.nbytes].view(np.float32)
        bias[:] = groups.bias.reshape(-1)
        rows = len(groups.inputs.arrays())
        kept = Kept(form, type(groups.inputs)(*copies[:rows]), type(groups.down)(*copies[rows:]), bias)
        weakref.finalize(kept, self._idle[len(memory)].append, memory).atexit = False
        return kept

    def _take(self, nbytes: int) -> Bytes:
        try:
            return self._idle[nbytes].pop()
        except IndexError:
            return np.empty(nbytes, np.uint8)

    def _transposed(self, array: Array) -> Array:
        """[n, m] -> [m, n]. onnxruntime moves 16 bytes at a time."""
        if array.dtype != np.uint8:
            return array.T
        return np.asarray(self._transpose.run(None, {"x": array})[0])


class Multiplier:
    """Multiplies groups that are kept. Several threads may use it; each has room of its own to unpack into."""

    def __init__(self, header: Header, arithmetic: Arithmetic) -> None:
        model = header.model
        forms = {header.group_of(layer) for layer in model.paged_layers}
        self._entering = {form: open_session(unpacked.entering(form, arithmetic)) for form in forms}
        self._sessions = {form: open_session(unpacked.group(model, form, arithmetic)) for form in forms}
        exact = arithmetic == "float32"
        self._doubled = {form: exact or "f16" in (form.row.kind, form.column.kind) for form in forms}
        self._of_thread = threading.local()

    def entering(self, form: GroupFormat, h: Floats) -> Entering:
        """The input h [T, H] of an FFN as all its groups take it."""
        session = self._entering[form]
        arrays = session.run(None, {"h": h})
        return {output.name: array for output, array in zip(session.get_outputs(), arrays, strict=True)}

    def __call__(self, group: Kept, entering: Entering, before: Floats) -> Floats:
        """[T, H]: what is before, and the group's share in an FFN of what is `entering`, of the same T tokens."""
        feed = self._feed("inputs", group.form.row, group.inputs) | self._feed("down", group.form.column, group.down)
        if group.bias.size:
            feed["bias"] = group.bias
        session, parts = self._sessions[group.form], []
        for at in range(0, len(before), TOKENS_UNPACKED):
            some, part = slice(at, at + TOKENS_UNPACKED), len(before[at : at + TOKENS_UNPACKED])
            given = {name: x[some] for name, x in entering.items()} | {"before": before[some]}
            if self._doubled[group.form]:
                given = {name: at_least_two(x) for name, x in given.items()}
            parts.append(session.run(None, feed | given)[0][:part])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _feed(self, name: str, form: RowFormat, rows: Rows) -> dict[str, Array]:
        if isinstance(rows, PlainRows):
            return {f"{name}.w": rows.w}
        return {f"{name}.w": self._unpacked(name, rows, form), f"{name}.scale": self._scales(name, rows, form)}

    def _unpacked(self, name: str, rows: QuantRows | TernaryRows | Mxfp4Rows, form: RowFormat) -> Bytes:
        """[B, 32, n] of rows whose bytes are [B 32 bits / 8, n]."""
        planes, n = unpacked.planes(form), rows.q.shape[1]
        q = rows.q.reshape(-1, BLOCK // planes, n)
        if planes == 1:
            return q
        out = self._room(f"{name}.w", np.uint8, (len(q), BLOCK, n))
        for plane in range(planes):
            part = out[:, plane * q.shape[1] : (plane + 1) * q.shape[1]]
            if isinstance(rows, Mxfp4Rows):
                part[:] = np.take(mxfp4.BYTES[plane], q)
            else:
                _unpack(q, plane, 8 // planes, part)
        return out

    def _scales(self, name: str, rows: QuantRows | TernaryRows | Mxfp4Rows, form: RowFormat) -> Floats:
        """[B, 1, n], those of digits among them, or [1, 1, n]."""
        if isinstance(rows, TernaryRows):
            return rows.scale[:, None]
        if isinstance(rows, Mxfp4Rows):
            return mxfp4.scales(rows.exponent)[:, None]
        (blocks, n), half = rows.scale.shape, form.digits // BLOCK // 2
        out = self._room(f"{name}.scale", np.float32, (blocks + 2 * half, n))
        fill_scales(out, rows.scale, rows.step, form)
        return out[:, None]

    def _room(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
        """Memory of this thread. The next product overwrites it."""
        rooms: dict[Any, Array] = self._of_thread.__dict__
        if (name, shape) not in rooms:
            rooms[name, shape] = np.empty(shape, dtype)
        return rooms[name, shape]


def _unpack(q: Bytes, plane: int, bits: int, out: Bytes) -> None:
    """Of each byte, `bits` bits, from bit `plane` bits on."""
    if plane:
        np.right_shift(q, plane * bits, out=out)
    if (plane + 1) * bits < 8:
        np.bitwise_and(out if plane else q, (1 << bits) - 1, out=out)
