"""How many neurons a group has: what is read, pinned and multiplied as one."""

from __future__ import annotations

from flashd.bundle.rows.kinds import BLOCK

MOST_BYTES = 2 << 20
"""Of a group's weights in 4 bits: larger reads gain nothing on any card, and what waits to be used takes RAM."""

LEAST_GROUPS = 4
"""Of a layer, so that a small model can be pinned in part."""


def group_neurons(neurons: int, hidden: int, inputs: int, expert: bool) -> int:
    """Neurons of a group, whole blocks that share out an FFN of `neurons`, itself a multiple of 32.

    Args:
        hidden: H.
        inputs: M, the matrices that the FFN's input is multiplied by.
        expert: the FFN is one of many in a layer, and is used whole.
    """
    blocks, block_bytes = neurons // BLOCK, BLOCK * (inputs + 1) * hidden // 2
    least = 1 if expert else min(LEAST_GROUPS, blocks)
    most = min(blocks, MOST_BYTES // max(1, block_bytes))  # what a model says of itself may be any number
    fitting = [n for n in range(1, most + 1) if blocks % n == 0 and blocks // n >= least]
    return BLOCK * max(fitting, default=1)
