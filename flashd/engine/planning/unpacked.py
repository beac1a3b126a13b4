"""How many bytes rows hold that are in RAM as the card has them, and what their products take, by the header."""

from __future__ import annotations

from math import prod

import numpy as np

from flashd.bundle.header import Header
from flashd.bundle.prefix import ROWS_OF_A_RUN
from flashd.bundle.rows.formats import GroupFormat, Plane, RowFormat
from flashd.bundle.rows.kinds import BLOCK
from flashd.engine.model.sizes import (
    FEW_UNPACKED,
    HEAD_ROWS_UNPACKED,
    TOKENS_UNPACKED,
    at_work,
)
from flashd.engine.paging.card import units_of_a_read
from flashd.engine.paging.card_speed import IN_FLIGHT
from flashd.graphs.constant import Arithmetic
from flashd.graphs.unpacked import ROWS_TOGETHER

ALIGNED, OBJECTS = 64, 2 << 10
"""Of rows in RAM as the card has them: what arrays start at multiples of, and their objects in the interpreter."""


GUESSED: Arithmetic = "int8"
"""The arithmetic of guesses made from what is in RAM: they need not be exact, and it is faster."""


def streams(header: Header) -> bool:
    """Whether every neuron takes part, so that groups and rows of the head stream past."""
    return not (header.model.experts or header.selection)


def group_kept(form: GroupFormat) -> int:
    """Bytes of a group in RAM as the card has it."""
    return form.nbytes + OBJECTS


def rows_kept(form: RowFormat, rows: int) -> int:
    """Bytes of rows of the head in RAM as the card has them."""
    parts, left = divmod(rows, HEAD_ROWS_UNPACKED)
    return parts * kept(form.planes(HEAD_ROWS_UNPACKED)) + (kept(form.planes(left)) if left else 0)


def kept(planes: list[Plane]) -> int:
    """Bytes of arrays in one piece of memory."""
    sizes = (prod(shape) * np.dtype(dtype).itemsize for dtype, shape in planes)
    return sum(-(-size // ALIGNED) * ALIGNED for size in sizes) + OBJECTS


def passing_bytes(header: Header) -> int:
    """Bytes of RAM that each part of the head has which streams past, and each group that is widened."""
    head = kept(header.row_format("head").planes(head_rows_of_a_read(header)[1]))
    return max(group_kept(header.largest_group), head) if header.narrowed else head


def scratch(header: Header, arithmetic: Arithmetic, threads: int) -> int:
    """Bytes that the threads which multiply groups and rows of the head unpack into, and copy such rows to."""
    inputs, down, *head = (_unpacked(row, rows, arithmetic) for row, rows in _products(header))
    # what reads the card copies rows of the head before they are transposed
    copied = head_rows_of_a_read(header)[1] * header.row_format("head").q_bytes if streams(header) else 0
    return at_work(threads) * (max([inputs, *head]) + down) + IN_FLIGHT * copied


def head_parts(rows: int) -> tuple[int, int]:
    """(how many parts so many rows of the head are unpacked in, the rows of each but the last)."""
    parts = -(-rows // HEAD_ROWS_UNPACKED)
    return parts, -(-rows // parts)


def head_rows_of_a_read(header: Header) -> tuple[int, int]:
    """The same of the rows that one read gives."""
    return head_parts(units_of_a_read(ROWS_OF_A_RUN * header.row_format("head").nbytes) * ROWS_OF_A_RUN)


def temporary(header: Header, arithmetic: Arithmetic, threads: int, tokens: int = TOKENS_UNPACKED) -> int:
    """Bytes that their products take while they run, of a pass over so many tokens."""
    together = min(tokens, TOKENS_UNPACKED)
    each = (_temporary(row, rows, together, arithmetic) for row, rows in _products(header))
    return at_work(threads) * max(each)


def _products(header: Header) -> list[tuple[RowFormat, int]]:
    form = header.largest_group
    products = [(form.row, form.inputs * form.neurons), (form.column, form.hidden)]
    if streams(header):
        products.append((header.row_format("head"), min(HEAD_ROWS_UNPACKED, header.model.vocabulary)))
    return products


def attention_scratch(header: Header, arithmetic: Arithmetic) -> int:
    """Bytes that attention unpacks its rows into."""
    places = {(name, row, rows) for name, row, rows in _attention(header)}
    return sum(_unpacked(row, rows, arithmetic) for _, row, rows in places)


def attention_temporary(header: Header, arithmetic: Arithmetic, tokens: int) -> int:
    """Bytes that its products take while they run, of so many tokens that attend together."""
    return max(_temporary(row, rows, tokens, arithmetic) for _, row, rows in _attention(header))


def _attention(header: Header) -> list[tuple[str, RowFormat, int]]:
    """Of all layers' products: (name, format of their rows, how many)."""
    every = ((i, product) for i in range(header.model.layers) for product in header.model.products(i))
    return [(product.name, header.product_format(i, product), product.rows) for i, product in every]


def _unpacked(row: RowFormat, rows: int, arithmetic: Arithmetic) -> int:
    """Bytes of weights when they are unpacked."""
    if row.kind == "f16" or (row.bits == 8 and arithmetic == "int8"):
        return 0  # they are widened within a product, or bytes anyway
    return rows * (row.width + row.digits)


def _temporary(row: RowFormat, rows: int, tokens: int, arithmetic: Arithmetic) -> int:
    """Bytes that a product of so many tokens, the most that go together, takes while it runs."""
    width = row.width + row.digits
    weights, together = rows * width, min(rows, ROWS_TOGETHER)
    if row.kind == "f16":
        return 4 * weights
    scales = 4 * weights // BLOCK
    # some rows at a time, each with a copy of its own
    if arithmetic == "float32":
        return 2 * 4 * together * width + weights + scales
    of_few, of_token = 2 * 4 * FEW_UNPACKED * weights // BLOCK, 4 * width // BLOCK
    if row.kind == "ternary":
        return 2 * tokens * rows * of_token
    return max(of_few, tokens * together * of_token + weights) + scales
