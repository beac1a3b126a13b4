"""A text that grows with no other beside it, as Engine.pieces has it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.line import Figures
from flashd.engine.decoding.sampling import Sampler


def generate(
    talk: Conversation, prompt: Sequence[int], sampler: Sampler, *, limit: int, eos: Sequence[int], figures: Figures,
    drafts: bool = True,
) -> Generator[int]:  # fmt: skip
    """The tokens that follow `prompt`, as they come. Raises UsageError, CardError, DamagedRun."""
    line = talk.begin(prompt, sampler, limit=limit, eos=eos, figures=figures, drafts=drafts)
    try:
        while not line.done:
            with closing(talk.go_on()) as said:
                for _, token in said:
                    yield token
    finally:
        talk.end(line)
