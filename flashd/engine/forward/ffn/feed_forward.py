"""The contract between the paged forward pass and its FFNs, of which there are three kinds.

StreamedFfn needs every neuron, SelectedFfn those that a predictor or a gate chooses, ExpertFfn those of some experts.
"""

from __future__ import annotations

from typing import Protocol

from flashd.bundle.rows.kinds import Floats
from flashd.engine.model.contract import CardStats, OnStep


class FeedForward(Protocol):
    """The FFNs of all layers. A pass calls them in order. If a pass breaks off, it calls `restart`."""

    @property
    def card(self) -> CardStats:
        """What was read from the card so far."""

    @property
    def hit_rate(self) -> float:
        """The share of the units that passes needed and found in RAM, 0 to 1."""

    @property
    def shares_reads(self) -> bool:
        """Whether the tokens of a pass share its reads of the card, so that checking several costs what one costs."""

    @property
    def drafts(self) -> bool:
        """Whether `from_ram` is cheaper than a pass and better than nothing."""

    def load(self, layer: int) -> None:
        """Reads that part of a layer which stays in RAM. It is called for each layer in order, before the first pass.

        Raises DamagedRun, CardError.
        """

    def enter(self, layer: int, x: Floats) -> None:
        """Is called when a pass enters a layer with x [T, H]. In some models x already tells what the FFN needs."""

    def __call__(self, layer: int, h: Floats, on_step: OnStep) -> Floats:
        """A layer's FFN of h [T, ffn_input_width] -> [T, share_width], see Architecture.

        Raises DamagedRun, CardError.
        """

    def from_ram(self, layer: int, h: Floats) -> Floats:
        """The same, from the weights in RAM alone: an approximation. h [T, H] -> [T, H]."""

    def lend(self, nbytes: int) -> None:
        """Allows the FFNs to use `nbytes` more than the plan gives them, until the next call says otherwise.

        It is not called within a pass.
        """

    def restart(self) -> None:
        """Makes ready for a pass from the first layer on."""

    def close(self) -> None:
        """Closes what is read from."""
