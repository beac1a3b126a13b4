"""What a model family is: how it differs from Llama, in a GGUF file and in a Hugging Face folder.

Names of tensors and keys are GGUF's. What a file may or may not have (biases, norms of queries and keys, one
tensor for queries, keys and values) is read from the file; the family says what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flashd.bundle.architecture import Activation, Bias, Block, Norm, Place
from flashd.bundle.layer_kinds import Scores
from flashd.bundle.rows.kinds import Floats

Config = Mapping[str, Any]
"""What a folder's config.json says."""

Adapt = Callable[[Config, Path], Config]
"""Puts a configuration into the common words. Raises DataError, naming the path, for what is not supported."""

Order = Callable[[Config, str], npt.NDArray[np.int64] | None]
"""(what the folder says, GGUF's name of a part of a layer) -> for each of GGUF's rows or columns of it the folder's;
None if they agree. Raises ValueError if what the folder says makes no sense."""


Factor = Callable[[Config, str], Floats | None]
"""(what the folder says, GGUF's name of a part) -> what the folder's numbers are multiplied by to be GGUF's: [1, 1],
or [rows, 1], one for each of GGUF's rows; None if they agree."""


def in_order(config: Config, part: str) -> None:
    """Rows and columns, or numbers, agree."""


def as_it_is(config: Config, path: Path) -> Config:  # noqa: ARG001
    """Nothing is to be adapted."""
    return config


@dataclass(frozen=True)
class Mixture:
    """How a family's router weighs the experts that a token uses, if the file does not say."""

    normalised: bool = True
    early: bool = False
    shared: bool = False  # every token uses one more expert
    weighed: bool = False  # and that one's output is weighed
    leaned: bool = False  # the file has a bias of scores that only chooses
    leading: bool = False  # the first layers may have an FFN in place of experts, as many as the file says
    dense: bool = False  # the expert that every token uses is called and counted as the FFN of a plain layer is
    norms: tuple[Place, ...] = ()  # that there are beside the family's
    scaled: bool = False  # the file has numbers that scale what the router takes, and the experts' weights
    grouped: bool = False  # the file may say that a token uses only experts of its best groups
    scores: Scores = "softmax"
    best: int = (
        0  # a group's score is the sum of so many of its experts'; 0: of one if scores are a softmax, else of 2
    )


@dataclass(frozen=True)
class DeltaNets:
    """How a family keeps its gated delta nets."""

    tiled: bool = False  # see bundle.architecture.GatedDeltaNet
    joined_rates: bool = False  # one tensor has beta and alpha, those of all heads that share a key together


@dataclass(frozen=True)
class Folder:
    """How the Hugging Face folders of one `model_type` become what a GGUF file holds; the defaults change nothing."""

    model_type: str
    seeing: tuple[str, ...] = ()  # types of models that also see; their `text_config` is of this type
    permuted: bool = False  # GGUF has the rows of q and k in rotary pairs (2i, 2i + 1), the folder in halves
    fused: bool = False  # the folder has q, k and v by group of heads in one matrix, GGUF one after the other
    shift: float = 0.0  # GGUF has the weights of norms with this added
    unshifted: tuple[str, ...] = ()  # and not of these
    changed: Mapping[str, Callable[[Floats], Floats]] = field(default_factory=dict)  # parts that GGUF has otherwise
    rows: Order = in_order
    columns: Order = in_order
    weighed: Factor = in_order
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensors whose rows are several of GGUF's
    plain: Folder | None = None  # how models of this type that have no experts are read
    left_out: Mapping[str, str] = field(default_factory=dict)  # what is not packed, by the beginnings of names
    tensors: Mapping[str, str] = field(default_factory=dict)  # names that the gguf package does not know
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stacks that hold several of GGUF's, by rows
    alternating: bool = False  # the rows of these lie in turn, and not one matrix's behind the other's
    across: bool = False  # and each matrix of these is [K, R], its rows are columns
    keys: Mapping[str, str] = field(default_factory=dict)  # GGUF's key -> config.json's, beside the common ones
    defaults: Config = field(default_factory=dict)  # what transformers takes if config.json leaves it out
    activations: Mapping[str, str] = field(default_factory=dict)  # that config.json calls by another's name
    adapt: Adapt = as_it_is


@dataclass(frozen=True)
class Family:
    """What differs from one architecture to the next; the defaults are Llama's."""

    architecture: str  # GGUF's general.architecture
    models: str  # what people call them
    checked: str  # the weights on which answers were compared with a reference; tiny: random ones, of tests/goldens
    folders: tuple[Folder, ...] = ()
    block: Block = "sequential"
    norm: Norm = "rms"
    other_epsilon: bool = False  # the file calls its epsilon as that of the other norm
    norms: tuple[Place, ...] = ("attention", "ffn", "final")
    norm_turned: bool = False  # queries and keys are normed when they have been turned
    biases: tuple[Bias, ...] = ()
    may_have: tuple[Place | Bias, ...] = ()  # norms and biases that some models of the family have
    gated: bool = True
    joined_inputs: bool = False  # GGUF has the gate's rows and behind them the up rows in one tensor
    joined_experts: bool = False  # and of experts
    activation: Activation = "silu"
    permuted: bool = False  # GGUF keeps llama's q and k rows in rotary pairs (2i, 2i + 1) and others' in halves
    rotary: bool = True
    may_turn: bool = False  # whether the file says that queries and keys are not turned
    sinks: bool = False  # each head has a number that joins its scores in the softmax and adds no value
    norm_values: bool = False  # values are divided by their root mean square, head by head
    attention_scale: float = 0.0  # the product of a query and a key is multiplied by it; 0: by 1 / root of D
    sized_heads: bool = False  # layers that see a window may have heads of another size, and another number of keys
    borrows: bool = False  # the last layers, as many as the file says, look at keys and values of earlier ones
    sized_ffns: bool = False  # layers may have FFNs of different widths
    halves: bool = False  # the file counts FFNs as layers of their own, see families.halves
    token_inputs: bool = False  # a table may have, for each token, numbers for each layer
    streams: bool = False  # a token has several states, as many as the file says
    bounded: bool = False  # gates of some layers have a bound, see architecture.Bound
    layer_scales: bool = False  # what leaves a layer may be multiplied by a number of the layer
    latent: bool = False  # heads look at one short row of a token (multi-head latent attention)
    convolves: bool = False  # layers that the file gives no heads of keys have a short convolution in their place
    delta_nets: DeltaNets | None = None  # that most layers have in place of attention
    mamba: Literal["instead", "beside"] | None = None  # Mamba-2 mixers, in layers without heads of keys or in all
    attention_gated: bool = False  # the rows of each head's query are followed by those of its output's gate
    unturned_every: int = 0  # each so manyth layer does not turn queries and keys
    global_every: int = 0  # each so manyth layer sees all tokens, the others a window
    global_first: bool = False  # and of each so many it is the first
    global_unturned: bool = False  # if others see a window, those that see all tokens do not turn queries and keys
    local_base: float = 0.0  # the rotary base of layers that see a window, if it is another one
    yarn_truncated: bool = True  # YaRN's bounds are whole numbers of pairs, if the file does not say
    local_unscaled: bool = False  # layers that see a window turn as if texts were short, whatever the others do
    scaled_embeddings: bool = False  # by the root of the hidden size
    scale_by_width: tuple[int, ...] = ()  # models of so many layers scale queries by hidden size / heads
    norms_neurons: bool = False  # activations are normed before the down product
    mixture: Mixture | None = None  # of experts, if the file counts some
    position_offset: int = 0  # rows of the table of learned positions that stand for nothing
    reads: tuple[str, ...] = ()  # keys that mean something in this family alone
    names: Mapping[str, str] = field(default_factory=dict)  # tensors that are called otherwise than in TENSORS
    variant: tuple[str, Family] | None = None  # a tensor that tells models of another table, and that table


TENSORS = {
    "attention_norm": "attn_norm",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "heads_norm": "attn_sub_norm",
    "neurons_norm": "ffn_sub_norm",
    "laurel_branch_norm": "laurel_post_norm",
    "laurel_left": "laurel_l",
    "laurel_right": "laurel_r",
    "stream_projection": "altup_proj",
    "stream_out": "altup_unembd_proj",
    "stream_norm": "altup_router_norm",
    "stream_router": "altup_router",
    "stream_predict": "altup_predict_coef",
    "stream_correct": "altup_correct_coef",
    "stream_scale": "altup_correct_scale",
    "attention_branch_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "shared_branch_norm": "post_ffw_norm_1",
    "experts_norm": "pre_ffw_norm_2",
    "experts_branch_norm": "post_ffw_norm_2",
    "ffn_branch_norm": "post_ffw_norm",
    "token_branch_norm": "post_norm",
    "token_inputs": "per_layer_token_embd",
    "token_projection": "per_layer_model_proj",
    "token_norm": "per_layer_proj_norm",
    "token_gate": "inp_gate",
    "token_out": "proj",
    "scale": "layer_output_scale",
    "final_norm": "output_norm",
    "qkv": "attn_qkv",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "query_down": "attn_q_a",
    "query_up": "attn_q_b",
    "query_latent_norm": "attn_q_a_norm",
    "latent_down": "attn_kv_a_mqa",
    "latent_norm": "attn_kv_a_norm",
    "key_up": "attn_k_b",
    "value_up": "attn_v_b",
    "both_up": "attn_kv_b",
    "sinks": "attn_sinks",
    "gate": "ffn_gate",
    "inputs": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
    "shared_gate": "ffn_gate_shexp",
    "shared_up": "ffn_up_shexp",
    "shared_down": "ffn_down_shexp",
    "shared_weight": "ffn_gate_inp_shexp",
    "choice": "exp_probs_b",
    "in_proj": "shortconv.in_proj",
    "out_proj": "shortconv.out_proj",
    "conv": "shortconv.conv",
    "z": "attn_gate",
    "mixed": "attn_qkv",
    "beta": "ssm_beta",
    "alpha": "ssm_alpha",
    "rates": "ssm_ba",
    "delta_out": "ssm_out",
    "delta_conv": "ssm_conv1d",
    "delta_norm": "ssm_norm",
    "mamba_in": "ssm_in",
    "mamba_rates": "ssm_in",
    "mamba_out": "ssm_out",
    "mamba_conv": "ssm_conv1d",
    "mamba_norm": "ssm_norm",
    "skip": "ssm_d",
    "decay": "ssm_a",
    "dt": "ssm_dt",
    "head": "output",
}
"""What most files call a part of the model or of a layer."""

ENDLESS = ("decay", "skip")
"""Parts whose tensors have neither `.weight` nor `.bias` behind their names."""

EXPERTS = {"gate": "ffn_gate_exps", "inputs": "ffn_up_exps", "down": "ffn_down_exps"}
"""What the stacks of a mixture's matrices are called."""

JOINED_EXPERTS = "ffn_gate_up_exps"
"""What a stack of both gate and up is called."""

PLAIN = {part: TENSORS[part] for part in EXPERTS}
"""And those of a mixture's layer that has no experts."""


def tensor_name(family: Family, part: str, layer: int | None = None) -> str:
    """What the file calls a part of the model or of a layer, without `.weight` or `.bias`."""
    name = family.names.get(part, TENSORS[part])
    return name if layer is None else f"blk.{layer}.{name}"
