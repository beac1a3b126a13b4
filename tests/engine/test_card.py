"""Reads from the card: what is read is what was asked for, once, in order, checked."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.errors import DamagedRun
from flashd.bundle.prefix import GAP_BYTES
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Bytes
from flashd.engine.paging.card import READ_BYTES, CardQueue, CardStream, Extent, extents
from flashd.errors import CardError


@contextmanager
def stream(path: Path, schedule: list[Extent], buffers: int = 3, used: int = 0) -> Iterator[CardStream]:
    with Bundle(path) as bundle:
        opened = CardStream(bundle, schedule, buffers, used=used)
        try:
            yield opened
        finally:
            opened.close()


@given(st.sets(st.integers(0, 300)), st.integers(1000, 200_000))
def test_extents_cover_what_is_missing_and_little_else(groups: set[int], group_bytes: int) -> None:
    found = extents(3, sorted(groups, reverse=True), group_bytes)
    read = [g for e in found for g in range(e.first, e.first + e.count)]
    assert read == sorted(set(read)) and set(read) >= groups
    assert all(e.section == 3 and e.count * group_bytes <= max(READ_BYTES, group_bytes) for e in found)
    # what is read beside the wanted lies in gaps small enough to be cheaper read than skipped
    for unwanted in set(read) - groups:
        before = max(g for g in groups if g < unwanted)
        after = min(g for g in groups if g > unwanted)
        assert (after - before - 1) * group_bytes <= GAP_BYTES
    # runs that could have been one read are
    for a, b in itertools.pairwise(found):
        assert b.first > a.first + a.count + GAP_BYTES // group_bytes or a.count == max(1, READ_BYTES // group_bytes)


def test_what_is_read_is_what_is_in_the_file(tiny_bundle: Path) -> None:
    schedule = [Extent(0, 0, 3), Extent(0, 5, 2), Extent(1, 1, 1), Extent(2, 0, 7)]
    raw = tiny_bundle.read_bytes()
    with stream(tiny_bundle, schedule) as opened, Bundle(tiny_bundle) as bundle:
        size = bundle.header.group.nbytes
        for _ in range(3):
            got = [(e, data.tobytes()) for layer in range(3) for e, data in opened.section(layer)]
            assert [e for e, _ in got] == schedule
            for extent, data in got:
                at = bundle.section(f"layer.{extent.section}.ffn").offset + extent.first * size
                assert data == raw[at : at + extent.count * size]


@pytest.mark.parametrize("used", [0, 1, 3])
def test_what_is_still_used_is_not_read_over(tiny_bundle: Path, used: int) -> None:
    schedule = [Extent(layer, first, 1) for layer in range(3) for first in range(4)]
    with stream(tiny_bundle, schedule, buffers=1, used=used) as opened:
        for _ in range(3):
            taken: list[tuple[Bytes, bytes]] = []
            for layer in range(3):
                for _, data in opened.section(layer):
                    taken = [*taken, (data, data.tobytes())][-used - 1 :]
                    for read in opened._reads:  # until all that may be read ahead is there
                        read.made.result()
                    assert all(now.tobytes() == then for now, then in taken)
            opened.restart()  # takes back all of them


def test_counts_of_one_pass(tiny_bundle: Path) -> None:
    schedule = [Extent(0, 0, 3), Extent(1, 0, 2)]
    with stream(tiny_bundle, schedule, buffers=1) as opened, Bundle(tiny_bundle) as bundle:
        size = bundle.header.group.nbytes
        reads = [data.size for _, data in opened.section(0)]
        assert reads == [3 * size]
        assert [data.size for _, data in opened.section(1)] == [2 * size]
        # the next pass's first extent is read ahead into the one buffer
        assert [data.size for _, data in opened.section(0)] == [3 * size]
        opened.restart()
        assert 3 <= opened.stats.reads <= 4
        assert 8 * size <= opened.stats.bytes_wanted <= 10 * size
        assert opened.stats.bytes_read <= opened.stats.bytes_wanted + opened.stats.reads * 2 * 4096


def test_restart_begins_a_pass_anew(tiny_bundle: Path) -> None:
    schedule = [Extent(0, 0, 1), Extent(0, 3, 1), Extent(1, 0, 1)]
    with stream(tiny_bundle, schedule) as opened:
        next(iter(opened.section(0)))
        opened.restart()
        assert [e for e, _ in opened.section(0)] == schedule[:2]
        assert [e for e, _ in opened.section(1)] == schedule[2:]


def test_a_damaged_group_is_named_before_it_is_used(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "damaged.flash"))
    with Bundle(path) as bundle:
        section = bundle.section("layer.1.ffn")
    with path.open("r+b") as file:
        file.seek(section.offset + 2 * section.run + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    with stream(path, [Extent(1, 0, 4)]) as opened, pytest.raises(DamagedRun, match=r"layer\.1\.ffn.*run 2"):
        list(opened.section(1))


def test_a_file_that_ends_too_early_is_a_card_error(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "short.flash"))
    with Bundle(path) as bundle:
        section = bundle.section("layer.2.ffn")
        with path.open("r+b") as file:
            file.truncate(section.offset + section.run // 2)
        opened = CardStream(bundle, [Extent(2, 0, 1)], 1)
        try:
            with pytest.raises(CardError, match="was it replaced"):
                list(opened.section(2))
        finally:
            opened.close()


def test_without_direct_reads_it_reads_buffered_and_says_so_once(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse_direct(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_direct)
    with caplog.at_level(logging.WARNING), stream(tiny_bundle, [Extent(0, 0, 3)]) as opened:
        for _ in range(3):
            assert [data.shape[0] for _, data in opened.section(0)] == [3]
    assert sum("no direct reads" in r.message for r in caplog.records) == 1


# --- a queue ----------------------------------------------------------------------------------------------


@contextmanager
def queue(path: Path, buffers: int) -> Iterator[CardQueue]:
    with Bundle(path) as bundle:
        opened = CardQueue(bundle, 2, buffers)
        try:
            yield opened
        finally:
            opened.close()


@pytest.mark.parametrize("buffers", [1, 2, 6])
def test_a_queue_gives_what_is_wanted_and_reads_a_right_guess_once(tiny_bundle: Path, buffers: int) -> None:
    raw = tiny_bundle.read_bytes()
    first, second = [Extent(0, 0, 2), Extent(0, 5, 1)], [Extent(1, 2, 2), Extent(1, 4, 1), Extent(1, 0, 2)]
    with queue(tiny_bundle, buffers) as opened, Bundle(tiny_bundle) as bundle:
        size = bundle.header.group.nbytes

        def taken() -> list[Extent]:
            out = []
            for extent, data in opened.take():
                at = bundle.section(f"layer.{extent.section}.ffn").offset + extent.first * size
                assert data.tobytes() == raw[at : at + extent.count * size]
                out.append(extent)
            return out

        for _ in range(3):
            opened.want(first)
            opened.guess([second[1]])
            assert taken() == first and taken() == []
            opened.want(second)
            assert sorted(taken(), key=second.index) == second
            opened.want([])
            assert taken() == []
    assert opened.stats.bytes_wanted == 3 * 8 * size


@pytest.mark.parametrize("buffers", [1, 6])
def test_a_wrong_guess_costs_its_bytes_at_the_most(tiny_bundle: Path, buffers: int) -> None:
    wrong, right = [Extent(2, i, 1) for i in range(4)], [Extent(2, 4, 2), Extent(2, 6, 1)]
    with queue(tiny_bundle, buffers) as opened, Bundle(tiny_bundle) as bundle:
        size = bundle.header.group.nbytes
        for _ in range(5):
            opened.want([])
            opened.guess(wrong)
            opened.want(right)
            assert [extent for extent, _ in opened.take()] == right
        opened.guess(wrong)
        opened.restart()
        assert list(opened.take()) == []
        opened.want(right)
        opened.restart()
        assert list(opened.take()) == []
    assert 5 * 3 * size <= opened.stats.bytes_wanted <= (5 * 3 + 3 + 6 * min(4, buffers)) * size
