"""What a person at a terminal sees while flashd works: bars on standard error, gone when they are done."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

MIB = 1 << 20


class Bar:
    """A progress bar, shown only on a terminal."""

    def __init__(self, what: str, unit: str) -> None:
        shape = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} " + unit + " {postfix}"
        self._bar = tqdm(
            total=0, desc=what, file=sys.stderr, leave=False, bar_format=shape, unit_scale=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def show(self, done: int, total: int, note: str = "") -> None:
        """Moves the bar to `done` of `total`."""
        if self._bar.disable:
            return
        self._bar.total, self._bar.n = total, done
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.refresh()

    def show_pass(self, done: int, layers: int, card_bytes: int) -> None:
        """An OnStep of the engine: layers of a pass done, and what the card has given so far."""
        self.show(done, layers, f"{card_bytes / MIB:.0f} MiB from the card" if card_bytes else "")
