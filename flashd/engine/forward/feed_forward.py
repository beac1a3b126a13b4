"""What a forward pass asks of its FFN layers, whatever keeps their weights."""

from __future__ import annotations

from typing import Protocol

from flashd.bundle.row_kinds import Floats
from flashd.engine.model.contract import CardStats, OnStep


class FeedForward(Protocol):
    """The FFNs of all layers. A pass takes the layers in order, or is broken off and `restart` called."""

    @property
    def card(self) -> CardStats: ...

    @property
    def hit_rate(self) -> float:
        """The share of what passes needed that was in RAM."""

    @property
    def pages(self) -> bool:
        """Whether a pass reads the card, so that one which checks several tokens costs what one costs."""

    @property
    def drafts(self) -> bool:
        """Whether `from_ram` is cheaper than a pass and better than nothing."""

    def load(self, layer: int) -> None:
        """Reads what of a layer stays in RAM; called once for each layer, in order, before the first pass.

        Raises DamagedRun, CardError.
        """

    def enter(self, layer: int, x: Floats) -> None:
        """A pass comes to a layer with x [T, H]: there are models in which that says what the FFN will need."""

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        """A layer's FFN of h [T, H] -> [T, H]. Raises DamagedRun, CardError."""

    def from_ram(self, layer: int, h: Floats) -> Floats:
        """What of it can be told without the card."""

    def lend(self, nbytes: int) -> None:
        """Bytes beside the plan's that may be used from now on, no more, until the next call. Not within a pass."""

    def restart(self) -> None:
        """The next layer asked for is the first."""

    def close(self) -> None: ...
