"""flashd plan: what a memory budget buys."""

from __future__ import annotations

import json
from dataclasses import asdict

from flashd.bundle.reader import Bundle
from flashd.cli.options import Plan
from flashd.cli.own_model import budget, bundle_of, plan_for_answers
from flashd.system.memory import MIB


def plan(options: Plan) -> None:
    """Prints the parts of the budget, and what has to be read from the card."""
    with Bundle(bundle_of(options.bundle)) as bundle:
        plan = plan_for_answers(bundle, budget(options))
    if options.json:
        print(json.dumps(asdict(plan) | {"total": plan.total, "smallest": plan.least, "whole": plan.whole_from}))
        return
    for name, size in plan.parts.items():
        _line(name, size / MIB, "MiB")
    _line("in all", plan.total / MIB, f"MiB of {plan.memory / MIB:.0f}")
    _line("the least that works", plan.least / MIB, f"MiB with a context of {plan.context}")
    if plan.whole_from is not None:
        _line("the whole model fits from", plan.whole_from / MIB, "MiB on, and then answers many times as fast")
    if plan.resident:
        print("The whole model fits: nothing is read from the card while it answers.")
        return
    share = 100 * plan.pinned_share
    _line("neurons that stay in RAM", share, "%")
    if plan.lent_groups:
        _line("while a text is short, up to", share + 100 * plan.lent_groups / sum(plan.groups), "%")
    _line("read from the card in a pass", plan.card_bytes / MIB, "MiB")


def _line(name: str, figure: float, unit: str) -> None:
    print(f"{name:34}{figure:9.1f} {unit}")
