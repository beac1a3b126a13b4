"""Replays which neurons took part in each token against any window, order and card: bytes and reads, without a model.

    python -m tests.lab.replay BUNDLE TRACE.npz [--ram 0.25 0.5] [--gap 4096 16384]

A trace is made by `python -m tests.lab.ablation`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.paging.card import extents, pages_of
from flashd.engine.paging.eviction import Frequency, Mask, Policy, kept, shares
from flashd.engine.planning.plan import rates_of
from flashd.pack.lossy.card_order import card_order

MakePolicy = Callable[[Floats], Policy]


class LastTokens:
    """Keeps what the last tokens used, as many of them as fit: the sliding window of section 3.1 of the paper."""

    def __init__(self, rates: Floats) -> None:
        # what was never used yet comes behind all that was, the hottest first
        self.scores: Floats = rates - np.float32(1)
        self._now = 0

    def used(self, chosen: Mask) -> None:
        self._now += 1
        self.scores[chosen] = self._now


@dataclass
class Trace:
    """Which neurons took part: for each pass and layer in turn, [T, F]."""

    passes: list[tuple[int, Mask]] = field(default_factory=list)

    def record(self, layer: int, chosen: Mask) -> None:
        self.passes.append((layer, chosen))

    @property
    def tokens(self) -> int:
        return sum(len(chosen) for layer, chosen in self.passes if layer == 0)

    def of_layer(self, layer: int) -> Mask:
        """[tokens, F]"""
        return np.concatenate([chosen for at, chosen in self.passes if at == layer])

    def save(self, path: Path, layers: int) -> None:
        """A pass for each token from now on."""
        np.savez_compressed(path, *[np.packbits(self.of_layer(i), axis=1) for i in range(layers)])

    @classmethod
    def load(cls, path: Path, neurons: int) -> Trace:
        with np.load(path) as file:
            layers = [np.unpackbits(file[name], axis=1)[:, :neurons].astype(np.bool_) for name in file.files]
        return cls([(i, chosen[t][None]) for t in range(len(layers[0])) for i, chosen in enumerate(layers)])


@dataclass
class Counts:
    """What a trace would ask of the card."""

    tokens: int = 0
    reads: int = 0
    bytes_read: int = 0
    bytes_wanted: int = 0
    extents: int = 0
    missed: int = 0

    @property
    def bytes_a_token(self) -> float:
        return self.bytes_read / self.tokens

    @property
    def reads_a_token(self) -> float:
        return self.reads / self.tokens

    @property
    def run_length(self) -> float:
        """Mean neurons wanted of a read."""
        return self.missed / max(1, self.reads)

    @property
    def wanted_share(self) -> float:
        return self.bytes_wanted / max(1, self.bytes_read)


def replay(
    trace: Trace,
    header: Header,
    rates: Floats | None,
    slots: Sequence[int],
    policy: MakePolicy = Frequency,
    gap: int = 4096,
    orders: Sequence[npt.NDArray[np.int64]] | None = None,
    parts: int = 1,
) -> Counts:
    """What the engine would count.

    Args:
        slots: of each layer's window.
        gap: unwanted bytes that are read rather than skipped.
        orders: of each layer, its neurons in another order on the card.
        parts: in so many places each neuron lies on the card: 1 as a bundle.
    """
    assert rates is not None
    count, size = Counts(trace.tokens), header.unit_bytes
    places = [np.argsort(order) for order in orders] if orders else None
    policies = [policy(layer) for layer in rates]
    here = [kept(p, np.ones(len(p.scores), np.bool_), n) for p, n in zip(policies, slots, strict=True)]
    starts = [header.section_named(f"layer.{i}.ffn") for i in range(len(slots))]
    for layer, chosen in trace.passes:
        needed = chosen.any(0)
        missing = np.flatnonzero(needed & ~here[layer])
        for mask in chosen:
            policies[layer].used(mask)
        here[layer] = kept(policies[layer], needed | here[layer], slots[layer])
        section = starts[layer]
        assert section is not None
        missed = (places[layer][missing] if places else missing).tolist()
        count.missed += len(missed)
        count.bytes_wanted += len(missed) * size
        for extent in extents(layer, missed, size // parts, gap):
            _, nbytes = pages_of(section.offset + extent.first * (size // parts), extent.count * (size // parts))
            count.reads += parts
            count.bytes_read += parts * nbytes
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--ram", type=float, nargs="+", default=[0.0, 0.125, 0.25, 0.5], help="parts of all neurons")
    parser.add_argument("--gap", type=int, nargs="+", default=[4096, 16384], help="bytes read rather than skipped")
    args = parser.parse_args()
    with Bundle(args.bundle) as bundle:
        header, rates = bundle.header, rates_of(bundle)
    assert rates is not None
    trace = Trace.load(args.trace, header.model.neurons)
    policies: dict[str, MakePolicy] = {"frequency": Frequency, "last tokens": LastTokens}
    print(f"{trace.tokens} tokens\n{'RAM':>6} {'gap':>6} {'policy':12} {'order':14} {'B/token':>9}"
          f" {'reads':>6} {'run':>5} {'wanted':>6}")  # fmt: skip
    for ram in args.ram:
        slots = shares(rates, int(ram * rates.size))
        for gap in args.gap:
            for name, policy in policies.items():
                _show(ram, gap, name, "as packed", replay(trace, header, rates, slots, policy, gap))
            for order, numbers in _orders(trace, header.model.layers, rates).items():
                _show(ram, gap, "frequency", order, replay(trace, header, rates, slots, Frequency, gap, numbers))


def _orders(trace: Trace, layers: int, rates: Floats) -> dict[str, list[npt.NDArray[np.int64]]]:
    """Other orders on the card; that of the trace knows what it is judged on: none could be much better."""
    random = np.random.default_rng(0)
    return {
        "random": [random.permutation(rates.shape[1]) for _ in range(layers)],
        "hottest first": [np.argsort(-rate, kind="stable") for rate in rates],
        "of this trace": [card_order(trace.of_layer(i)) for i in range(layers)],
    }


def _show(ram: float, gap: int, policy: str, order: str, c: Counts) -> None:
    print(f"{100 * ram:5.1f}% {gap:6} {policy:12} {order:14} {c.bytes_a_token:9.0f}"
          f" {c.reads_a_token:6.1f} {c.run_length:5.2f} {100 * c.wanted_share:5.0f}%")  # fmt: skip


if __name__ == "__main__":
    main()
