"""A model's architecture as the header describes it: sizes and properties, not names of families."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from flashd.bundle.layer_kinds import (
    AttentionKind,
    Bound,
    Count,
    Experts,
    LayerKind,
    LayerProduct,
    LeadingFfn,
    Mixer,
    Positive,
    Recurrent,
    SharedExpert,
    Size,
    Streams,
    TokenInputs,
)

Norm = Literal["rms", "layer"]
Block = Literal["sequential", "parallel", "post"]
Activation = Literal["silu", "clamped_silu", "gelu", "gelu_tanh", "relu", "relu2", "drelu", "fatrelu"]
Place = Literal[
    "attention", "query", "key", "heads", "laurel_branch", "attention_branch", "ffn", "shared_branch", "experts",
    "experts_branch", "ffn_branch", "token_branch", "final",
]  # fmt: skip
Bias = Literal["qkv", "output", "router", "inputs", "down", "head"]


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
    neurons: Size  # of the widest layer's FFN, all its experts together, a multiple of 32 (of each)
    layer_neurons: list[Count] = []  # of each layer's FFN, if not all are as wide; 0: it has none
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
    norm_values: bool = False  # whether values are divided by their root mean square, head by head
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
    ropes: Annotated[int, msgspec.Meta(ge=0, le=1024)]  # how many rotary tables there are
    attention_scale: Annotated[float, msgspec.Meta(gt=0)]  # the product of a query and a key is multiplied by it
    attention_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # scores become cap * tanh(score / cap); 0: no cap
    embedding_scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    branch_scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # what attention and FFN add to x is multiplied by it
    token_inputs: TokenInputs | None = None
    streams: Streams | None = None
    laurel_rank: Count = 0  # of two matrices beside the attention (LAuReL, arXiv 2411.07501), see products; 0: none
    bounds: list[Bound | None] = []  # of each layer's FFN; empty if no layer has one
    layer_scales: bool = False  # whether what leaves a layer is multiplied by numbers of the layer
    positions: Count = 0  # how many learned positions are added to the embeddings
    logit_cap: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # as attention_cap, of logits

    def kind(self, layer: int) -> LayerKind:
        kinds: list[LayerKind] = [*self.attention, *self.recurrent]
        return kinds[self.layer_kinds[layer]]

    def _attention(self, layer: int) -> AttentionKind | None:
        number = self.layer_kinds[layer]
        return self.attention[number] if number < len(self.attention) else None

    def state_kind(self, layer: int) -> Recurrent | None:
        """What a layer has that keeps a state: in place of attention or beside it."""
        attention = self._attention(layer)
        if attention is None:
            return self.recurrent[self.layer_kinds[layer] - len(self.attention)]
        return None if attention.beside is None else self.recurrent[attention.beside]

    @property
    def attending(self) -> list[int]:
        """The layers that attend."""
        return [i for i in range(self.layers) if self._attention(i)]

    @property
    def keeping(self) -> dict[int, AttentionKind]:
        """The layers that keep keys and values, and their kinds."""
        kinds = {i: self._attention(i) for i in range(self.layers)}
        return {i: kind for i, kind in kinds.items() if kind and not kind.borrows}

    def lender(self, layer: int) -> int:
        """The layer whose keys and values a layer that attends looks at, see `has_keys`.

        Its own, or if it borrows, those of the last layer in front of it that is of the same kind but for that.
        """
        return self._lenders(layer)[-1]

    def has_keys(self, layer: int) -> bool:
        """Whether there are keys that a layer that attends can look at."""
        return bool(self._lenders(layer))

    def _lenders(self, layer: int) -> list[int]:
        kind = self._attention(layer)
        if kind is None or not kind.borrows:
            return [layer]
        own = self.layer_kinds_of(msgspec.structs.replace(kind, borrows=False))
        return [i for i in range(layer) if self.layer_kinds[i] in own]

    def layer_kinds_of(self, kind: AttentionKind) -> list[int]:
        """The numbers that a kind of attention has in `layer_kinds`."""
        return [number for number, each in enumerate(self.attention) if each == kind]

    def head_dim_of(self, kind: AttentionKind) -> int:
        """D, numbers of a key, or of what is kept in its place."""
        return kind.latent.row if kind.latent else kind.head_dim or self.head_dim

    def turned_of(self, kind: AttentionKind) -> int:
        """Numbers of a key that its rotary table has angles for; that of some may be 0."""
        return kind.latent.turned if kind.latent else self.head_dim_of(kind)

    def kv_heads_of(self, kind: AttentionKind) -> int:
        return 1 if kind.latent else kind.kv_heads or self.kv_heads

    def query_width(self, kind: AttentionKind) -> int:
        return self.heads * (kind.latent.values if kind.latent else self.head_dim_of(kind))

    def kv_width(self, kind: AttentionKind) -> int:
        return self.kv_heads_of(kind) * self.head_dim_of(kind)

    def qkv_widths(self, kind: AttentionKind) -> tuple[int, ...]:
        """Of queries, keys and values, as far as a layer makes them itself; or of what its first product makes."""
        if kind.latent:
            return kind.latent.products(self.hidden, self.heads)[0].parts
        kept = () if kind.borrows else (self.kv_width(kind),) * (1 + kind.values)
        return (self.query_width(kind), *kept)

    def gate_width(self, kind: AttentionKind) -> int:
        """Of what the output of attention is multiplied by: 0 if it is not."""
        return self.query_width(kind) if self.attention_gated else 0

    @property
    def rope_widths(self) -> list[int]:
        """D of the heads that each rotary table turns, or what is turned of them."""
        turned = {kind.rope: self.turned_of(kind) for kind in reversed(self.attention)}
        return [turned.get(table, self.head_dim) for table in range(self.ropes)]

    @property
    def token_width(self) -> int:
        """Numbers of a token's row of the table of token inputs, L P. 0: there is none."""
        return self.layers * self.token_inputs.width if self.token_inputs else 0

    def products(self, layer: int) -> list[LayerProduct]:
        """The products of a layer that every token needs: those that mix tokens, and the shared expert's."""
        products, shared, bound = self.mixing(layer), self.shared_expert(layer), self.bound(layer)
        if shared:
            products.append(LayerProduct("shared_inputs", (shared.neurons,) * self.inputs, self.hidden))
            products.append(LayerProduct("shared_down", (self.hidden,), shared.neurons))
        if self.laurel_rank:  # (x + attention + h + n(right left h)) / sqrt(2) is what the FFN adds to
            products.append(LayerProduct("laurel_left", (self.laurel_rank,), self.hidden))
            products.append(LayerProduct("laurel_right", (self.hidden,), self.laurel_rank))
        if bound:  # the FFN's gates once more
            products.append(LayerProduct("bound", (bound.neurons,), self.hidden))
        return products

    def bound(self, layer: int) -> Bound | None:
        return self.bounds[layer] if self.bounds else None

    def mixing(self, layer: int) -> list[LayerProduct]:
        """The products of all that mixes tokens in a layer."""
        return [product for mixer in self.mixers(layer) for product in mixer.products]

    def mixers(self, layer: int) -> list[Mixer]:
        """What mixes tokens in a layer: attention, what is in its place, or both. Their outputs are added."""
        attention, state = self._attention(layer), self.state_kind(layer)
        out = [self._attention_mixer(attention)] if attention else []
        if state:
            *inner, output = state.products(self.hidden)
            out.append(Mixer(state, inner, output))
        return out

    def _attention_mixer(self, kind: AttentionKind) -> Mixer:
        gate = (self.gate_width(kind),) if self.attention_gated else ()
        qkv = LayerProduct("qkv", (*self.qkv_widths(kind), *gate), self.hidden)
        inner = kind.latent.products(self.hidden, self.heads) if kind.latent else [qkv]
        return Mixer(kind, inner, LayerProduct("output", (self.hidden,), self.query_width(kind)))

    def products_behind(self) -> list[LayerProduct]:
        """The products of each layer behind its FFN: what its token input is gated by, and what makes its output."""
        if self.token_inputs is None:
            return []
        width = self.token_inputs.width
        out = LayerProduct("token_out", (self.hidden,), width)
        return [LayerProduct("token_gate", (width,), self.hidden), out]

    @property
    def paged_layers(self) -> range:
        """The layers that have a section of groups: all, or in a mixture those that have experts."""
        return range(self.experts.first if self.experts else 0, self.layers)

    def shared_expert(self, layer: int) -> SharedExpert | None:
        """The expert of a layer that every token uses beside those that it chooses."""
        return self.experts.shared if self.experts and layer in self.paged_layers else None

    def leading_ffn(self, layer: int) -> LeadingFfn | None:
        """What a layer has in place of experts, if it is one of the first of a mixture."""
        return self.experts.leading if self.experts and layer < self.experts.first else None

    def of_leading(self, ffn: LeadingFfn) -> Architecture:
        """A plain model whose layers all have an FFN like `ffn`."""
        return msgspec.structs.replace(self, experts=None, neurons=ffn.neurons, group_neurons=ffn.group_neurons)

    @property
    def groups(self) -> int:
        """Groups in one layer, the widest."""
        return self.neurons // self.group_neurons

    def neurons_of(self, layer: int) -> int:
        """Neurons of a layer's FFN, all its experts together."""
        return self.layer_neurons[layer] if self.layer_neurons else self.neurons

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """Groups in each layer."""
        return tuple(self.neurons_of(i) // self.group_neurons for i in range(self.layers))

    @property
    def paged_groups(self) -> tuple[int, ...]:
        """Those of each of `paged_layers`."""
        return self.layer_groups[self.paged_layers.start :]

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

    @property
    def stream_width(self) -> int:
        """Width of x between layers: H, or S H."""
        return self.hidden * (self.streams.count if self.streams else 1)

    @property
    def normed_together(self) -> bool:
        """Whether the sum of the shared expert's output and the others' is normed."""
        return bool(self.experts and self.experts.shared) and "ffn_branch" in self.norms

    @property
    def carried_width(self) -> int:
        """Width of what goes past an FFN: what it adds to, and what is behind that.

        That is the output of the shared expert, if the sum is normed, or the predicted states.
        """
        return self.hidden * (2 if self.normed_together else 1) + (self.stream_width if self.streams else 0)

    @property
    def ffn_input_width(self) -> int:
        """Width of what an FFN is given: H, and what is behind that.

        That are H numbers if its router takes something of its own, or the bound of its gates and the least that is
        left of them.
        """
        routed = self.experts and self.experts.router_scaled
        return self.group_input_width + (self.hidden if routed else 0)

    @property
    def group_input_width(self) -> int:
        """Of that, what its groups take."""
        return self.hidden + (2 if self.bounds else 0)

    def norm_vectors(self, place: Place, kind: AttentionKind | None = None) -> dict[str, int]:
        """The vectors of a norm: their names and lengths. Empty if the model has no norm at this place.

        `kind`: of the layer, if the norm is of its attention.
        """
        if place not in self.norms or (place == "key" and kind and kind.borrows):
            return {}
        width = self.hidden
        if kind and place in OF_ATTENTION:
            widths = {"key": self.kv_width(kind)}
            by_head = place in ("query", "key") and self.norm_heads
            width = self.head_dim_of(kind) if by_head else widths.get(place, self.query_width(kind))
        parts = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{place}_norm.{part}": width for part in parts}

    def layer_vectors(self, layer: int) -> dict[str, int]:
        """The vectors of a layer and their lengths, by name, in the order of the layer's `vectors` section."""
        vectors: dict[str, int] = {}
        attention, state = self._attention(layer), self.state_kind(layer)
        for place in LAYER_NORMS:
            if attention or place not in OF_ATTENTION:
                vectors |= self.norm_vectors(place, attention)
        vectors |= state.vectors(self.hidden) if state else {}
        vectors |= attention.latent.vectors() if attention and attention.latent else {}
        if attention and self.sinks:
            vectors["sinks.weight"] = self.heads
        widths = {"qkv": sum(self.qkv_widths(attention)), "output": self.hidden} if attention else {}
        widths |= {} if self.experts else {"down": self.hidden}
        vectors |= {f"{part}.bias": width for part, width in widths.items() if part in self.biases}
        shared = self.shared_expert(layer)
        vectors |= {"shared_weight.weight": self.hidden} if shared and shared.weighed else {}
        vectors |= {"router_scale.weight": self.hidden} if self.experts and self.experts.router_scaled else {}
        vectors |= self.stream_vectors()
        return vectors | ({"scale.weight": self.hidden} if self.layer_scales else {})

    def stream_vectors(self) -> dict[str, int]:
        """Those of a layer's states: the norm, the router [S, H], the matrices [S S, S] and [S, S], and the scale."""
        if self.streams is None:
            return {}
        h, s = self.hidden, self.streams.count
        return {
            "stream_norm.weight": h, "stream_router.weight": s * h, "stream_predict.weight": s**3,
            "stream_correct.weight": s**2, "stream_scale.weight": h,
        }  # fmt: skip

    def expert_vectors(self) -> dict[str, int]:
        """The vectors of a layer's experts and their lengths, by name, in the order of its section `experts`.

        The bias of each expert's score, what is added to it only to choose, the place on the card of each expert of
        the file if groups of them are chosen, what its weight is multiplied by, and the bias of each expert's output
        [E, H]. Empty if the model has none of these.
        """
        if self.experts is None:
            return {}
        count, biases = self.experts.count, self.biases
        vectors = {"router.bias": count} if "router" in biases else {}
        vectors |= {"choice.bias": count} if self.experts.leaned else {}
        vectors |= {"places": count} if self.experts.groups else {}
        vectors |= {"down.scale": count} if self.experts.weights_scaled else {}
        return vectors | ({"down.bias": count * self.hidden} if "down" in biases else {})

    @property
    def changes_logits(self) -> bool:
        """Whether something follows the head: a cap or a bias."""
        return bool(self.logit_cap) or "head" in self.biases

    def model_vectors(self) -> dict[str, int]:
        """The vectors of what follows the layers, in the order of the section named `vectors` alone."""
        head = {"head.bias": self.vocabulary} if "head" in self.biases else {}
        inputs = {"token_norm.weight": self.token_inputs.width} if self.token_inputs else {}
        return self.norm_vectors("final") | head | inputs


LAYER_NORMS: tuple[Place, ...] = (
    "attention", "query", "key", "heads", "laurel_branch", "attention_branch", "ffn", "shared_branch", "experts",
    "experts_branch", "ffn_branch", "token_branch",
)  # fmt: skip

OF_EXPERTS: frozenset[Place] = frozenset(("shared_branch", "experts", "experts_branch"))
"""Of these, those that stand between the experts that a token chooses and the one that all use."""

OF_ATTENTION: frozenset[Place] = frozenset(("query", "key", "heads"))
"""Of these, those that only layers which attend have."""
