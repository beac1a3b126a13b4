"""A small model beside a large one: the RAM that it takes, and whether its guesses are worth more than pins.

Its guesses are checked by the large model, so it need not be exact. It is whole, in the fast arithmetic, and of its
head it has the likely tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flashd.bundle.reader import Bundle
from flashd.bundle.token_bytes import TokenBytes
from flashd.engine.model.sizes import NODES
from flashd.engine.planning.parts import LIKELY
from flashd.engine.planning.plan import LIBRARIES, WEIGHTS, Plan, make_plan, whole_parts
from flashd.errors import DataError, MemoryTooSmall

RIGHT = 0.8
"""How often a small model's guess is right if those before it were. Qwen2.5-Coder-0.5B's first guess at what the 1.5B
says is right in 82 % of cases, and chains of 15 give 6.4 tokens a pass."""

OWN, MOST_OWN, OWN_STEPS = 8.0, 5.0, 4
"""Guesses that the pinned groups make: a pass gives 1 + OWN times their share of tokens, at most so many, after so
many steps. Qwen2.5-Coder-1.5B has 2.7 with 21 % in RAM, 3.7 with 37 %."""

CARD, OPENED, MULTIPLIED = 45e6, 230e6, 2.5e9
"""Bytes a second: of a card that was not measured; that sessions are opened of at the most, as two x86-64 cores do;
and of constant weights that a processor of a Raspberry Pi 5 multiplies. What is measured while it answers decides how
many guesses are made. These only decide whether a small model is loaded."""

MOST_PROCESSORS = 4
"""More do not multiply faster: memory is the limit."""

IN_RAM = (WEIGHTS, "attention", "head", "pinned neurons")
"""Parts of a plan that every token is multiplied with."""


def check_draft(bundle: Bundle, draft: Bundle) -> None:
    """Raises DataError if a bundle cannot be the draft of another one: it pages, or its tokens are not the same."""
    header = draft.header
    f = header.formats
    if header.selection or header.model.experts or "f16" in (f.ffn, f.attention, f.head):
        kind = "selects neurons" if header.selection else "has experts" if header.model.experts else "has f16 rows"
        raise DataError(f"{draft.path}: it {kind}, and a draft stays in RAM whole; take one of int4 or int8 rows")
    _check_tokenizer(bundle, draft)


def _check_tokenizer(bundle: Bundle, draft: Bundle) -> None:
    """Raises DataError if two bundles do not give their tokens the same numbers.

    One vocabulary may be longer: Qwen2.5 fills its larger models' with tokens that no text has.
    """
    one, other = (TokenBytes.from_bytes(b.read("token_bytes")) for b in (bundle, draft))
    count = min(len(one), len(other))
    last = one.offsets[count]
    if (one.offsets[: count + 1] == other.offsets[: count + 1]).all() and one.blob[:last] == other.blob[:last]:
        return
    token = next(token for token in range(count) if one[token] != other[token])
    raise DataError(
        f"{draft.path}: token {token} is {_shown(other[token])} here and {_shown(one[token])} in {bundle.path}; a"
        " draft has the tokenizer of the model that it guesses for: take a smaller one of the same family"
    )


def _shown(text: bytes) -> str:
    return repr(text.decode("utf-8", "backslashreplace")) if text else "a control token"


def plan_draft(draft: Bundle, context: int, threads: int) -> Plan:
    """What a small model takes beside a large one. Ask `check_draft` first."""
    header = draft.header
    m = header.model
    head = min(LIKELY, m.vocabulary)
    parts = whole_parts(header, min(context, m.context), 0, m.layers, True, head_rows=head)
    for elsewhere in (LIBRARIES, "texts of tokens"):
        del parts[elsewhere]
    plan = make_plan(header, memory=1 << 60, context=min(context, m.context), threads=threads, base=0)
    return replace(plan, head_rows=head, parts=parts, memory=sum(parts.values()))


def expected(plan: Plan, bandwidth: float | None) -> float:
    """Tokens a second to expect of a plan, with its small model's guesses or the pinned groups' own.

    `bandwidth`: bytes a second of the card; None: it was not measured.
    """
    speed = MULTIPLIED * min(plan.threads, MOST_PROCESSORS)
    in_ram = sum(plan.parts.get(part, 0) for part in IN_RAM)
    reading = plan.card_bytes / min(bandwidth or CARD, OPENED)
    once = max(reading, in_ram / speed)
    if plan.draft is None and (plan.resident or plan.slots or plan.used < 1):
        return 1 / once
    if plan.draft is None:
        more = min(OWN * plan.pinned_share, MOST_OWN)
        return max(1 / once, (1 + more) / (once + OWN_STEPS * in_ram / speed))
    step = sum(plan.draft.parts.get(part, 0) for part in IN_RAM) / speed
    # tokens of a pass may use the same experts
    passes = {n: max(reading * (1 - (1 - plan.used) ** n) / plan.used, in_ram / speed) for n in range(1, NODES + 1)}
    return max((1 - RIGHT**n) / (1 - RIGHT) / (seconds + (n - 1) * step) for n, seconds in passes.items())


@dataclass(frozen=True)
class Pair:
    """What a budget buys without a small model and with it, and which of the two is faster."""

    alone: Plan
    beside: Plan | None  # None: there is no room for it, or no use
    bandwidth: float | None  # of the card; None: it was not measured
    refused: str = ""  # why there is no plan with it
    least_beside: int | None = None  # the smallest budget that works with it; None: it has no use

    @classmethod
    def of(cls, alone: Callable[[], Plan], beside: Callable[[], Plan] | None, bandwidth: float | None) -> Pair:
        """Makes the plans. Raises MemoryTooSmall if the large model has no room even without the small one."""
        one = alone()
        if beside is None:
            return cls(one, None, bandwidth)
        if one.resident:
            why = "the model fits in RAM, and there a pass over several tokens may say another text"
            return cls(one, None, bandwidth, why)
        if one.slots:
            return cls(one, None, bandwidth, "each token needs neurons of its own, so no pass checks several")
        try:
            other = beside()
        except MemoryTooSmall as error:
            return cls(one, None, bandwidth, str(error), error.smallest)
        return cls(one, other, bandwidth, "", other.least)

    @property
    def taken(self) -> Plan:
        """The plan to obey."""
        faster = self.rate_beside is not None and self.rate_beside > self.rate_alone
        return self.beside if faster and self.beside is not None else self.alone

    @property
    def rate_alone(self) -> float:
        """Tokens a second to expect without the small model."""
        return expected(self.alone, self.bandwidth)

    @property
    def rate_beside(self) -> float | None:
        """Tokens a second to expect with it."""
        return None if self.beside is None else expected(self.beside, self.bandwidth)

    @property
    def why_not(self) -> str:
        """Why the small model is not used, in a line. Empty if it is."""
        if self.rate_beside is None or self.taken is self.beside:
            return self.refused
        return (
            f"about {self.rate_beside:.2g} tokens/s are expected with it, and {self.rate_alone:.2g} if its RAM pins"
            " groups instead"
        )
