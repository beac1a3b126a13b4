"""Which beginnings of prompts are kept on the card: those that came twice.

What two prompts have in common at their beginning is likely to come again: a system prompt, a trigger's text up to
its first sensor, a button's whole question. It is written after the second prompt has been answered, and never for a
prompt that came once. What is written is bounded, because cards wear.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.cache import snapshot
from flashd.engine.cache.snapshot import RUN, BadSnapshot, Origin, SnapshotHeader, shared
from flashd.engine.model.kv_cache import KvCache
from flashd.engine.planning.plan import Plan
from flashd.errors import NOT_JSON, CannotWrite
from flashd.system.new_file import NewFile
from flashd.system.paths import make_folder
from flashd.system.plain_file import open_plain, read_plain

log = logging.getLogger(__name__)

MOST_BYTES = 256 << 20
"""The most bytes of all snapshots together. Those used longest ago are removed first."""

MOST_BYTES_OF_ONE = MOST_BYTES // 4

MOST_BYTES_A_DAY = 256 << 20
"""The most bytes written to the card in a day. In five years that is less than fifteen times a card of 32 GB."""

MOST_SNAPSHOTS = 64

FREE_BYTES = 128 << 20
"""Bytes that are left free on the card for what matters more, such as the jobs' spool."""

MOST_NOTED, MOST_NOTED_TOKENS = 16, 4096
"""How many prompts are remembered to find what comes twice, and how many tokens such a prompt may have."""

MOST_BYTES_OF_NOTES = 1 << 19
"""The most bytes of the file of remembered prompts. A token takes up to 7."""

USED_SECONDS = 3600
"""The time at which a snapshot was used is not written again within so many seconds."""


class Noted(msgspec.Struct, frozen=True):
    """A prompt that was asked."""

    source: str  # Origin.key
    tokens: list[int]


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """The latest prompts, and how much was written today."""

    prompts: list[Noted] = []
    day: int = 0  # days since 1970
    written: int = 0  # bytes on that day


@dataclass(frozen=True)
class _Stored:
    path: Path
    header: SnapshotHeader


class Prefixes:
    """The snapshots of one bundle, in a folder that it shares with other bundles and processes.

    A snapshot that cannot be used is removed, with one line in the log. If nothing can be written, the log says so
    once, and answers are given without snapshots. `on_part` is called when a part of a snapshot is on the card.
    """

    def __init__(self, folder: Path, bundle: Bundle, plan: Plan, on_part: Callable[[], None] = lambda: None) -> None:
        self._folder, self._origin, self._on_part = folder, Origin.of(bundle, plan), on_part
        self._notes = folder / "asked.json"
        self._said: set[str] = set()

    def restore(self, prompt: Sequence[int], cache: KvCache) -> tuple[Floats | None, int]:
        """Reads the best snapshot of the prompt into the cache, if it has more than the cache has.

        The cache holds the first `cache.length` tokens of the prompt, before and afterwards. Returns the logits [V]
        behind the whole prompt, or None if no snapshot has them, and how many bytes were read.
        """
        best = max(
            self._stored(cache), key=lambda s: (s.header.usable(prompt), s.header.answers(prompt)), default=None
        )
        if best is None:
            return None, 0
        if best.header.usable(prompt) < cache.length + RUN and not best.header.answers(prompt):
            return None, 0
        before, logits = 0 if best.header.states else cache.length // RUN * RUN, None
        try:
            logits = snapshot.restore(best.path, self._origin, prompt, cache)
            self._note_use(best.path)
        except FileNotFoundError:
            pass  # another process removed it
        except (BadSnapshot, OSError) as error:
            self._drop(best.path, error)
        came = max(0, cache.length - before)
        read = came * cache.token_bytes + (cache.state_bytes if came else 0)
        return logits, read + (0 if logits is None else logits.nbytes)

    def learn(self, prompt: Sequence[int], cache: KvCache, logits: Floats) -> None:
        """Notes that `prompt` was asked. Keeps what it has in common with the beginning of an earlier prompt.

        The cache begins with the prompt. `logits` [V] are those behind it.
        """
        if len(prompt) > MOST_NOTED_TOKENS:
            return
        this, notes = Noted(self._origin.key, list(prompt)), self._read_notes()
        others = _others(this, notes)
        common = _common(this, others)
        kept = self._keep(prompt[:common], cache, logits if common == len(prompt) else None, notes)
        if this not in others or kept:
            prompts = others if this in others else [*others[1 - MOST_NOTED :], this]
            self._write_notes(prompts, notes, kept)

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens `prompt` has in common with the beginning of an earlier one, which `learn` will keep."""
        if len(prompt) > MOST_NOTED_TOKENS:
            return 0
        this = Noted(self._origin.key, list(prompt))
        return _common(this, _others(this, self._read_notes()))

    def keep(self, tokens: Sequence[int], cache: KvCache, session: str | None = None) -> None:
        """Keeps `tokens`, which the cache begins with, as far as the bounds allow. A session has one snapshot."""
        notes = self._read_notes()
        if kept := self._keep(tokens, cache, None, notes, session):
            self._write_notes(notes.prompts, notes, kept)

    # --- inside -------------------------------------------------------------------------------------------

    def _keep(
        self, tokens: Sequence[int], cache: KvCache, logits: Floats | None, notes: Notes, session: str | None = None
    ) -> int:
        """Writes a snapshot if that is worthwhile and allowed. Returns its bytes, or 0 if it wrote none."""
        fits = (MOST_BYTES_OF_ONE - snapshot.nbytes(0, cache, self._origin)) // cache.token_bytes
        known = cache.longest(min(len(tokens), fits))
        if known < len(tokens):
            tokens, logits = tokens[:known], None
        # a few tokens save little, unless the logits behind them save the whole pass
        if (len(tokens) < RUN and logits is None) or self._has(tokens, cache, logits is not None):
            return 0
        nbytes = snapshot.nbytes(len(tokens), cache, self._origin)
        # the notes are written too
        if not self._may_write(nbytes + MOST_BYTES_OF_NOTES, notes):
            return 0
        try:
            make_folder(self._folder, 0o700)
            if shutil.disk_usage(self._folder).free < nbytes + FREE_BYTES:
                self._say(f"{self._folder}: the disk is nearly full, so no snapshots are kept")
                return 0
            self._make_room(nbytes)
            name = _name(tokens) if session is None else f"session-{xxhash.xxh3_64_hexdigest(session.encode())}"
            path = self._folder / f"{self._origin.key}-{name}.kv"
            snapshot.save(path, self._origin, tokens, cache, logits, self._on_part)
        except (CannotWrite, OSError) as error:
            self._say(f"no snapshot is kept: {error}")
            return 0
        return nbytes

    def _stored(self, cache: KvCache) -> Iterator[_Stored]:
        """This bundle's snapshots whose headers are right."""
        for path in self._folder.glob(f"{self._origin.key}-*.kv"):
            try:
                with os.fdopen(open_plain(path), "rb") as file:
                    yield _Stored(path, snapshot.read_header(file, self._origin, cache))
            except FileNotFoundError:
                continue  # another process removed it
            except (BadSnapshot, OSError) as error:
                self._drop(path, error)

    def _has(self, tokens: Sequence[int], cache: KvCache, whole: bool) -> bool:
        """Whether the snapshots that exist give all of `tokens` but a few, and if `whole` the logits behind them."""
        headers = [s.header for s in self._stored(cache)]
        if whole:
            return any(h.answers(tokens) for h in headers)
        return any(h.usable(tokens) > len(tokens) - RUN for h in headers)

    def _make_room(self, nbytes: int) -> None:
        """Removes the snapshots that were used longest ago, until there is room for `nbytes` more."""
        self._sweep()
        found = sorted((s.st_mtime_ns, s.st_size, p) for p in self._folder.glob("*.kv") if (s := _stat(p)))
        total, count = sum(size for _, size, _ in found), len(found)
        for _, size, path in found:
            if total + nbytes <= MOST_BYTES and count < MOST_SNAPSHOTS:
                return
            path.unlink(missing_ok=True)
            total, count = total - size, count - 1

    def _sweep(self) -> None:
        """Removes the temporary files of processes that were killed while they wrote."""
        for left in self._folder.glob(".*.kv.*.partial"):
            owner = left.name.split(".")[-2]
            # this process is not writing now
            if owner.isdigit() and (int(owner) == os.getpid() or not Path(f"/proc/{owner}").exists()):
                left.unlink(missing_ok=True)

    def _note_use(self, path: Path) -> None:
        if abs(time.time() - path.stat().st_mtime) > USED_SECONDS:
            os.utime(path)

    def _drop(self, path: Path, error: Exception) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as reason:
            self._say(f"{path}: {error}; it cannot be removed: {reason.strerror}")
            return
        log.warning("%s: %s; removed, and made again when it is needed", path, error)

    def _say(self, text: str) -> None:
        """Logs a text the first time."""
        if text not in self._said:
            log.warning("%s", text)
        self._said.add(text)

    def _read_notes(self) -> Notes:
        today = int(time.time() // 86400)
        try:
            notes = msgspec.json.decode(read_plain(self._notes, MOST_BYTES_OF_NOTES), type=Notes)
        except (OSError, *NOT_JSON):
            notes = Notes()
        return notes if notes.day == today else Notes(prompts=notes.prompts, day=today)

    def _write_notes(self, prompts: list[Noted], before: Notes, kept: int) -> None:
        """Writes which prompts were asked. `kept` bytes of a snapshot were written since `before` was read."""
        notes = Notes(prompts=prompts, day=before.day, written=before.written + kept)
        nbytes = len(msgspec.json.encode(notes))
        if not kept and not self._may_write(nbytes, before):
            return
        notes = msgspec.structs.replace(notes, written=notes.written + nbytes)
        try:
            make_folder(self._folder, 0o700)
            with NewFile(self._notes, 0o600) as new:
                new.write(msgspec.json.encode(notes), 0)
                new.publish()
        except (CannotWrite, OSError) as error:
            self._say(f"no snapshot is kept: {error}")

    def _may_write(self, nbytes: int, notes: Notes) -> bool:
        """Whether `nbytes` more are within the day's bound."""
        if notes.written + nbytes <= MOST_BYTES_A_DAY:
            return True
        self._say(f"{self._folder}: {MOST_BYTES_A_DAY >> 20} MiB were written today; no more are until tomorrow")
        return False


def _others(this: Noted, notes: Notes) -> list[Noted]:
    """The prompts that were asked, without those that `this` is the next turn of.

    The next turn of a chat begins with all that was said. That is in RAM, and does not mean that it comes again.
    """
    return [p for p in notes.prompts if not _goes_on(p, this)]


def _common(this: Noted, others: list[Noted]) -> int:
    return max((shared(p.tokens, this.tokens) for p in others if p.source == this.source), default=0)


def _goes_on(earlier: Noted, later: Noted) -> bool:
    """Whether the later prompt is the earlier one with more behind it."""
    n = len(earlier.tokens)
    return earlier.source == later.source and n < len(later.tokens) and later.tokens[:n] == earlier.tokens


def _name(tokens: Sequence[int]) -> str:
    return xxhash.xxh3_64_hexdigest(b"".join(t.to_bytes(4, "little") for t in tokens))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
