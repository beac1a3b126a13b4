"""What an answer cost: the figures that --json, --stats, the API and the spool give by name."""

from __future__ import annotations

from dataclasses import asdict

from flashd.engine.engine import Answer, Engine
from flashd.engine.paging.card_speed import remembered
from flashd.engine.planning.held import LIBRARIES
from flashd.system.memory import peak


def cost(engine: Engine, answer: Answer) -> dict[str, float]:
    """The figures of an answer by name: seconds, bytes, counts and rates.

    `card_wanted_share`, `window_hit_rate` and `peak_bytes` cover all that the engine has done so far, not this answer
    alone. `card_bandwidth_share` is how much of what the card can give was read while tokens were made. It is there
    if the card was measured. `libraries_bytes` is what the process held before the model, of the budget
    `memory_bytes`.
    """
    f, card, speed = answer.figures, engine.model.card, remembered(engine.bundle.path)
    counts = {name: value for name, value in asdict(f).items() if name != "finish"}
    after_first = max(1, f.tokens - 1)
    share = {}
    if speed is not None and speed.bandwidth > 0 and f.decode_seconds > 0:
        share["card_bandwidth_share"] = f.decode_card_bytes / f.decode_seconds / speed.bandwidth
    return {
        **counts,
        "prefill_tokens_per_second": f.prefill_rate,
        "decode_tokens_per_second": f.decode_rate,
        "tokens_per_pass": (f.passes + f.accepted) / f.passes if f.passes else 1.0,
        "card_bytes_per_token": f.decode_card_bytes / after_first,
        "card_reads_per_token": f.decode_card_reads / after_first,
        "table_bytes_per_token": f.decode_table_bytes / after_first,
        "card_wanted_share": card.bytes_wanted / card.bytes_read if card.bytes_read else 1.0,
        "window_hit_rate": engine.model.hit_rate,
        **share,
        "compute_seconds": f.forward_seconds + f.draft_seconds - f.card_wait_seconds,
        "other_seconds": f.first_token_seconds + f.decode_seconds - f.forward_seconds - f.draft_seconds,
        "peak_bytes": peak(),
        "memory_bytes": engine.plan.memory,
        "libraries_bytes": engine.plan.parts[LIBRARIES],
    }
