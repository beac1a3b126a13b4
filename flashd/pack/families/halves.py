"""Models whose files count what mixes tokens and each FFN as layers of their own.

A bundle's layer is a mixer and the FFN behind it, if there is one. So the layers of such a file are joined here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashd.bundle import header
from flashd.errors import DataError
from flashd.pack.open_model import OpenModel, Tensor
from flashd.pack.vocabulary import Vocabulary

KEYS, NEURONS, LAYERS = "attention.head_count_kv", "feed_forward_length", "block_count"


class Joined(OpenModel):
    """A model as it is with its layers joined; the norm in front of an FFN gets the name that it has elsewhere.

    Raises DataError if the file does not say of each layer what it is, or an FFN is behind no mixer.
    """

    def __init__(self, model: OpenModel) -> None:
        self._model, self.path, self.architecture = model, model.path, model.architecture
        keys, neurons = (self._of_each(key) for key in (KEYS, NEURONS))
        mixers = [i for i, count in enumerate(neurons) if not count]
        names: dict[str, str] = {}
        for i, count in enumerate(neurons):
            if count and (i == 0 or neurons[i - 1] or keys[i]):
                raise DataError(f"{self.path}: layer {i} is an FFN that no layer is in front of which mixes tokens")
            names |= self._named(i, mixers.index(i - bool(count)), bool(count))
        self._names = {names.get(name, name): name for name in model.names}
        behind = [neurons[i + 1] if i + 1 < len(neurons) else 0 for i in mixers]
        self._changed: dict[str, Any] = {
            f"{self.architecture}.{KEYS}": [keys[i] for i in mixers],
            f"{self.architecture}.{NEURONS}": behind, f"{self.architecture}.{LAYERS}": len(mixers),
        }  # fmt: skip

    def _of_each(self, key: str) -> list[int]:
        name, layers = f"{self.architecture}.{key}", self._model.layers
        stated = self._model.metadata(name)
        found = [each for each in stated if isinstance(each, int) and each >= 0] if isinstance(stated, list) else []
        if not len(found) == layers or len(found) != len(stated):
            raise DataError(f"{self.path}: {name} is {str(stated)[:60]}, which makes no model of {layers} layers")
        return found

    def _named(self, i: int, layer: int, ffn: bool) -> dict[str, str]:
        """The new names of the tensors of the file's layer `i`."""
        before, out = f"blk.{i}.", {}
        for name in self._model.names:
            if name.startswith(before):
                part = name.removeprefix(before)
                out[name] = f"blk.{layer}.{part.replace('attn_norm', 'ffn_norm') if ffn else part}"
        return out

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._names)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`. Raises DataError."""
        if name not in self._names:
            raise DataError(f"{self.path}: tensor {name!r} is missing")
        return self._model.tensor(self._names[name])

    @property
    def keys(self) -> set[str]:
        """Of all metadata."""
        return self._model.keys

    @property
    def unknown(self) -> Sequence[str]:
        """What it says of itself, beside `keys`, that changes answers and that flashd does not know, in words."""
        return self._model.unknown

    def metadata(self, key: str) -> Any:
        """A value of the metadata, None where there is none. Raises DataError where it is damaged."""
        return self._changed[key] if key in self._changed else self._model.metadata(key)

    @property
    def left_out(self) -> set[str]:
        """What the model also has and a bundle has not, in words."""
        return self._model.left_out

    def vocabulary(self) -> Vocabulary:
        """The tokenizer. Raises DataError where it is of an unknown kind or incomplete."""
        return self._model.vocabulary()

    def recommended(self) -> header.Drawing | None:
        """How the model's makers recommend that answers are drawn. Raises DataError if that makes no sense."""
        return self._model.recommended()

    def source(self, on_progress: Callable[[int], None] = lambda nbytes: None) -> header.PackedFrom:
        """Name, size and SHA-256 of what the model is kept in."""
        return self._model.source(on_progress)
