"""The tokens a second to expect of a plan, by what the machine and its card do in a second.

A pass over a model that pages multiplies what stays in RAM, and what streams past while more of it is read, so that
the slower of the two counts. Between passes the groups in RAM make guesses. How many of them are right depends on the
text, so the rate of a text may be half or twice of what is expected.
"""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec

import flashd
from flashd.bundle.header import Header
from flashd.engine.model.sizes import NODES
from flashd.engine.planning.held import LEADING_FFNS, WEIGHTS
from flashd.engine.planning.plan import Plan
from flashd.engine.planning.unpacked import GUESSED
from flashd.system.remembered import Remembered

CARD = 45e6
"""Bytes a second of a card that was not measured: a good SD card in a Raspberry Pi 4."""

OWN, MOST_OWN, OWN_STEPS = 5.0, 5.0, 4
"""Guesses that the groups in RAM make: OWN times their share are right, at most so many, after so many steps. Each
step makes half of what is still missing. Qwen2.5-Coder-1.5B has 2.3 to 2.9 tokens a pass with 33 % in RAM, and on a
fast card, where one or two steps pay, 1.7 to 2.4."""

RIGHT = 0.8
"""How often a small model's guess is right if those before it were. Qwen2.5-Coder-0.5B's first guess at what the 1.5B
says is right in 82 % of cases, and chains of 15 give 6.4 tokens a pass."""

BETWEEN = 150e-6
"""Seconds that a layer takes for one token beside its products, measured with SmolLM2-135M on x86-64."""

IN_RAM = (WEIGHTS, LEADING_FFNS, "attention", "head", "pinned neurons")
"""Parts of a plan that every token is multiplied with."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What the processors of a machine do with a model's rows, in bytes a second."""

    streamed: float  # of groups that have come from the card: they are copied if need be, and multiplied with a token
    multiplied: float  # of RAM, that a single token is multiplied with
    guessed: float  # of RAM, that a few tokens are multiplied with, as a step of drafting does
    checked: float  # of RAM, that the tokens of a pass with drafts are multiplied with


ASSUMED = Rates(streamed=450e6, multiplied=5e9, guessed=4e9, checked=2e9)
"""Of a machine that was not measured."""

GUESSING, CHECKING = 3, NODES - 2
"""Tokens of a step of drafting, and of a pass with drafts."""

_machines = Remembered("machines.json", Rates, "flashd plan")


def remember_rates(header: Header, plan: Plan, rates: Rates) -> None:
    """Keeps the rates of this machine for plans of this kind. Raises CannotWrite."""
    _machines.put(_key(header, plan), rates)


def remembered_rates(header: Header, plan: Plan) -> Rates | None:
    """The rates that were measured on this machine for plans of this kind; None if they were not."""
    return _machines.get(_key(header, plan))


def _key(header: Header, plan: Plan) -> str:
    """Another version may compute at another speed."""
    of_what = f"{_what(header, plan)}{header.formats.ffn} rows in {plan.of_ffns}"
    return f"flashd {flashd.__version__}, {_machine()}, {plan.threads} threads, {of_what}"


def _what(header: Header, plan: Plan) -> str:
    """What is multiplied. It takes another time for each."""
    if header.model.experts:
        return "experts of fewer bits, " if header.narrowed else "experts, "
    return "" if plan.resident else f"groups, guesses in {GUESSED}, "


def _machine() -> str:
    """The board's name, or the processor's. A card may have been in another board before."""
    board = Path("/proc/device-tree/model")
    if board.exists():
        return board.read_text(errors="replace").strip("\0\n ")
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.machine())


def expected(plan: Plan, rates: Rates, card: float | None) -> float:
    """Tokens a second to expect of a plan, with its small model's guesses or the pinned groups' own.

    `card`: bytes a second that it reads; None: it was not measured.
    """
    in_ram = sum(plan.parts.get(part, 0) for part in IN_RAM)
    if plan.resident and not plan.card_bytes:
        return 1 / (in_ram / rates.multiplied + BETWEEN * len(plan.groups))
    speed = card or CARD
    if plan.draft is not None:
        return _with_draft(plan, rates, speed)
    if plan.used < 1:
        return 1 / (_experts(plan, rates, speed) + in_ram / rates.multiplied)
    once = _pass(plan.card_bytes, in_ram, rates, speed, rates.multiplied)
    if plan.slots:
        return 1 / once
    # while a text is short, more groups are in RAM and fewer stream past
    lent, groups = plan.lent_groups, sum(plan.groups)
    in_ram += plan.lent_held
    guessed = min(OWN * (sum(plan.pinned) + lent) / groups, MOST_OWN)
    seconds = _pass(plan.card_bytes - plan.lent_card_bytes, in_ram, rates, speed, rates.checked)

    def rate(steps: int) -> float:
        return (1 + guessed * (1 - 0.5**steps)) / (seconds + steps * in_ram / rates.guessed)

    return max(1 / once, *(rate(steps) for steps in range(1, OWN_STEPS + 1)))


def _with_draft(plan: Plan, rates: Rates, card: float) -> float:
    assert plan.draft is not None
    in_ram = sum(plan.parts.get(part, 0) for part in IN_RAM)
    step = sum(plan.draft.parts.get(part, 0) for part in IN_RAM) / rates.multiplied

    def rate(nodes: int) -> float:
        if plan.used < 1:
            # tokens of a pass may use the same experts
            share = (1 - (1 - plan.used) ** nodes) / plan.used
            seconds = share * _experts(plan, rates, card) + in_ram / rates.checked
        else:
            seconds = _pass(plan.card_bytes, in_ram, rates, card, rates.checked)
        return float((1 - RIGHT**nodes) / (1 - RIGHT) / (seconds + (nodes - 1) * step))

    return max(rate(nodes) for nodes in range(1, NODES + 1))


def _experts(plan: Plan, rates: Rates, card: float) -> float:
    """Seconds of the experts that a token uses."""
    used = plan.used * sum(groups * size for groups, size in zip(plan.groups, plan.group_bytes, strict=True))
    if plan.constant_experts:
        return used / rates.multiplied
    return max(plan.card_bytes / card, used / rates.streamed)


def _pass(card_bytes: float, in_ram: float, rates: Rates, card: float, rate: float) -> float:
    """Seconds of a pass over as many tokens as are multiplied with bytes of RAM at `rate`."""
    more = 1 / rate - 1 / rates.multiplied  # than for a single token
    return max(card_bytes / card, in_ram / rate + card_bytes * (1 / rates.streamed + more))
