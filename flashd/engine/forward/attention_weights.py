"""What attention multiplies with: constants of a session a layer, or rows as the card has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import onnxruntime as ort

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import Constants
from flashd.engine.forward.kept import KeptRows, Scratch, Shelf, Unpacker
from flashd.engine.forward.stages import input_names, vectors_of
from flashd.engine.model.sizes import FEW_UNPACKED
from flashd.engine.planning.unpacked import GUESSED
from flashd.graphs import unpacked
from flashd.graphs.constant import Arithmetic
from flashd.graphs.rounding import KvFormat
from flashd.system.onnx_session import open_session


class Opened(NamedTuple):
    """A session, and the names of its inputs."""

    session: ort.InferenceSession
    names: Sequence[str]

    @classmethod
    def of(cls, session: ort.InferenceSession) -> Opened:
        return cls(session, input_names(session))


class AttentionWeights(Protocol):
    """One of the two ways."""

    def load(self, layer: int) -> None:
        """Takes in the next layer. Raises DamagedRun, CardError."""

    def opened(self, layer: int, rows: int, drafting: bool) -> Opened:
        """What multiplies so many rows of input. `drafting`: it need not be exact."""

    def bind(self, layer: int, binding: Any, drafting: bool) -> None:
        """Gives a layer's weights to such a session, if they are not its own."""


class ConstantAttention:
    """Each layer has a session, whose constants its weights are."""

    def __init__(self, bundle: Bundle, constants: Constants) -> None:
        self._bundle, self._constants, self._model = bundle, constants, bundle.header.model
        self._layers: list[Opened] = []

    def load(self, layer: int) -> None:
        products = [self._bundle.rows(f"layer.{layer}.{product.name}") for product in self._model.products(layer)]
        session = self._constants.attention(layer, products, vectors_of(self._bundle, layer))
        self._layers.append(Opened.of(session))

    def opened(self, layer: int, rows: int, drafting: bool) -> Opened:  # noqa: ARG002
        return self._layers[layer]

    def bind(self, layer: int, binding: Any, drafting: bool) -> None:
        """They are its own."""


@dataclass(frozen=True)
class _Layer:
    exact: tuple[Opened, Opened]  # for few rows of input, and for many
    guess: tuple[Opened, Opened]  # the same of drafts
    rows: dict[str, KeptRows]  # of each product
    vectors: dict[str, Floats]


class UnpackedAttention:
    """Layers that are alike share a session, whose inputs their weights are. They are unpacked for each pass."""

    def __init__(self, bundle: Bundle, arithmetic: Arithmetic, kv: KvFormat) -> None:
        self._bundle, self._model, self._arithmetic, self._kv = bundle, bundle.header.model, arithmetic, kv
        scratch = Scratch()
        self._shelf, self._exact, self._guess = Shelf(), Unpacker(arithmetic, scratch), Unpacker(GUESSED, scratch)
        self._sessions: dict[bytes, Opened] = {}
        self._layers: list[_Layer] = []

    def load(self, layer: int) -> None:
        header, at = self._bundle.header, f"layer.{layer}."
        forms = {product.name: header.product_format(layer, product) for product in self._model.products(layer)}
        rows = {name: self._shelf.keep_rows(form, self._bundle.rows(f"{at}{name}")) for name, form in forms.items()}
        exact = self._opened(self._arithmetic, layer, forms)
        guess = exact if self._arithmetic == GUESSED else self._opened(GUESSED, layer, forms)
        self._layers.append(_Layer(exact, guess, rows, vectors_of(self._bundle, layer)))

    def _opened(self, kind: Arithmetic, layer: int, forms: Mapping[str, RowFormat]) -> tuple[Opened, Opened]:
        """A layer's sessions for few rows of input and for many."""
        few, many = (
            unpacked.attention(self._model, kind, layer, forms, several, self._kv) for several in (False, True)
        )
        for graph in (few, many):
            if graph not in self._sessions:
                self._sessions[graph] = Opened.of(open_session(graph, together=True))
        return self._sessions[few], self._sessions[many]

    def opened(self, layer: int, rows: int, drafting: bool) -> Opened:
        own = self._layers[layer]
        return (own.guess if drafting else own.exact)[rows > FEW_UNPACKED]

    def bind(self, layer: int, binding: Any, drafting: bool) -> None:
        own, unpack = self._layers[layer], self._guess if drafting else self._exact
        for name in own.vectors.keys() & own.exact[0].names:
            binding.bind_cpu_input(name, own.vectors[name])
        for name, kept in own.rows.items():
            for array_name, array in unpack(name, kept.form, kept.rows).items():
                binding.bind_cpu_input(array_name, array)
