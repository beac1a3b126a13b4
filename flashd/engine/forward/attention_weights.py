"""What attention multiplies with: constants of a session a layer, or rows as the card has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import onnxruntime as ort

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward.constants import Constants
from flashd.engine.forward.kept import KeptRows, Scratch, Shelf, Unpacker
from flashd.engine.forward.stages import input_names, named
from flashd.engine.model.sizes import FEW_UNPACKED
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

    def opened(self, layer: int, rows: int) -> Opened:
        """What multiplies so many rows of input."""

    def bind(self, layer: int, binding: Any) -> None:
        """Gives a layer's weights to a session, if they are not its own."""


class ConstantAttention:
    """Each layer has a session, whose constants its weights are."""

    def __init__(self, bundle: Bundle, constants: Constants) -> None:
        self._bundle, self._constants, self._model = bundle, constants, bundle.header.model
        self._layers: list[Opened] = []

    def load(self, layer: int) -> None:
        at = f"layer.{layer}."
        vectors = named(self._bundle.floats(f"{at}vectors"), self._model.layer_vectors(layer))
        products = [self._bundle.rows(f"{at}{product.name}") for product in self._model.products(layer)]
        self._layers.append(Opened.of(self._constants.attention(layer, products, vectors)))

    def opened(self, layer: int, rows: int) -> Opened:  # noqa: ARG002
        return self._layers[layer]

    def bind(self, layer: int, binding: Any) -> None:
        """They are its own."""


@dataclass(frozen=True)
class _Layer:
    few: Opened  # for few rows of input
    many: Opened
    rows: dict[str, KeptRows]  # of each product
    vectors: dict[str, Floats]


class UnpackedAttention:
    """Layers that are alike share a session, whose inputs their weights are. They are unpacked for each pass."""

    def __init__(self, bundle: Bundle, arithmetic: Arithmetic, kv: KvFormat) -> None:
        self._bundle, self._model, self._arithmetic, self._kv = bundle, bundle.header.model, arithmetic, kv
        self._shelf, self._unpacked = Shelf(), Unpacker(arithmetic, Scratch())
        self._sessions: dict[bytes, Opened] = {}
        self._layers: list[_Layer] = []

    def load(self, layer: int) -> None:
        header, at = self._bundle.header, f"layer.{layer}."
        vectors = named(self._bundle.floats(f"{at}vectors"), self._model.layer_vectors(layer))
        forms = {product.name: header.product_format(layer, product) for product in self._model.products(layer)}
        rows = {name: self._shelf.keep_rows(form, self._bundle.rows(f"{at}{name}")) for name, form in forms.items()}
        few, many = (
            self._opened(unpacked.attention(self._model, self._arithmetic, layer, forms, several, self._kv))
            for several in (False, True)
        )
        self._layers.append(_Layer(few, many, rows, vectors))

    def _opened(self, graph: bytes) -> Opened:
        if graph not in self._sessions:
            self._sessions[graph] = Opened.of(open_session(graph, together=True))
        return self._sessions[graph]

    def opened(self, layer: int, rows: int) -> Opened:
        return self._layers[layer].few if rows <= FEW_UNPACKED else self._layers[layer].many

    def bind(self, layer: int, binding: Any) -> None:
        own = self._layers[layer]
        for name in own.vectors.keys() & own.few.names:
            binding.bind_cpu_input(name, own.vectors[name])
        for name, kept in own.rows.items():
            for array_name, array in self._unpacked(name, kept.form, kept.rows).items():
                binding.bind_cpu_input(array_name, array)
