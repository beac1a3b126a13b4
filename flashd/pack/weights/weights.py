"""A model file's weights by what they do, whatever names and order the file has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import (
    AttentionKind,
    GatedDeltaNet,
    LayerKind,
    LayerProduct,
    Mamba2,
    Recurrent,
    ShortConvolution,
)
from flashd.bundle.rows.kinds import BLOCK, Floats
from flashd.errors import DataError
from flashd.pack.families.family import ENDLESS, PLAIN, Family, tensor_name
from flashd.pack.families.rope import rotary_order, rotary_width
from flashd.pack.open_model import OpenModel, Tensor
from flashd.pack.weights.latents import latent_matrices
from flashd.pack.weights.matrix import Matrix, Numbers, finite, whole

PARTS_OF = {
    "delta_in": ("z", "mixed"), "delta_rates": ("beta", "alpha"), "shared_inputs": ("shared_gate", "shared_up"),
    "bound": ("gate",),
}  # fmt: skip
"""Products that are made of several tensors, and these by their names in families.family.TENSORS."""


CONVOLUTIONS: dict[type[Recurrent], str] = {
    ShortConvolution: "conv", GatedDeltaNet: "delta_conv", Mamba2: "mamba_conv",
}  # fmt: skip
"""What the convolution of each kind of layer is called in families.family.TENSORS."""


@dataclass(frozen=True)
class Ffn:
    """The weights of a layer's FFN, or of one of its experts."""

    inputs: list[Matrix]  # gate and up, or up alone, each [F, H]
    biases: Floats  # of the input rows, [F, M], or [F, 0] if there are none
    down: Tensor  # [H, F]
    norm: Floats  # [F], the weights of the activations' norm, or [0] if they are not normed

    @property
    def tensors(self) -> list[Tensor]:
        return [*(part.tensor for part in self.inputs), self.down]

    @property
    def neurons(self) -> int:
        """F"""
        return self.down.shape[-1]

    @property
    def whole(self) -> int:
        """Its neurons, and those that fill its last block."""
        return -(-self.neurons // BLOCK) * BLOCK

    def columns(self) -> Floats:
        """[H, F]: what an activation adds to the output, by the norm's weights too."""
        return self.down.rows() * self.norm if len(self.norm) else self.down.rows()

    def filled(self, neurons: int) -> tuple[Floats, Floats, Floats]:
        """(down_proj [H, n], biases [n, M], norm [n] or [0]) with n = `neurons` neurons.

        Those beyond the FFN's own are zero.
        """
        filling = neurons - self.neurons
        norm = np.pad(self.norm, (0, filling)) if len(self.norm) else self.norm
        down = finite(self.down, self.down.rows())
        return np.pad(down, ((0, 0), (0, filling))), np.pad(self.biases, ((0, filling), (0, 0))), norm


class Weights:
    """The weights of a model file by what they do. Raises DataError if one is missing or has another size."""

    def __init__(self, source: OpenModel, family: Family, model: Architecture) -> None:
        self._source, self._family, self._model = source, family, model
        self._rotary = rotary_width(source) if family.rotary else 0
        """Of a head of the model's own width. Heads of another are turned whole."""

    @property
    def tied(self) -> bool:
        """Whether the head and the embeddings are the same table."""
        return not {"output.weight", "project_out.weight"} & self._source.names

    def embedding(self) -> Matrix:
        """[V, H]"""
        tensor = self._source.tensor("token_embd.weight")
        if "project_in.weight" not in self._source.names:
            return whole(tensor)
        return Matrix(tensor, np.arange(tensor.shape[0]), self._source.tensor("project_in.weight").rows().T)

    def head(self) -> Matrix:
        """[V, H]"""
        if "output.weight" in self._source.names:
            return whole(self._source.tensor("output.weight"))
        tensor = self._source.tensor("token_embd.weight")
        if self.tied:
            return whole(tensor)
        return Matrix(tensor, np.arange(tensor.shape[0]), self._source.tensor("project_out.weight").rows())

    def positions(self) -> Matrix:
        """[positions, H]"""
        tensor = self._source.tensor("position_embd.weight")
        return Matrix(tensor, np.arange(self._family.position_offset, tensor.shape[0]))

    def token_inputs(self) -> Matrix | None:
        """[V, L P], if the model has them."""
        if not self._model.token_inputs:
            return None
        table, numbers = self._of_model("token_inputs"), np.arange(self._model.vocabulary)
        if self._model.streams and 0 < table.shape[0] < len(numbers):
            return Matrix(table, np.where(numbers < table.shape[0], numbers, 0))  # as transformers takes them
        return whole(table)

    def token_projection(self) -> Matrix:
        """[L P, H], of a model with token inputs"""
        return whole(self._of_model("token_projection"))

    def _of_model(self, part: str) -> Tensor:
        return self._source.tensor(f"{tensor_name(self._family, part)}.weight")

    def qkv(self, i: int) -> list[Matrix]:
        """The matrices of queries [heads * D, H], keys and values [kv heads * D, H] of layer `i`, and its gate's.

        Only those that it makes itself. Queries and keys are in the engine's rotary order.
        """
        fused, orders = f"{tensor_name(self._family, 'qkv', i)}.weight", self._qkv_orders(i)
        if fused in self._source.names:
            tensor = self._source.tensor(fused)
            _check_rows(tensor, sum(len(order) for _, order in orders))
            return [Matrix(tensor, start + order) for start, order in orders]
        names = [f"{tensor_name(self._family, part, i)}.weight" for part in ("query", "key", "value")]
        out = [Matrix(self._source.tensor(name), order) for name, (_, order) in zip(names, orders, strict=False)]
        for matrix in out if not self._model.attention_gated else out[1:]:
            _check_rows(matrix.tensor, len(matrix))
        return out if not self._model.attention_gated else self._with_gate(out)

    def _with_gate(self, qkv: list[Matrix]) -> list[Matrix]:
        """Queries, keys, values, and the output's gate, whose rows of a head are behind those of its query."""
        (query, *others), d = qkv, self._model.head_dim
        _check_rows(query.tensor, 2 * len(query))
        queries, gates = (order + order // d * d for order in (query.order, np.arange(len(query))))
        return [Matrix(query.tensor, queries), *others, Matrix(query.tensor, gates + d)]

    def products(self, i: int) -> list[list[Matrix]]:
        """The matrices of each of Architecture.products of layer `i`."""
        return [self._product(i, product) for product in self._model.products(i)]

    def mixers(self, i: int) -> list[tuple[LayerKind, list[list[Matrix]]]]:
        """Of each of Architecture.mixers its kind, and the matrices of its products."""
        return [
            (mixer.kind, [self._product(i, product) for product in mixer.products]) for mixer in self._model.mixers(i)
        ]

    def beside(self, i: int) -> dict[str, list[Matrix]]:
        """Those of the other of Architecture.products, by their names."""
        names, first = [product.name for product in self._model.products(i)], len(self._model.mixing(i))
        return dict(zip(names[first:], self.products(i)[first:], strict=True))

    def states(self, part: str) -> list[Matrix]:
        """`stream_projection` or `stream_out`: a matrix [H, H] for each state but the first."""
        name, others = tensor_name(self._family, part), self._model.stream_width // self._model.hidden - 1
        if f"{name}.weight" in self._source.names:
            return [whole(_one_of(self._source.tensor(f"{name}.weight"), number)) for number in range(others)]
        return [whole(self._source.tensor(f"{name}.{number}.weight")) for number in range(others)]

    def products_behind(self, i: int) -> list[list[Matrix]]:
        """The matrix of each of Architecture.products_behind of layer `i`."""
        return [self._product(i, product) for product in self._model.products_behind()]

    def _product(self, i: int, product: LayerProduct) -> list[Matrix]:
        kind = self._model.kind(i)
        if product.name == "qkv":
            return self.qkv(i)
        if isinstance(kind, AttentionKind) and kind.latent and product.name.startswith("latent_"):
            return latent_matrices(product.name, self._model.heads, kind.latent, lambda part: self._found(i, part))
        if product.name == "delta_rates" and self._family.delta_nets and self._family.delta_nets.joined_rates:
            return self._joined_rates(i)
        if product.name in ("mamba_in", "mamba_rates"):
            return self._mamba_rows(i)[product.name]
        parts = PARTS_OF.get(product.name, (product.name,))
        names = [f"{tensor_name(self._family, part, i)}.weight" for part in parts]
        return [whole(self._source.tensor(name)) for name in names]

    def _found(self, i: int, part: str) -> Tensor | None:
        """A part of layer `i`, if the file has it."""
        name = f"{tensor_name(self._family, part, i)}.weight"
        return self._source.tensor(name) if name in self._source.names else None

    def _joined_rates(self, i: int) -> list[Matrix]:
        """Beta and alpha of delta nets, of a tensor that has those of all heads that share a key together."""
        kind = self._model.kind(i)
        assert isinstance(kind, GatedDeltaNet)
        tensor = self._source.tensor(f"{tensor_name(self._family, 'rates', i)}.weight")
        _check_rows(tensor, 2 * kind.value_heads)
        rows = np.arange(2 * kind.value_heads).reshape(kind.key_heads, 2, -1)
        return [Matrix(tensor, rows[:, part].reshape(-1)) for part in range(2)]

    def _mamba_rows(self, i: int) -> dict[str, list[Matrix]]:
        """The matrices of a Mamba-2 mixer's first products, of a tensor that has the rows of all of them."""
        kind = self._model.state_kind(i)
        assert isinstance(kind, Mamba2)
        tensor = self._source.tensor(f"{tensor_name(self._family, 'mamba_in', i)}.weight")
        ends = np.cumsum((kind.width, kind.mixed_width, kind.heads))
        _check_rows(tensor, int(ends[-1]))
        z, mixed, rates = np.split(np.arange(ends[-1]), ends[:-1])
        return {
            "mamba_in": [Matrix(tensor, z), Matrix(tensor, mixed)], "mamba_rates": [Matrix(tensor, rates)],
        }  # fmt: skip

    def expert_vectors(self, i: int, order: Numbers | None = None) -> dict[str, Floats]:
        """The vectors that Architecture.expert_vectors names, of layer `i`, of the experts in some order [E]."""
        experts = self._model.experts
        every = np.arange(experts.count if experts else 0) if order is None else order
        out = {}
        for name, length in self._model.expert_vectors().items():
            if name == "places":
                out[name] = np.argsort(every).astype(np.float32)
                continue
            part, kind = name.split(".")
            values = self._vector(f"{tensor_name(self._family, part, i)}.{kind}")
            if values.size != length:
                raise DataError(f"{self._source.path}: {name} has {values.size} numbers and should have {length}")
            out[name] = np.ascontiguousarray(values.reshape(len(every), -1)[every]).reshape(-1)
        return out

    def leading(self, i: int) -> Ffn | None:
        """The FFN that layer `i` of a mixture has in place of experts; None if it has experts."""
        if self._model.leading_ffn(i) is None:
            return None
        joined = self._family.joined_inputs
        *inputs, down = [self._source.tensor(f"blk.{i}.{PLAIN[part]}.weight") for part in self._ffn_parts(joined)]
        none = np.zeros((down.shape[-1], 0), np.float32), np.zeros(0, np.float32)
        return Ffn(self._input_matrices(inputs, joined), none[0], down, none[1])

    def every_ffn(self, i: int) -> list[Ffn]:
        """All FFNs of layer `i`."""
        leading = self.leading(i)
        return [leading] if leading else self.ffns(i)

    def _ffn_parts(self, joined: bool) -> list[str]:
        """The matrices of an FFN, down last. `joined`: gate and up are one."""
        return ["gate"] * (self._model.gated and not joined) + ["inputs", "down"]

    def ffns(self, i: int) -> list[Ffn]:
        """The FFN of layer `i`, or in a mixture each of its experts; empty if it has neither."""
        if i not in self._model.paged_layers or not self._model.neurons_of(i):
            return []
        joined = self._family.joined_inputs or self._family.joined_experts
        names = [tensor_name(self._family, part, i) for part in self._ffn_parts(joined)]
        tensors = [self._source.tensor(f"{name}.weight") for name in names]
        if self._model.experts:
            ffns = [[_one_of(stack, number) for stack in tensors] for number in range(self._model.experts.count)]
        else:
            ffns = [tensors]
        biases = np.zeros((len(ffns), ffns[0][0].shape[0], 0), np.float32)  # of each FFN [F, M]
        if "inputs" in self._model.biases:
            own = [self._vector(f"{name}.bias").reshape(len(ffns), -1) for name in names[:-1]]
            biases = np.stack(own, axis=2)
        norm = np.zeros(0, np.float32)
        if self._model.normed_neurons:
            norm = self._vector(f"{tensor_name(self._family, 'neurons_norm', i)}.weight")
        return [
            Ffn(self._input_matrices(inputs, joined), bias, down, norm)
            for (*inputs, down), bias in zip(ffns, biases, strict=True)
        ]

    def _input_matrices(self, tensors: list[Tensor], joined: bool) -> list[Matrix]:
        """Gate and up, or up alone, each [F, H]."""
        if not joined:
            return [whole(tensor) for tensor in tensors]
        (both,) = tensors
        return [Matrix(both, half) for half in np.split(np.arange(both.shape[0] & ~1), 2)]

    def router(self, i: int) -> Matrix:
        """[E, H]"""
        return whole(self._source.tensor(f"{tensor_name(self._family, 'router', i)}.weight"))

    def layer_vectors(self, i: int) -> dict[str, Floats]:
        """The vectors that Architecture.layer_vectors names, of layer `i`."""
        return {name: self._checked(name, length, i) for name, length in self._model.layer_vectors(i).items()}

    def model_vectors(self) -> dict[str, Floats]:
        """The vectors that Architecture.model_vectors names.

        If the family divides logits by a number, the final norm's weights are divided by it.
        """
        vectors = {name: self._checked(name, length, None) for name, length in self._model.model_vectors().items()}
        divisor = self._source.number("logit_scale", float, 1.0)
        return {n: v / np.float32(divisor) if n.startswith("final_norm") else v for n, v in vectors.items()}

    def _checked(self, name: str, length: int, layer: int | None) -> Floats:
        part, _, end = name.partition(".")
        if part == "ffn_norm" and layer is not None and not self._model.neurons_of(layer):
            return np.ones(length, np.float32)  # nothing is behind it
        if part == "qkv" and layer is not None:
            values = self._qkv_bias(layer)
        elif part == "conv" and layer is not None:
            values = self._taps(layer)[:, int(end)]
        elif name in ENDLESS:
            values = self._vector(tensor_name(self._family, name, layer)).reshape(-1)
        elif part == "router_scale":  # transformers and llama.cpp divide in each pass
            values = self._vector(f"{tensor_name(self._family, 'router', layer)}.scale") / np.float32(np.sqrt(length))
        else:
            values = self._vector(f"{tensor_name(self._family, part, layer)}.{end}").reshape(-1)
        if part == "stream_norm":
            values = values / np.float32(length)  # transformers divides in each pass; llama.cpp, too
        if part == "scale" and len(values) == 1:
            values = values.repeat(length)  # a graph with a single number is optimised before the number is there
        if len(values) != length:
            raise DataError(f"{self._source.path}: {name} has {len(values)} numbers and should have {length}")
        kind = self._model.kind(layer) if layer is not None else None
        if part in ("query_norm", "key_norm") and isinstance(kind, AttentionKind):
            return values[self._order(kind, length // self._model.head_dim_of(kind))]
        return values

    def _order(self, kind: AttentionKind, heads: int) -> Numbers:
        """The order of the rows of so many heads of queries or keys."""
        width = self._model.head_dim_of(kind)
        return rotary_order(self._family, heads, width, width if kind.head_dim else self._rotary)

    def _taps(self, layer: int) -> Floats:
        """[channels, taps] of a layer's convolution, whether or not the file has a 1 between the two."""
        kind = self._model.state_kind(layer)
        assert kind
        name = f"{tensor_name(self._family, CONVOLUTIONS[type(kind)], layer)}.weight"
        tensor, width, taps = self._source.tensor(name), kind.convolved_width(self._model.hidden), kind.taps
        if tensor.shape not in ((width, taps), (width, 1, taps)):
            raise DataError(f"tensor {name!r} has the shape {tensor.shape}, not {(width, taps)}")
        return np.ascontiguousarray(self._vector(name).reshape(-1, taps))

    def _qkv_bias(self, i: int) -> Floats:
        fused = f"{tensor_name(self._family, 'qkv', i)}.bias"
        if fused in self._source.names:
            values = self._vector(fused)
            return np.concatenate([values[start + order] for start, order in self._qkv_orders(i)])
        parts = [self._vector(f"{tensor_name(self._family, p, i)}.bias") for p in ("query", "key", "value")]
        return np.concatenate([v[order] for v, (_, order) in zip(parts, self._qkv_orders(i), strict=True)])

    def _qkv_orders(self, i: int) -> list[tuple[int, Numbers]]:
        """Of queries, keys and values, as far as layer `i` makes them: where they start in a tensor of all three, and
        the order of their rows."""
        m, kind = self._model, self._model.kind(i)
        assert isinstance(kind, AttentionKind)
        widths = m.qkv_widths(kind)
        orders = [self._order(kind, m.heads), self._order(kind, m.kv_heads_of(kind)), np.arange(m.kv_width(kind))]
        starts = np.cumsum((0, *widths)).tolist()
        return list(zip(starts, orders[: len(widths)], strict=False))

    def _vector(self, name: str) -> Floats:
        tensor = self._source.tensor(name)
        return finite(tensor, tensor.rows())


def _one_of(stack: Tensor, number: int) -> Tensor:
    if len(stack.shape) != 3 or number >= stack.shape[0]:
        raise DataError(f"tensor {stack.name!r} has the shape {stack.shape} and no expert {number}")
    return stack.matrix(number)


def _check_rows(tensor: Tensor, rows: int) -> None:
    if tensor.shape[0] != rows:
        raise DataError(f"tensor {tensor.name!r} has {tensor.shape[0]} rows and should have {rows}")
