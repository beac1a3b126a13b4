"""A model by its properties: what the header says of the architecture."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


Norm = Literal["rms", "layer"]
Block = Literal["sequential", "parallel", "post"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "drelu", "fatrelu"]
Place = Literal["attention", "query", "key", "heads", "attention_branch", "ffn", "ffn_branch", "final"]
Bias = Literal["qkv", "output", "inputs", "down", "head"]
Scores = Literal["softmax", "sigmoid"]


class AttentionKind(msgspec.Struct, frozen=True, kw_only=True):
    """How the layers of one kind attend; each kind has a graph of its own."""

    window: Count = 0  # tokens that one sees, itself included; 0: all
    rope: Count | None = None  # the table that turns queries and keys; None: they are not turned


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """An FFN that is a mixture: a token takes the share of those experts alone that its router scores highest."""

    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # E, each of neurons / E neurons, one behind the other
    used: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # by a token
    scores: Scores  # of the router's products, over all experts or each by itself
    normalised: bool  # the scores of those used are divided by their sum
    scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # and multiplied by this
    early: bool = False  # the router takes the layer's input as it is, not what the FFN takes


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to know of an architecture: sizes and properties, from which its graphs are built.

    With f a layer's attention or its FFN, and n a norm where there is one, a block is

        sequential   x + n(f(n(x))), first the attention, then the FFN
        parallel     x + n(attention(n(x))) + n(ffn(n(x))); where the FFN has no norm it takes the attention's
        post         n(x + f(x)), first the attention, then the FFN
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
    norm: Norm  # x / rms(x) * weight, or (x - mean) / deviation * weight + bias
    norm_epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    norm_bias: bool
    norms: list[Place]
    norm_heads: bool  # queries and keys are normed a head at a time
    biases: list[Bias]
    gated: bool  # down(f(gate x) * up x), or down(f(up x))
    activation: Activation
    threshold: float = 0.0  # below which fatrelu gives 0
    normed_neurons: Count = 0  # whose activations are divided by their root mean square before the down product
    attention: list[AttentionKind]
    layer_kinds: list[Count]  # of each layer, its number in `attention`
    ropes: Count  # tables
    attention_scale: Annotated[float, msgspec.Meta(gt=0)]  # of a query's product with a key
    attention_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # scores become cap * tanh(score / cap)
    embedding_scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    positions: Count = 0  # learned ones, added to the embeddings
    logit_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0

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
    def groups(self) -> int:
        """Groups in one layer."""
        return self.neurons // self.group_neurons

    @property
    def ffns(self) -> int:
        """FFNs of a layer: its experts, or one."""
        return self.experts.count if self.experts else 1

    @property
    def expert_neurons(self) -> int:
        """Neurons of one of them."""
        return self.neurons // self.ffns

    @property
    def expert_groups(self) -> int:
        """Groups of one of them."""
        return self.groups // self.ffns

    @property
    def inputs(self) -> int:
        """M, the matrices that an FFN multiplies its input by."""
        return 2 if self.gated else 1

    @property
    def share_width(self) -> int:
        """Width of what a group adds to an FFN's output: H, and the sum of its squares where activations are normed.

        The weights of that norm are in the columns of down_proj; what divides them all can wait for the last group.
        """
        return self.hidden + bool(self.normed_neurons)

    def norm_vectors(self, place: Place) -> dict[str, int]:
        """The vectors of a norm and their lengths; none where there is no such norm."""
        if place not in self.norms:
            return {}
        widths = {"query": self.query_width, "key": self.kv_width, "heads": self.query_width}
        by_head = place in ("query", "key") and self.norm_heads
        width = self.head_dim if by_head else widths.get(place, self.hidden)
        parts = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{place}_norm.{part}": width for part in parts}

    def layer_vectors(self) -> dict[str, int]:
        """The vectors of a layer and their lengths, in the order in which its `vectors` section has them."""
        vectors: dict[str, int] = {}
        for place in LAYER_NORMS:
            vectors |= self.norm_vectors(place)
        widths = {"qkv": self.qkv_width, "output": self.hidden, "down": self.hidden}
        return vectors | {f"{part}.bias": width for part, width in widths.items() if part in self.biases}

    def model_vectors(self) -> dict[str, int]:
        """The same for what follows the layers, and the `vectors` section that is no layer's."""
        head = {"head.bias": self.vocabulary} if "head" in self.biases else {}
        return self.norm_vectors("final") | head


LAYER_NORMS: tuple[Place, ...] = (
    "attention", "query", "key", "heads", "attention_branch", "ffn", "ffn_branch",
)  # fmt: skip
