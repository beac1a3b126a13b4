"""A model's architecture as the header describes it: sizes and properties, not names of families."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


Norm = Literal["rms", "layer"]
Block = Literal["sequential", "parallel", "post"]
Activation = Literal["silu", "clamped_silu", "gelu", "gelu_tanh", "relu", "relu2", "drelu", "fatrelu"]
Place = Literal["attention", "query", "key", "heads", "attention_branch", "ffn", "ffn_branch", "final"]
Bias = Literal["qkv", "output", "router", "inputs", "down", "head"]
Scores = Literal["softmax", "sigmoid"]


class AttentionKind(msgspec.Struct, frozen=True, kw_only=True):
    """How the layers of one kind attend. Each kind has a graph of its own."""

    window: Count = 0  # how many tokens a token attends to, itself included; 0: all
    rope: Count | None = None  # the number of the table that turns queries and keys; None: they are not turned


class ShortConvolution(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="short_convolution"):
    """A layer that has a gated short convolution in place of attention (LFM2, arXiv 2511.23404, section 2).

    A product makes b, c and x of each token, H numbers each. The output is c times a causal convolution of b x,
    channel by channel. The layer keeps no keys: its state is the last `taps - 1` values of b x.
    """

    taps: Annotated[int, msgspec.Meta(ge=2, le=64)]  # tokens that a token's convolution takes in, itself included

    def products(self, hidden: int) -> list[LayerProduct]:
        return [LayerProduct("in_proj", (3 * hidden,), hidden), LayerProduct("out_proj", (hidden,), hidden)]

    def vectors(self, hidden: int) -> dict[str, int]:
        return {f"conv.{tap}": hidden for tap in range(self.taps)}

    def row_width(self, hidden: int) -> int:
        """Of what a token adds to the state: its b x."""
        return hidden


class GatedDeltaNet(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="gated_delta_net"):
    """A layer that has a gated delta net in place of attention (Qwen3-Next; arXiv 2412.06464).

    Products make z, queries, keys, values, and two numbers a head of each token. Queries, keys and values go through
    a causal convolution, channel by channel, and SiLU; queries and keys are made 1 long. Then, for each head of
    values, with its matrix S [key dim, value dim], which is zero in front of the text:

        S = exp(decay * softplus(alpha + dt)) S;    S = S + sigmoid(beta) k (v - S k);    y = S q / sqrt(key dim)

    The output is the norm of y, head by head, times SiLU of z. The layer keeps no keys: its state is S, and the last
    `taps - 1` values of what goes into the convolution.
    """

    taps: Annotated[int, msgspec.Meta(ge=2, le=64)]  # tokens that a token's convolution takes in, itself included
    key_heads: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # of queries too
    value_heads: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # a multiple of key_heads
    key_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # of a head
    value_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    tiled: bool = False  # head n of values has the keys of head n modulo key_heads; else heads in a row share them

    @property
    def keys_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def mixed_width(self) -> int:
        """Of what is convolved: queries, keys and values."""
        return 2 * self.keys_width + self.values_width

    def products(self, hidden: int) -> list[LayerProduct]:
        heads = self.value_heads
        return [
            LayerProduct("delta_in", (self.values_width, self.mixed_width), hidden),  # z first
            LayerProduct("delta_rates", (heads, heads), hidden, fine=True),  # beta and alpha
            LayerProduct("delta_out", (hidden,), self.values_width),
        ]

    def vectors(self, hidden: int) -> dict[str, int]:  # noqa: ARG002
        of_heads = {"decay": self.value_heads, "dt.bias": self.value_heads, "delta_norm.weight": self.value_dim}
        return {f"conv.{tap}": self.mixed_width for tap in range(self.taps)} | of_heads

    def row_width(self, hidden: int) -> int:  # noqa: ARG002
        """Of what a token adds to the state: queries, keys, values, beta and alpha, as the products make them."""
        return self.mixed_width + 2 * self.value_heads


Recurrent = ShortConvolution | GatedDeltaNet
"""Kinds of layers that keep a state of fixed size in place of keys."""

LayerKind = AttentionKind | Recurrent


class LayerProduct(NamedTuple):
    """A product with a large matrix that a layer has in front of its FFN. `name` is that of the layer's section."""

    name: str
    parts: tuple[int, ...]  # rows of each matrix that it is made of, one behind the other
    width: int  # K, of a row
    fine: bool = False  # whether its rows are few and have 16 bits in any case

    @property
    def rows(self) -> int:
        return sum(self.parts)

    @property
    def weights(self) -> int:
        return self.rows * self.width


class SharedExpert(msgspec.Struct, frozen=True, kw_only=True):
    """An expert that every token uses. So its rows are not paged: they are multiplied behind the attention."""

    neurons: Size  # a multiple of 32
    weighed: bool  # whether its output is multiplied by sigmoid(w h), h the FFN's input


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts: a token uses only those experts of a layer that the router scores highest."""

    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # E; each expert has neurons / E consecutive neurons
    used: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # experts that a token uses
    scores: Scores  # what is made of the router's products: a softmax over all experts, or a sigmoid of each
    normalised: bool  # whether the scores of the experts used are divided by their sum
    scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # the scores are multiplied by this
    early: bool = False  # whether the router takes the layer's input rather than the FFN's
    shared: SharedExpert | None = None  # one that every token uses beside them


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to know of an architecture. The graphs are built from these sizes and properties.

    Let f be a layer's attention or its FFN, and n a norm, if the layer has one at that place. Then a block is

        sequential   x + n(f(n(x))), first with the attention, then with the FFN
        parallel     x + n(attention(n(x))) + n(ffn(n(x))); if the FFN has no norm of its own it takes the attention's
        post         n(x + f(x)), first with the attention, then with the FFN
    """

    family: str
    name: str
    hidden: Size  # H
    layers: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # L
    heads: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    kv_heads: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    head_dim: Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=8)]  # D
    neurons: Size  # of one layer's FFN, all its experts together, a multiple of 32 (of each)
    group_neurons: Size  # N, of a group: what is read, pinned and multiplied as one
    experts: Experts | None = None
    vocabulary: Size  # V
    context: Positive  # tokens that the model was trained for
    block: Block
    norm: Norm  # rms: x / rms(x) * weight; layer: (x - mean) / deviation * weight + bias
    norm_epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    norm_bias: bool
    norms: list[Place]
    norm_heads: bool  # whether queries and keys are normed head by head
    norm_turned: bool = False  # whether they are turned first and normed then
    biases: list[Bias]
    sinks: bool = False  # whether each head has a number that joins its scores in the softmax and adds no value
    gated: bool  # whether an FFN is down(f(gate x) * up x) rather than down(f(up x))
    activation: Activation
    threshold: float = 0.0  # fatrelu gives 0 below it
    normed_neurons: Count = 0  # so many activations are divided by their root mean square before the down product
    attention: list[AttentionKind]
    attention_gated: bool = False  # whether what comes out of attention is multiplied by sigmoid(gate x)
    recurrent: list[Recurrent] = []  # kinds of layers that keep a state of fixed size in place of keys
    layer_kinds: list[Count]  # of each layer: the number of its kind, first those of `attention`, then of `recurrent`
    ropes: Count  # how many rotary tables there are
    attention_scale: Annotated[float, msgspec.Meta(gt=0)]  # the product of a query and a key is multiplied by it
    attention_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # scores become cap * tanh(score / cap); 0: no cap
    embedding_scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    branch_scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # what attention and FFN add to x is multiplied by it
    positions: Count = 0  # how many learned positions are added to the embeddings
    logit_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # as attention_cap, of logits

    def kind(self, layer: int) -> LayerKind:
        kinds: list[LayerKind] = [*self.attention, *self.recurrent]
        return kinds[self.layer_kinds[layer]]

    @property
    def attending(self) -> list[int]:
        """The layers that keep keys and values."""
        return [i for i, kind in enumerate(self.layer_kinds) if kind < len(self.attention)]

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.query_width + 2 * self.kv_width

    @property
    def gate_width(self) -> int:
        """Of what the output of attention is multiplied by: 0 if it is not."""
        return self.query_width if self.attention_gated else 0

    def products(self, layer: int) -> list[LayerProduct]:
        """The products of a layer that every token needs: those that mix tokens, and the shared expert's."""
        shared = self.experts and self.experts.shared
        if not shared:
            return self.mixing(layer)
        return [
            *self.mixing(layer),
            LayerProduct("shared_inputs", (shared.neurons,) * self.inputs, self.hidden),
            LayerProduct("shared_down", (self.hidden,), shared.neurons),
        ]

    def mixing(self, layer: int) -> list[LayerProduct]:
        """The products of attention, or of what a layer has in its place: for its inner values, and last its output.

        The inner values of several products stand one behind the other.
        """
        kind = self.kind(layer)
        if not isinstance(kind, AttentionKind):
            return kind.products(self.hidden)
        gate = (self.gate_width,) if self.gate_width else ()
        return [
            LayerProduct("qkv", (self.query_width, self.kv_width, self.kv_width, *gate), self.hidden),
            LayerProduct("output", (self.hidden,), self.query_width),
        ]

    def product(self, name: str) -> LayerProduct | None:
        """The product called `name`, which is alike in all layers that have it; None if none has."""
        kinds = {kind: layer for layer, kind in enumerate(self.layer_kinds)}
        return next((p for layer in kinds.values() for p in self.products(layer) if p.name == name), None)

    @property
    def groups(self) -> int:
        """Groups in one layer."""
        return self.neurons // self.group_neurons

    @property
    def ffns(self) -> int:
        """How many FFNs a layer has: its experts, or one."""
        return self.experts.count if self.experts else 1

    @property
    def expert_neurons(self) -> int:
        """Neurons of one expert, or of the FFN if there are no experts."""
        return self.neurons // self.ffns

    @property
    def expert_groups(self) -> int:
        """Groups of one expert, or of the FFN if there are no experts."""
        return self.groups // self.ffns

    @property
    def inputs(self) -> int:
        """M, the number of matrices that an FFN multiplies its input by: gate and up, or up alone."""
        return 2 if self.gated else 1

    @property
    def share_width(self) -> int:
        """Width of what a group adds to an FFN's output: H, or H + 1 if activations are normed.

        The last number is then the sum of the squares of activations. The norm's weights are in the groups. Its
        division comes when all groups have been added.
        """
        return self.hidden + bool(self.normed_neurons)

    def norm_vectors(self, place: Place) -> dict[str, int]:
        """The vectors of a norm and their lengths, by name. Empty if there is no such norm."""
        if place not in self.norms:
            return {}
        widths = {"query": self.query_width, "key": self.kv_width, "heads": self.query_width}
        by_head = place in ("query", "key") and self.norm_heads
        width = self.head_dim if by_head else widths.get(place, self.hidden)
        parts = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{place}_norm.{part}": width for part in parts}

    def layer_vectors(self, layer: int) -> dict[str, int]:
        """The vectors of a layer and their lengths, by name, in the order of the layer's `vectors` section."""
        vectors: dict[str, int] = {}
        kind = self.kind(layer)
        attends = isinstance(kind, AttentionKind)
        for place in LAYER_NORMS:
            if attends or place not in OF_ATTENTION:
                vectors |= self.norm_vectors(place)
        if not isinstance(kind, AttentionKind):
            vectors |= kind.vectors(self.hidden)
        if attends and self.sinks:
            vectors["sinks.weight"] = self.heads
        widths = {"qkv": self.qkv_width, "output": self.hidden} if attends else {}
        widths |= {} if self.experts else {"down": self.hidden}
        vectors |= {f"{part}.bias": width for part, width in widths.items() if part in self.biases}
        weighed = self.experts and self.experts.shared and self.experts.shared.weighed
        return vectors | ({"shared_weight.weight": self.hidden} if weighed else {})

    def expert_vectors(self) -> dict[str, int]:
        """The vectors of a layer's experts and their lengths, by name, in the order of its section `experts`.

        The bias of each expert's score, and of each expert's output [E, H]. Empty if the model has none.
        """
        if self.experts is None:
            return {}
        widths = {"router": self.experts.count, "down": self.experts.count * self.hidden}
        return {f"{part}.bias": width for part, width in widths.items() if part in self.biases}

    @property
    def changes_logits(self) -> bool:
        """Whether something follows the head: a cap or a bias."""
        return bool(self.logit_cap) or "head" in self.biases

    def model_vectors(self) -> dict[str, int]:
        """The vectors of what follows the layers, in the order of the section named `vectors` alone."""
        head = {"head.bias": self.vocabulary} if "head" in self.biases else {}
        return self.norm_vectors("final") | head


LAYER_NORMS: tuple[Place, ...] = (
    "attention", "query", "key", "heads", "attention_branch", "ffn", "ffn_branch",
)  # fmt: skip

OF_ATTENTION: frozenset[Place] = frozenset(("query", "key", "heads"))
"""Of these, those that only layers which attend have."""
