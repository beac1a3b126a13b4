"""The bytes that each token adds to a text. With them the board turns tokens into text without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashd.errors import DataError

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What opens and what closes a reasoning model's thought: of most models, and of Mistral's."""


def frames_thoughts(token: str) -> bool:
    """Whether a token tells where a thought begins or ends. It has bytes even if it is a control token."""
    return any(token in tags for tags in THOUGHTS)


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of V tokens. A control token has none, but for those that frame thoughts."""

    offsets: npt.NDArray[np.uint32]  # [V + 1]
    blob: bytes

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> TokenBytes:
        """The table of tokens with these bytes."""
        offsets = np.zeros(len(tokens) + 1, np.uint32)
        np.cumsum([len(t) for t in tokens], out=offsets[1:])
        return cls(offsets, b"".join(tokens))

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenBytes:
        """Reads what to_bytes wrote. Raises DataError if it contradicts itself."""
        count = int.from_bytes(data[:4], "little")
        if len(data) < 4 or count < 1 or len(data) < 4 + 4 * count:
            raise DataError("the table of token texts is cut short; pack the bundle again")
        offsets = np.frombuffer(data, "<u4", count, 4).astype(np.uint32)  # a copy: `data` is not held
        blob = data[4 + 4 * count :]
        if offsets[0] != 0 or offsets[-1] != len(blob) or (offsets[1:] < offsets[:-1]).any():
            raise DataError("the table of token texts does not add up; pack the bundle again")
        return cls(offsets, blob)

    def to_bytes(self) -> bytes:
        """[uint32 V + 1 | uint32 offsets | the texts, end to end]."""
        return len(self.offsets).to_bytes(4, "little") + self.offsets.astype("<u4").tobytes() + self.blob

    def begins_like(self, other: TokenBytes) -> bool:
        """Whether the tokens that both have say the same.

        One vocabulary may be longer: Qwen2.5 fills its larger models' with tokens that no text has.
        """
        count = min(len(self), len(other))
        last = self.offsets[count]
        return self.offsets[: count + 1].tobytes() == other.offsets[: count + 1].tobytes() and (
            self.blob[:last] == other.blob[:last]
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, token: int) -> bytes:
        if not 0 <= token < len(self):
            raise IndexError(token)
        return self.blob[self.offsets[token] : self.offsets[token + 1]]
