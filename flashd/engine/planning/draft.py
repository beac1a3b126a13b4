"""A small model beside a large one: the RAM that it takes, and whether its guesses are worth more than pins.

Its guesses are checked by the large model, so it need not be exact. It is whole, in the fast arithmetic, and of its
head it has the likely tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flashd.bundle.reader import Bundle
from flashd.bundle.token_bytes import TokenBytes
from flashd.engine.planning.held import LIBRARIES, whole_parts
from flashd.engine.planning.parts import LIKELY
from flashd.engine.planning.plan import Plan, make_plan
from flashd.errors import DataError, MemoryTooSmall

Rate = Callable[[Plan], float]
"""The tokens a second to expect of a plan."""


def check_draft(bundle: Bundle, draft: Bundle) -> None:
    """Raises DataError if a bundle cannot be the draft of another one: it pages, or its tokens are not the same."""
    header = draft.header
    f = header.formats
    if header.selection or header.model.experts or "f16" in (f.ffn, f.attention, f.head):
        kind = "selects neurons" if header.selection else "has experts" if header.model.experts else "has f16 rows"
        raise DataError(f"{draft.path}: it {kind}, and a draft stays in RAM whole; take one of int4 or int8 rows")
    _check_tokenizer(bundle, draft)


def _check_tokenizer(bundle: Bundle, draft: Bundle) -> None:
    """Raises DataError if two bundles do not give their tokens the same numbers."""
    one, other = (TokenBytes.from_bytes(b.read("token_bytes")) for b in (bundle, draft))
    if one.begins_like(other):
        return
    token = next(token for token in range(min(len(one), len(other))) if one[token] != other[token])
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


@dataclass(frozen=True)
class Pair:
    """What a budget buys without a small model and with it, and which of the two is faster."""

    alone: Plan
    beside: Plan | None  # None: there is no room for it, or no use
    rate: Rate  # what to expect of a plan
    refused: str = ""  # why there is no plan with it
    least_beside: int | None = None  # the smallest budget that works with it; None: it has no use

    @classmethod
    def of(cls, alone: Callable[[], Plan], beside: Callable[[], Plan] | None, rate: Rate) -> Pair:
        """Makes the plans. Raises MemoryTooSmall if the large model has no room even without the small one."""
        one = alone()
        if beside is None:
            return cls(one, None, rate)
        if one.resident:
            why = (
                "the model fits in RAM, where a product of several tokens rounds otherwise than one of a single"
                " token, so guesses could change the text"
            )
            return cls(one, None, rate, why)
        if one.slots:
            return cls(one, None, rate, "each token needs neurons of its own, so no pass checks several")
        try:
            other = beside()
        except MemoryTooSmall as error:
            return cls(one, None, rate, str(error), error.smallest)
        return cls(one, other, rate, "", other.least)

    @property
    def taken(self) -> Plan:
        """The plan to obey."""
        faster = self.rate_beside is not None and self.rate_beside > self.rate_alone
        return self.beside if faster and self.beside is not None else self.alone

    @property
    def rate_alone(self) -> float:
        """Tokens a second to expect without the small model."""
        return self.rate(self.alone)

    @property
    def rate_beside(self) -> float | None:
        """Tokens a second to expect with it."""
        return None if self.beside is None else self.rate(self.beside)

    @property
    def why_not(self) -> str:
        """Why the small model is not used, in a line. Empty if it is."""
        if self.rate_beside is None or self.taken is self.beside:
            return self.refused
        return (
            f"about {self.rate_beside:.2g} tokens/s are expected with it, and {self.rate_alone:.2g} if its RAM pins"
            " groups instead"
        )
