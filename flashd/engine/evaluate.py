"""Perplexity of a text under a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flashd.engine.decode import Model
from flashd.engine.plan import PREFILL_TOKENS
from flashd.errors import UsageError


@dataclass(frozen=True)
class Evaluation:
    """How well a text was foreseen."""

    tokens: int
    perplexity: float
    bits_per_token: float


def perplexity(
    model: Model, tokens: Sequence[int], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Perplexity over `tokens`, in windows of the model's context, each from an empty cache.

    The first token of a window is not counted: nothing stands before it. Raises UsageError for a text of
    fewer than two tokens.
    """
    if len(tokens) < 2:
        raise UsageError("the text has fewer than two tokens; there is nothing to foresee")
    lost, counted = 0.0, 0
    for start in range(0, len(tokens) - 1, model.cache.context):
        window = np.array(tokens[start : start + model.cache.context], np.int64)
        model.cache.truncate(0)
        model.cache.hold(0)
        for at in range(0, len(window), PREFILL_TOKENS):
            chunk = window[at : at + PREFILL_TOKENS]
            following = window[at + 1 : at + 1 + len(chunk)]
            logits = model.forward(chunk, np.arange(len(chunk)))[: len(following)]  # [T, V]
            top = logits.max(1)
            log_sum = top + np.log(np.exp(logits - top[:, None]).sum(1))
            lost += float((log_sum - logits[np.arange(len(following)), following]).sum())
            counted += len(following)
            on_progress(start + at + len(chunk), len(tokens))
    mean = lost / counted
    return Evaluation(counted, float(np.exp(mean)), mean / float(np.log(2)))
