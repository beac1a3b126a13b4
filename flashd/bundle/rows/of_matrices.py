"""The kind of rows that each matrix of a bundle has."""

from __future__ import annotations

import msgspec

from flashd.bundle.rows.kinds import RowKind

STATES_AND_TOKENS = ("token_projection", "stream_projection", "stream_out")
"""Sections beside the layers' whose rows are like those of attention."""


class Formats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The kind of rows that each matrix has."""

    ffn: RowKind
    attention: RowKind
    head: RowKind
    embedding: RowKind
    token_inputs: RowKind = "f16"
    finer: tuple[str, ...] = ()  # matrices whose rows are int8 though `ffn` or `attention` is int4, see `of`

    def of(self, name: str, others: RowKind) -> RowKind:
        """The kind of rows of a matrix whose likes have `others`.

        `name`: that of its section, or layer.N.inputs or layer.N.down of the groups of layer N.
        """
        return "int8" if name in self.finer else others

    @property
    def constant(self) -> frozenset[RowKind]:
        """The kinds of rows that are constants of sessions."""
        finer: RowKind = "int8" if self.finer else self.ffn
        return frozenset((self.ffn, self.attention, self.head, finer))

    @property
    def words(self) -> str:
        """The kinds of rows of FFNs, and the others of layers."""
        kinds = dict.fromkeys((self.ffn, self.attention, *(["int8"] if self.finer else [])))
        return " and ".join(kinds)

    @property
    def of_leading(self) -> Formats:
        """Those of a plain model whose FFNs are all like those of a mixture's first layers."""
        return msgspec.structs.replace(self, ffn=self.of(LEADING, self.attention), finer=())

    @property
    def rounded_head(self) -> bool:
        """Whether the head's input is rounded to 8 bits a block, which makes the constant graph faster."""
        return self.ffn == "int4"

    @property
    def centred_head(self) -> bool:
        """Whether the head's blocks have centres.

        Eight bits need none, and the product with centres would take a twentieth of a token's time in a small model
        that fits in RAM.
        """
        return not (self.rounded_head and self.head == "int8")


LEADING = "leading"
"""What Formats.finer calls the FFNs of all the first layers of a mixture."""
