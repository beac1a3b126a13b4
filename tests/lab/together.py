"""What answers cost that are given one after the other, and together: python -m tests.lab.together FILE.flash

As flashd bench measures one answer, this measures what several triggers wait for that fire at once. Run it as a
bench's `--wrap` would: under a memory cap, with the card throttled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from flashd.bundle.reader import Bundle
from flashd.engine.decoding.apart import LIMITS
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Answer, Budget, Engine, Prompts, Speech
from flashd.system.child import in_child
from flashd.system.memory import parse_size

QUESTIONS = (
    "Write a fibonacci function in Python and explain it.",
    "The greenhouse is at 31 degrees and the soil is dry. Should I water, and how much?",
    "What does a hash table do when two keys have the same hash?",
    "The front door has been open for ten minutes. Write a short notice for the display.",
)


def measure(engine: Engine, prompts: Sequence[list[int]], tokens: int, at_once: int) -> None:
    """Prints what the answers cost when so many are given at once."""
    started, before = time.perf_counter(), engine.model.card.bytes_read
    answers = [Answer() for _ in prompts]
    waiting = list(zip(prompts, answers, strict=True))
    ends: list[float] = []
    running: list[Speech] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            prompt, answer = waiting.pop(0)
            running.append(engine.begin(prompt, Sampling(), answer, limit=tokens, ignore_eos=True))
        for _ in engine.go_on():
            """What is said is not looked at."""
        for speech in [s for s in running if s.done]:
            ends.append(time.perf_counter() - started)
            running.remove(speech)
            engine.end(speech)
    said = sum(a.figures.tokens for a in answers)
    nbytes = engine.model.card.bytes_read - before
    print(
        f"{at_once} at once: {said} tokens in {ends[-1]:.1f} s, {said / ends[-1]:.3f} tokens/s,"
        f" {nbytes / said / (1 << 20):.0f} MiB/token; ends at " + ", ".join(f"{end:.0f}" for end in ends),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", type=parse_size)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    with Bundle(args.bundle) as bundle:

        def tokens() -> list[list[int]]:
            asking = Prompts(bundle)
            return [asking.tokens([Message("user", question)]) for question in QUESTIONS]

        # a tokenizer is tens of megabytes, and no longer wanted
        prompts = in_child(tokens, LIMITS)
        with Engine(bundle, Budget(args.memory)) as engine:
            for at_once in args.at_once:
                measure(engine, prompts, args.tokens, at_once)


if __name__ == "__main__":
    main()
