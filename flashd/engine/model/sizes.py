"""How much goes through a pass at once. The plan counts with these sizes and the passes keep to them."""

from __future__ import annotations

NODES = 16
"""Tokens of a pass that checks drafts, the ones before them included: each takes a row of logits."""

TEMPORARY_BYTES = 3 << 20
"""Rows are widened to float32 a part at a time; a part this large stays in a processor's cache."""

TOKENS_AT_ONCE = 128
"""Tokens that go through a product together. A pass may have more, for which its temporaries need not be larger."""


KEPT_ROWS = 256
"""Embeddings kept of tokens that came one at a time: a text says most of its tokens again."""
