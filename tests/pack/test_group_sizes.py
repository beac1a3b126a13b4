"""How many neurons a group has: few large reads, and still enough groups to pin a part of a layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.rows.kinds import BLOCK
from flashd.pack.groups import LEAST_GROUPS, MOST_BYTES, group_neurons


@pytest.mark.parametrize(
    ("neurons", "hidden", "inputs", "expected"),
    [
        (1536, 576, 2, 384),  # SmolLM2-135M: four groups
        (8960, 1536, 2, 896),  # Qwen2.5-Coder-1.5B: ten groups of 1.97 MiB
        (4864, 896, 2, 1216),  # Qwen2.5-0.5B
        (11008, 4096, 2, 256),  # Llama-2-7B: 43 groups of 1.5 MiB
        (2048, 512, 1, 512),  # up alone
        (3072, 768, 1, 768),
        (224, 64, 2, 32),  # seven blocks do not make four groups or five
        (128, 64, 2, 32),
        (96, 64, 2, 32),  # fewer blocks than the least number of groups
        (32, 64, 2, 32),
        (32 * 10007, 64, 2, 32),  # a prime number of blocks
    ],
)
def test_layers(neurons: int, hidden: int, inputs: int, expected: int) -> None:
    assert group_neurons(neurons, hidden, inputs, expert=False) == expected


@pytest.mark.parametrize(
    ("neurons", "hidden", "expected"),
    [
        (768, 2048, 384),  # Qwen3-30B-A3B: 2.25 MiB are two groups
        (768, 1536, 768),  # SmallThinker-4B: one
        (64, 64, 64),
        (96, 64, 96),
        (14336, 4096, 256),  # Mixtral-8x7B
    ],
)
def test_an_expert_is_one_group_unless_it_is_too_large(neurons: int, hidden: int, expected: int) -> None:
    assert group_neurons(neurons, hidden, 2, expert=True) == expected


@given(st.integers(1, 600), st.integers(1, 256), st.sampled_from([1, 2]), st.booleans())
def test_groups_share_out_an_ffn_and_none_could_be_larger(blocks: int, width: int, inputs: int, expert: bool) -> None:
    neurons, hidden = blocks * BLOCK, width * BLOCK
    least = 1 if expert else min(LEAST_GROUPS, blocks)

    def holds(n: int) -> bool:
        few = n * (inputs + 1) * hidden // 2 <= MOST_BYTES or n == BLOCK
        return neurons % n == 0 and neurons // n >= least and few

    found = group_neurons(neurons, hidden, inputs, expert)
    assert found % BLOCK == 0 and holds(found)
    assert not any(holds(n) for n in range(found + BLOCK, neurons + 1, BLOCK))
