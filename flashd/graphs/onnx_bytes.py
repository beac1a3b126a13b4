"""Writes ONNX models as protobuf bytes: the few messages and fields that flashd's graphs have.

The board makes its graphs itself, from the bundle's header, so a bundle carries numbers and no code, and the board
needs no `onnx` package. Field numbers are those of onnx.proto3 (IR version 10); the wire format is protobuf's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

IR_VERSION, OPSET = 10, 21
MICROSOFT = "com.microsoft"
Dims = Sequence[int | str]
"""The size of each axis; a name stands for one that is known only when the graph runs."""

Attribute = int | float | str | Sequence[int]


class T(IntEnum):
    """TensorProto.DataType, as far as flashd uses it."""

    FLOAT = 1
    UINT8 = 2
    INT8 = 3
    UINT16 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    FLOAT16 = 10
    DOUBLE = 11
    BFLOAT16 = 16


@dataclass
class Node:
    """An operator: what goes in and what comes out, by name."""

    op: str
    inputs: list[str]
    outputs: list[str]
    domain: str = ""
    attributes: dict[str, Attribute] = field(default_factory=dict)

    def encode(self) -> bytes:
        parts = [_text(1, name) for name in self.inputs]
        parts += [_text(2, name) for name in self.outputs]
        parts += [_text(4, self.op), _text(7, self.domain)]
        parts += [_bytes(5, _attribute(name, value)) for name, value in self.attributes.items()]
        return b"".join(parts)


@dataclass(frozen=True)
class Value:
    """An input or output of a graph."""

    name: str
    kind: T
    dims: Dims

    def encode(self) -> bytes:
        dims = [_text(2, dim) if isinstance(dim, str) else _integer(1, dim) for dim in self.dims]
        shape = b"".join(_bytes(1, dim) for dim in dims)
        tensor = _integer(1, self.kind) + _bytes(2, shape)
        return _text(1, self.name) + _bytes(2, _bytes(1, tensor))


@dataclass(frozen=True)
class Constant:
    """A value that the graph itself has."""

    name: str
    value: npt.NDArray[Any]

    def encode(self) -> bytes:
        kind = T[_KINDS[self.value.dtype]]
        raw = _bytes(9, np.ascontiguousarray(self.value).tobytes())
        return _packed(1, self.value.shape) + _integer(2, kind) + _text(8, self.name) + raw


@dataclass(frozen=True)
class External:
    """A value that whoever opens the graph supplies by name."""

    name: str
    kind: T
    dims: Sequence[int]

    def encode(self) -> bytes:
        # onnxruntime wants a path that exists below the working directory, and reads nothing there
        where = [("location", "."), ("offset", "0"), ("length", "0")]
        entries = b"".join(_bytes(13, _text(1, key) + _text(2, value)) for key, value in where)
        return _packed(1, self.dims) + _integer(2, self.kind) + _text(8, self.name) + entries + _integer(14, 1)


def model(
    name: str, nodes: Iterable[Node], inputs: Iterable[Value], outputs: Iterable[Value],
    initialisers: Iterable[Constant | External],
) -> bytes:  # fmt: skip
    """The bytes of a ModelProto."""
    graph = b"".join(
        [
            *(_bytes(1, node.encode()) for node in nodes), _text(2, name),
            *(_bytes(5, value.encode()) for value in initialisers),
            *(_bytes(11, value.encode()) for value in inputs),
            *(_bytes(12, value.encode()) for value in outputs),
        ]
    )  # fmt: skip
    opsets = [_integer(2, OPSET), _text(1, MICROSOFT) + _integer(2, 1)]
    return _integer(1, IR_VERSION) + _bytes(7, graph) + b"".join(_bytes(8, opset) for opset in opsets)


MANY = 1 << 12
"""Numbers and names whose bytes are kept: graphs of many layers are made of the same ones."""

_KINDS = {
    np.dtype(np.float32): "FLOAT", np.dtype(np.float16): "FLOAT16", np.dtype(np.uint8): "UINT8",
    np.dtype(np.int8): "INT8", np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64",
}  # fmt: skip


def _attribute(name: str, value: Attribute) -> bytes:
    """An AttributeProto; its type is that of the value."""
    if isinstance(value, int):
        return _text(1, name) + _integer(3, value) + _integer(20, 2)
    if isinstance(value, float):
        return _text(1, name) + _key(2, 5) + struct.pack("<f", value) + _integer(20, 1)
    if isinstance(value, str):
        return _text(1, name) + _text(4, value) + _integer(20, 3)
    numbers = b"".join(_integer(8, number) for number in value)
    return _text(1, name) + numbers + _integer(20, 7)


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


@lru_cache(MANY)
def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take ten bytes, as protobuf has it
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(int(value))


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, 2) + _varint(len(value)) + value


@lru_cache(MANY)
def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _packed(number: int, values: Sequence[int]) -> bytes:
    return _bytes(number, b"".join(_varint(int(v)) for v in values))
