"""What the commands print on standard output: facts, answers and what they cost."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping

from flashd.system.memory import MIB

CUT = {"length": "--max-tokens allows more", "context": "the context is full"}
"""What is said of answers that ended so."""

Fact = str | int | float | bool | list[int] | list[float] | None


def print_facts(facts: Mapping[str, Fact], as_json: bool) -> None:
    """One fact a line, or one JSON object."""
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):18} {value}")


def say_cut(finish: str) -> None:
    """Tells a person that an answer was cut, and why."""
    if finish in CUT and sys.stderr.isatty():
        print(f"(cut: {CUT[finish]})", file=sys.stderr, flush=True)


def answer_as_json(text: str, thoughts: str, finish: str, figures: Mapping[str, float]) -> str:
    """An answer and what it cost, as a line of JSON."""
    thought = {"thoughts": thoughts} if thoughts else {}
    return json.dumps({"text": text, **thought, "finish": finish, **figures}, ensure_ascii=False)


def cost_in_words(finish: str, figures: Mapping[str, float]) -> str:
    """What an answer cost. A figure that an older version did not keep counts as 0."""
    f = defaultdict(float, figures)
    share = f["card_bandwidth_share"]
    kept = f" {f['reused_tokens']:.0f} more were kept," if f["reused_tokens"] else ""
    lines = [
        f"prefill   {f['prompt_tokens']:.0f} tokens, {f['prefill_tokens_per_second']:.2f} tokens/s,{kept}"
        f" first token after {f['first_token_seconds']:.2f} s",
        f"decode    {f['tokens']:.0f} tokens, {f['decode_tokens_per_second']:.2f} tokens/s, ended by {finish}",
        f"card      {f['card_bytes_per_token'] / MIB:.1f} MiB and {f['card_reads_per_token']:.0f} reads a token,"
        f" {100 * f['window_hit_rate']:.0f} % of neurons found in RAM"
        + (f", {100 * share:.0f} % of what the card can give" if share else ""),
        f"tables    {f['table_bytes_per_token'] / 1024:.0f} KiB of embeddings a token",
        f"drafts    {f['drafted']:.0f} drafted from RAM, {f['accepted']:.0f} right,"
        f" {f['tokens_per_pass']:.2f} tokens a pass, {f['draft_seconds']:.2f} s",
        f"time      {f['card_wait_seconds']:.2f} s waiting for the card, {f['compute_seconds']:.2f} s computing,"
        f" {f['other_seconds']:.2f} s other",
        f"memory    {f['peak_bytes'] / MIB:.0f} MiB at the most, {f['memory_bytes'] / MIB:.0f} allowed",
    ]
    return "\n".join(lines)
