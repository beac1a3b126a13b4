"""The kinds of layers that a model may have, what they have in place of an FFN or beside it, and their products."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

from flashd.bundle.rows.kinds import BLOCK

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Latent(msgspec.Struct, frozen=True, kw_only=True):
    """Keys and values of all heads that are kept as one row of a token (multi-head latent attention, DeepSeek-V2).

    A product makes of each token its queries, c and r; c is normed, and r is turned. The cache keeps c and r. With a
    head's matrices K [unturned, rank] and V [values, rank], its key is K c and r, and its value V c. Since
    q (K c) = (q K) c, the heads look at c itself, and V multiplies what they have seen of it (arXiv 2405.04434,
    section 2.1).
    """

    rank: Annotated[int, msgspec.Meta(ge=32, le=1 << 14, multiple_of=32)]  # of c
    turned: Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=8)]  # of r, and of a head's query
    unturned: Annotated[int, msgspec.Meta(ge=32, le=4096, multiple_of=32)]  # of a head's query beside it
    values: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # of what a head puts out
    query_rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 14, multiple_of=32)] = 0
    """Queries are made of a normed product of so many numbers. 0: they are made of the layer's input."""

    @property
    def row(self) -> int:
        """Numbers that the cache keeps of a token."""
        return self.rank + self.turned

    def query_widths(self, heads: int) -> tuple[int, int]:
        """Of the queries of all heads: what is not turned, then what is."""
        return heads * self.unturned, heads * self.turned

    def products(self, hidden: int, heads: int) -> list[LayerProduct]:
        """All but that of the output."""
        queries = sum(self.query_widths(heads))
        up = [LayerProduct("latent_query", (queries,), self.query_rank, inner=True)] * bool(self.query_rank)
        return [
            LayerProduct("latent_in", (self.query_rank or queries, self.row), hidden),
            *up,
            LayerProduct("latent_key", (heads * self.rank,), self.unturned, inner=True, heads=heads),
            LayerProduct("latent_value", (heads * self.values,), self.rank, inner=True, heads=heads),
        ]

    def vectors(self) -> dict[str, int]:
        of_queries = {"query_latent_norm.weight": self.query_rank} if self.query_rank else {}
        return of_queries | {"latent_norm.weight": self.rank}


class AttentionKind(msgspec.Struct, frozen=True, kw_only=True):
    """How the layers of one kind attend. Each kind has a graph of its own."""

    window: Count = 0  # how many tokens a token attends to, itself included; 0: all
    rope: Count | None = None  # the number of the table that turns queries and keys; None: they are not turned
    head_dim: Annotated[int, msgspec.Meta(ge=0, le=4096, multiple_of=8)] = 0  # D; 0: the model's
    kv_heads: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0  # 0: the model's
    values: bool = True  # whether values have a product of their own, and are not what that of the keys makes
    borrows: bool = False  # keys and values are those of an earlier layer, see Architecture.lender
    beside: Count | None = None  # the number in Architecture.recurrent of what adds its output to that of attention
    latent: Latent | None = None  # what is kept in place of the keys and values of each head

    @property
    def kept(self) -> int:
        """Rows that the cache keeps of a token for each head of keys: a key and a value, or what stands for both."""
        return 1 if self.latent else 2


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

    def convolved_width(self, hidden: int) -> int:
        return hidden

    def row_width(self, hidden: int) -> int:
        """Of what a token adds to the state: its b x."""
        return hidden

    @property
    def sums(self) -> None:
        """It has no sum over all tokens."""

    @property
    def fits(self) -> bool:
        return True


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

    def convolved_width(self, hidden: int) -> int:  # noqa: ARG002
        return self.mixed_width

    def row_width(self, hidden: int) -> int:  # noqa: ARG002
        """Of what a token adds to the state: queries, keys, values, beta and alpha, as the products make them."""
        return self.mixed_width + 2 * self.value_heads

    @property
    def sums(self) -> tuple[int, int, int]:
        """(heads, key dim, value dim) of the sum over all tokens, S of each head."""
        return self.value_heads, self.key_dim, self.value_dim

    @property
    def fits(self) -> bool:
        """Whether the heads fit together."""
        return self.value_heads % self.key_heads == 0 and self.values_width % BLOCK == 0


class Mamba2(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="mamba_2"):
    """A layer that has a Mamba-2 mixer in place of attention (arXiv 2405.21060, section 7).

    Products make z, x, B, C and one number a head, r, of each token. x, B and C go through a causal convolution with
    a bias, channel by channel, and SiLU. Heads in a row, those of a group, share B and C. Then, for each head, with
    its matrix S [state, head dim], which is zero in front of the text:

        dt = softplus(r + bias);    S = exp(decay * dt) S + dt B x;    y = C S + skip x

    The output is the norm of y SiLU(z), group by group, or y SiLU(z) itself. The layer keeps no keys: its state is S,
    and the last `taps - 1` values of what goes into the convolution.
    """

    taps: Annotated[int, msgspec.Meta(ge=2, le=64)]  # tokens that a token's convolution takes in, itself included
    groups: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    heads: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # a multiple of groups
    state: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # of B and C of a group
    head_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # of x and z of a head
    normed: bool = True  # whether y SiLU(z) is normed

    @property
    def width(self) -> int:
        """Of x and z."""
        return self.heads * self.head_dim

    @property
    def shared_width(self) -> int:
        """Of B and C."""
        return self.groups * self.state

    @property
    def mixed_width(self) -> int:
        """Of what is convolved: x, B and C."""
        return self.width + 2 * self.shared_width

    def products(self, hidden: int) -> list[LayerProduct]:
        return [
            LayerProduct("mamba_in", (self.width, self.mixed_width), hidden),  # z first
            LayerProduct("mamba_rates", (self.heads,), hidden, fine=True),
            LayerProduct("mamba_out", (hidden,), self.width),
        ]

    def vectors(self, hidden: int) -> dict[str, int]:  # noqa: ARG002
        of_heads = {"decay": self.heads, "skip": self.heads, "dt.bias": self.heads}
        convolution = {f"conv.{tap}": self.mixed_width for tap in range(self.taps)}
        norm = {"mamba_norm.weight": self.width} if self.normed else {}
        return convolution | {"mamba_conv.bias": self.mixed_width} | of_heads | norm

    def convolved_width(self, hidden: int) -> int:  # noqa: ARG002
        return self.mixed_width

    def row_width(self, hidden: int) -> int:  # noqa: ARG002
        """Of what a token adds to the state: x, B, C and r, as the products make them."""
        return self.mixed_width + self.heads

    @property
    def sums(self) -> tuple[int, int, int]:
        """(heads, state, head dim) of the sum over all tokens, S of each head."""
        return self.heads, self.state, self.head_dim

    @property
    def fits(self) -> bool:
        """Whether the heads fit together."""
        return self.heads % self.groups == 0 and self.width % BLOCK == 0


Recurrent = ShortConvolution | GatedDeltaNet | Mamba2
"""Kinds of layers that keep a state of fixed size in place of keys."""

LayerKind = AttentionKind | Recurrent


Scores = Literal["softmax", "sigmoid", "sparsemixer"]


class SharedExpert(msgspec.Struct, frozen=True, kw_only=True):
    """An expert that every token uses. So its rows are not paged: they are multiplied behind the attention.

    If the model norms the FFN's output (`ffn_branch`), that is the sum of this one's output and the others'. There
    may be norms of each of the two (`shared_branch`, `experts_branch`), and of what the others take (`experts`).
    """

    neurons: Size  # a multiple of 32
    weighed: bool  # whether its output is multiplied by sigmoid(w h), h the FFN's input


class LeadingFfn(msgspec.Struct, frozen=True, kw_only=True):
    """The FFN of a mixture's first layers, which have no experts. Every token uses it, so it stays in RAM."""

    neurons: Size  # a multiple of group_neurons
    group_neurons: Size

    @property
    def groups(self) -> int:
        return self.neurons // self.group_neurons


class ExpertGroups(msgspec.Struct, frozen=True, kw_only=True):
    """Groups of experts that followed each other in the model's file, all equally large (DeepSeek-V2 and later)."""

    count: Annotated[int, msgspec.Meta(ge=2, le=4096)]
    used: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # groups that a token chooses its experts from
    best: Annotated[int, msgspec.Meta(ge=1, le=2)]  # a group's score is the sum of that many of its highest


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts: a token uses only those experts of a layer that the router scores highest.

    SparseMixer (arXiv 2310.00811, 2409.12136) weighs each expert by a softmax over itself and those below it, less
    those that are further below than `margin` times the larger of its score and the size of theirs.
    """

    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # E; each expert has neurons / E consecutive neurons
    used: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # experts that a token uses
    scores: Scores  # what is made of the router's products: a softmax over all experts, a sigmoid of each, or below
    margin: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    normalised: bool  # whether the scores of the experts used are divided by their sum
    scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0  # the scores are multiplied by this
    early: bool = False  # whether the router takes the layer's input rather than the FFN's
    shared: SharedExpert | None = None  # one that every token uses beside them
    leaned: bool = False  # whether experts are chosen by their scores and a bias, which their weights do not have
    groups: ExpertGroups | None = None  # a token uses only experts of its best groups
    router_scaled: bool = False  # whether the router takes x / rms(x), times numbers, x being what the FFN adds to
    weights_scaled: bool = False  # whether the weights are multiplied by a number of the expert
    first: Count = 0  # the layers before this one have no experts
    leading: LeadingFfn | None = None  # what these have


class Streams(msgspec.Struct, frozen=True, kw_only=True):
    """Several hidden states of a token side by side. A layer computes with the first (AltUp, arXiv 2301.13310).

    Let x be a token's S states [S, H], n a norm, and m(y) = tanh(router n(y)), S numbers. A layer first predicts
    p = x + P x, with P [S, S] made of m(x[0]) by a matrix [S S, S]. Its attention and its FFN make y of p[0]. Then
    x[i] = p[i] + (y - p[0]) (1 + c[i]), with c made of m(y) by a matrix [S, S]. What a token says to the layer is
    gated by x[0], times a vector, and added to all states but the first.

    In front of the layers, states are made of the embedding by a product each, and behind them products make what
    they have in common: all of these are made as long as the first state, and their mean is the output.
    """

    count: Annotated[int, msgspec.Meta(ge=2, le=16)]  # S


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """An FFN whose gates count by how far they exceed a bound: max(0, gate x - bound) goes into the activation.

    The bound of a token is the mean of the products of all gates, plus some standard deviations.
    """

    neurons: Size  # of the layer's FFN, without those that fill the last group
    deviations: Annotated[float, msgspec.Meta(ge=-8, le=8)]


class TokenInputs(msgspec.Struct, frozen=True, kw_only=True):
    """What a token says to each layer beside its embedding (Gemma 3n and 4, per-layer embeddings).

    Let e be the token's embedding and t its row of a table, which has P numbers for each layer. A layer's input is
    `(norm(projection e * projected) + t * scale) * both`, with a norm of each P numbers. Behind its FFN the layer
    adds `n(out(f(gate x) * input))` to x, with the FFN's activation f.
    """

    width: Annotated[int, msgspec.Meta(ge=32, le=1 << 16, multiple_of=32)]  # P
    scale: Annotated[float, msgspec.Meta(gt=0)]
    projected: Annotated[float, msgspec.Meta(gt=0)]
    both: Annotated[float, msgspec.Meta(gt=0)]


class Mixer(NamedTuple):
    """What mixes tokens in a layer: attention, or what has a state in its place or beside it."""

    kind: LayerKind
    inner: list[LayerProduct]  # make its inner values, which stand one behind the other
    output: LayerProduct

    @property
    def products(self) -> list[LayerProduct]:
        return [*self.inner, self.output]


class LayerProduct(NamedTuple):
    """A product with a large matrix that a layer has beside its FFN. `name` is that of the layer's section."""

    name: str
    parts: tuple[int, ...]  # rows of each matrix that it is made of, one behind the other
    width: int  # K, of a row
    fine: bool = False  # whether its rows are few and have 16 bits in any case
    inner: bool = False  # whether it takes what another one made, and not the layer's input
    heads: int = 1  # so many equal parts of its rows multiply as many inputs, one behind the other

    @property
    def rows(self) -> int:
        return sum(self.parts)

    @property
    def weights(self) -> int:
        return self.rows * self.width
