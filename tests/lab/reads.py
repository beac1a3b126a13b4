"""How much of what fio reaches the engine's reads reach: python -m tests.lab.reads FILE.flash

Two kinds of reads, both past the page cache: all that a pass streams past, in order, and single units in no order.
fio reads the same file with requests of the same size, as many at once. Run it with the card throttled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.engine.forward.ffn.streamed import stream_past
from flashd.engine.paging.card import READ_BYTES, CardPicks, CardStream, pages_of
from flashd.engine.paging.card_speed import IN_FLIGHT
from flashd.engine.planning.parts import BUFFERS

SECONDS = 8
"""Of each measurement."""


@dataclass(frozen=True)
class Rate:
    """What a card gave: bytes a second, and bytes of a read."""

    bandwidth: float
    read: int


def streamed(bundle: Bundle) -> Rate:
    """All of a pass for which nothing is pinned."""
    header = bundle.header
    stream = CardStream(bundle, stream_past(header, (0,) * header.model.layers, header.model.vocabulary), BUFFERS)
    started = time.perf_counter()
    for _ in chain.from_iterable(map(stream.section, range(len(header.ffn_sections)))):
        if time.perf_counter() - started > SECONDS:
            break
    rate = Rate(stream.stats.bytes_wanted / (time.perf_counter() - started), READ_BYTES)
    stream.close()
    return rate


def picked(bundle: Bundle) -> Rate:
    """Every other unit of the layers, none of which are neighbours."""
    header = bundle.header
    picks = CardPicks(bundle, 0, BUFFERS)
    units = np.arange(0, header.ffn_sections[0].count, 2, dtype=np.int32)
    started, layer = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        for _ in picks.take(layer % header.model.layers, units):
            """They are checked, and that is all."""
        layer += 1
    rate = Rate(picks.stats.bytes_read / (time.perf_counter() - started), picks.stats.bytes_read // picks.stats.reads)
    picks.close()
    return rate


def fio(path: Path, pattern: str, read: int) -> float:
    """Bytes a second of fio's."""
    size = pages_of(0, read)[1]
    command = [
        "fio", "--name=peer", f"--filename={path}", f"--rw={pattern}", f"--bs={size}", "--direct=1", "--readonly",
        "--ioengine=libaio", f"--iodepth={IN_FLIGHT}", f"--runtime={SECONDS}", "--time_based", "--output-format=json",
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(said[said.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with Bundle(args.bundle) as bundle:
        for name, pattern, measure in (("streamed", "read", streamed), ("single units", "randread", picked)):
            shares = []
            for _ in range(args.repeat):
                ours = measure(bundle)
                peer = fio(args.bundle, pattern, ours.read)
                shares.append(ours.bandwidth / peer)
                print(
                    f"{name}: reads of {ours.read >> 10} KiB, {ours.bandwidth / 1e6:.1f} MB/s, fio {peer / 1e6:.1f}"
                )
            print(f"{name}: {100 * median(shares):.0f} % of fio's, median of {args.repeat}", flush=True)


if __name__ == "__main__":
    main()
