"""flashd plan: what a memory budget buys."""

from __future__ import annotations

import json
from dataclasses import asdict

from flashd.bundle.reader import Bundle
from flashd.cli.options import Plan
from flashd.cli.own_model import budget, bundle_of, draft_of, plans_for_answers
from flashd.engine.expected import measure
from flashd.engine.paging.card_speed import remembered
from flashd.engine.planning.draft import Pair
from flashd.system.memory import MIB


def plan(options: Plan) -> None:
    """Prints the parts of the budget, and what has to be read from the card."""
    with Bundle(bundle_of(options.bundle)) as bundle, draft_of(options.draft) as draft:
        plans = plans_for_answers(bundle, budget(options), draft)
        measure(bundle, plans.alone)
        plan, rate = plans.taken, plans.rate(plans.taken)
        card_known = remembered(bundle.path) is not None
    if options.json:
        sizes = {"total": plan.total, "smallest": plans.alone.least, "whole": plan.whole_from}
        more = {"smallest_with_draft": plans.least_beside, "draft_not_used": plans.why_not} if options.draft else {}
        print(json.dumps(asdict(plan) | sizes | more | {"tokens_per_second": rate}))
        return
    for name, size in plan.parts.items():
        _line(name, size / MIB, "MiB")
    _line("in all", plan.total / MIB, f"MiB of {plan.memory / MIB:.0f}")
    _line("the least that works", plans.alone.least / MIB, f"MiB with a context of {plan.context}")
    if plans.least_beside is not None:
        _line("the least with the draft", plans.least_beside / MIB, "MiB")
    if plan.whole_from is not None:
        _line("the whole model fits from", plan.whole_from / MIB, "MiB on, and then answers many times as fast")
    if options.draft:
        _print_draft(plans)
    if plan.resident:
        _rate("tokens a second, about", rate)
        print("The whole model fits: nothing is read from the card while it answers.")
        return
    share = 100 * plan.pinned_share
    _line("neurons that stay in RAM", share, "%")
    print(f"{'answers that may share a pass':34}{plan.texts:7}")
    if plan.lent_groups:
        _line("while a text is short, up to", share + 100 * plan.lent_groups / sum(plan.groups), "%")
    _line("read from the card in a pass", plan.card_bytes / MIB, "MiB")
    _rate("tokens a second, about", rate, " or more, if the text repeats itself")
    if not card_known:
        print("A card of 45 MB/s is assumed; flashd doctor measures it, once.")


def _print_draft(plans: Pair) -> None:
    """What the draft's RAM is worth, as guesses and as pins, and what is taken."""
    if plans.rate_beside is not None:
        _rate("with the draft, expected", plans.rate_beside, " tokens/s")
        _rate("with pins in its place, expected", plans.rate_alone, " tokens/s")
    print(f"The draft is not used: {plans.why_not}." if plans.why_not else "The draft is used.")


def _line(name: str, figure: float, unit: str) -> None:
    print(f"{name:34}{figure:9.1f} {unit}")


def _rate(name: str, rate: float, more: str = "") -> None:
    print(f"{name:34}{rate:9{'.1f' if rate >= 10 else '.2f'}}{more}")
