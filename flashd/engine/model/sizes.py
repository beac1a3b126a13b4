"""How much goes through a pass at once. The plan counts with these sizes and the passes keep to them."""

from __future__ import annotations

NODES = 16
"""The most tokens of a pass that checks drafts, last tokens of texts and guesses, if each takes a row of logits."""

TREE_NODES = 32
"""The same if most of the head streams past. Behind a node that is not drawn, logits of the likely tokens do."""

LOGIT_ROWS = 10
"""Rows of logits over the whole vocabulary that such a pass makes: of the nodes that it will probably draw behind."""

MOST_TEXTS = 8
"""The most texts that grow together. Half of the nodes of a pass are left for guesses."""

TEMPORARY_BYTES = 3 << 20
"""Rows are widened to float32 in parts of at most so many bytes. A part this large stays in the processor's cache."""

TOKENS_AT_ONCE = 128
"""Tokens that go through a product together. A pass may have more tokens; its temporaries do not grow with them."""

TOKENS_ATTENDING = 64
"""The same of attention: the scores of all keys are there for each of them, in float64 too."""

KEPT_ROWS = 256
"""Embedding rows that are kept for tokens that come one at a time. A text repeats most of its tokens."""

TOKENS_UNPACKED, FEW_UNPACKED = 64, 4
"""Tokens that go together through a product with rows that were just unpacked: it leaves sums of each block behind
each token. For so few of them, and for twice as many in two parts, another graph is faster."""

AT_WORK = 4
"""Threads that multiply what is unpacked, at the most, and experts that have come and wait to be multiplied."""

HEAD_ROWS_UNPACKED = 2048
"""Rows of the head that are unpacked together."""


def at_work(threads: int) -> int:
    """Threads that multiply what is unpacked, of a machine that computes with so many."""
    return min(threads, AT_WORK)
