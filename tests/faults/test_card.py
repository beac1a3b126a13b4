"""A card that is pulled, put back, rots, gives little or is slow, while a real model reads it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from flashd.bundle.errors import DamagedHeader, DamagedRun
from flashd.bundle.file import CardFile, Patience
from flashd.bundle.prefix import PREFIX
from flashd.bundle.reader import Bundle
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.contract import OnStep, silent
from flashd.engine.paging.card import READ_BYTES, CardStream, Extent
from flashd.engine.paging.card_speed import IN_FLIGHT
from flashd.errors import CardError, InputMissing
from tests.engine.test_paths import plan
from tests.faults.layers import Card, Seam
from tests.reference import Floats

TOKENS = [[3, 50, 7, 99], [12], [101, 5], [77], [9, 10, 11], [42]]
"""Passes enough for what is read ahead at the start to have been used up."""

Pass = Callable[..., Floats]


@contextmanager
def model_on(path: Path, patience: Patience | None = None) -> Iterator[PagedModel]:
    """A model of which nothing of the FFN is pinned."""
    with Bundle(path, patience) as bundle:
        model = PagedModel(bundle, plan(bundle, 0.0, context=128))
        try:
            yield model
        finally:
            model.close()


def text(model: PagedModel, on_step: OnStep = silent) -> list[Floats]:
    model.cache.truncate(0)
    return [model.forward(np.array(t, np.int64), np.arange(len(t)), on_step) for t in TOKENS]


def same(found: list[Floats], expected: list[Floats]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def expected(tiny_bundle: Path) -> list[Floats]:
    with model_on(tiny_bundle) as model:
        return text(model)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODEV])
def test_a_pulled_card_fails_in_words_and_works_when_it_is_back(
    card: Card, expected: list[Floats], error: int
) -> None:
    with model_on(card.path) as model:
        card.pull(error, after=2)
        with pytest.raises(CardError, match=r"model\.flash: reading at byte \d+: .*is the card in place") as caught:
            text(model)
        assert "\n" not in str(caught.value)
        with pytest.raises(CardError):
            text(model)
        card.put_back()
        assert same(text(model), expected)


def test_a_pulled_card_is_waited_for(card: Card, expected: list[Floats], caplog: pytest.LogCaptureFixture) -> None:
    looked = 0

    def while_waiting() -> None:
        nonlocal looked
        looked += 1
        if looked == 2:
            card.put_back()

    with model_on(card.path, Patience(60, while_waiting)) as model, caplog.at_level(logging.INFO):
        card.pull(after=2)
        assert same(text(model), expected)
    assert looked >= 2
    assert any("waiting 60 s for the card" in r.message for r in caplog.records)
    assert any("there again" in r.message for r in caplog.records)


def test_patience_ends(card: Card) -> None:
    with model_on(card.path, Patience(0.4)) as model:
        card.pull(after=1)
        with pytest.raises(CardError, match=r"did not come back within 0\.4 s"):
            text(model)


def test_patience_is_that_of_all_reads_together(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    """What is queued behind reads that gave up does not wait as long again."""
    with Bundle(card.path, Patience(0.4)) as bundle:
        stream = CardStream(bundle, [Extent(0, group, 1) for group in range(bundle.header.model.groups)], 6)
        with closing(stream):
            card.pull(after=1)
            with pytest.raises(CardError, match=r"did not come back within 0\.4 s"):
                list(stream.section(0))
            stream.restart()
            assert sum("waiting 0.4 s" in r.message for r in caplog.records) == IN_FLIGHT
            card.put_back()
            assert len([extent for extent, _ in stream.section(0)]) == bundle.header.model.groups


def test_who_waits_may_give_up(card: Card) -> None:
    def while_waiting() -> None:
        raise Enough

    with model_on(card.path, Patience(60, while_waiting)) as model:
        card.pull(after=1)
        with pytest.raises(Enough):
            text(model)


def test_a_bad_place_is_not_waited_for(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    def while_waiting() -> None:
        raise AssertionError("the card is there")

    with model_on(card.path, Patience(60, while_waiting)) as model:
        section = model._bundle.section("layer.1.ffn")
        card.wear(section.offset + 9)
        with pytest.raises(
            CardError, match=r"model\.flash: reading at byte \d+: .*though the card is there"
        ) as caught:
            text(model)
        at = int(str(caught.value).split("at byte ")[1].split(":")[0])
        assert at <= section.offset + 9 < at + READ_BYTES
    assert not [r.message for r in caplog.records if "waiting" in r.message]


def test_another_card_is_not_taken_for_it(card: Card, tiny_bundle: Path) -> None:
    with model_on(card.path) as model:
        card.pull(after=0)
        with pytest.raises(CardError):
            text(model)
        card.put_back()
        other = bytearray(tiny_bundle.read_bytes())
        other[PREFIX.size - 16] ^= 1  # another header
        fresh = card.path.with_name("fresh.flash")
        fresh.write_bytes(other)
        fresh.rename(card.path)
        with pytest.raises(CardError, match="is the card in place"):
            text(model)


class Enough(Exception):
    pass


@pytest.mark.parametrize("error", [CardError, Enough])
def test_what_failed_while_nobody_asked_is_read_again(card: Card, error: type[Exception]) -> None:
    """The reads ahead of the next pass fail after the last answer, or who asked for it gave up; the card is back
    before the next question."""

    def give_up() -> None:
        raise error

    with Bundle(card.path, Patience(60, give_up)) as bundle:
        stream = CardStream(bundle, [Extent(0, 0, 2), Extent(1, 0, 2)], 2)
        card.pull(after=0)
        stream.read_ahead()
        for read in stream._reads:
            assert isinstance(read.made.exception(), error)
        card.put_back()
        assert [data.shape[0] for i in range(2) for _, data in stream.section(i)] == [2, 2]
        stream.close()


@pytest.mark.parametrize("most", [4096, 5000, 12288])
def test_short_reads_are_gone_on_with(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[Floats], most: int
) -> None:
    """At the seam alone: the kernel takes a short answer of a FUSE file system for the end of the file."""
    card = Card(Seam(tmp_path, monkeypatch), tiny_bundle)
    with model_on(card.path) as model:
        card.hand_out(most)
        assert same(text(model), expected)


def test_a_slow_card_is_waited_for_and_work_is_seen_to_go_on(card: Card, expected: list[Floats]) -> None:
    steps = 0

    def on_step(done: int, layers: int, nbytes: int) -> None:
        nonlocal steps
        steps += 1

    with model_on(card.path) as model:
        card.slow(0.005)
        assert same(text(model, on_step), expected)
        assert steps >= 2 * len(TOKENS) * 3  # at each read and each layer


SECTIONS = [
    "tokenizer",
    "rope",
    "vectors",
    "head",
    "layer.0.vectors",
    "layer.1.qkv",
    "layer.2.output",
    "layer.1.ffn",
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_bit_that_flips_once_is_read_again(card: Card, section: str, caplog: pytest.LogCaptureFixture) -> None:
    with Bundle(card.path) as bundle:
        found = bundle.section(section)
        bundle.file.forget(0, bundle.file.size)
        card.flip(found.offset + found.length // 2, times=1)
        with caplog.at_level(logging.INFO):
            bundle.verify()
        assert sum("reading it once more" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_a_bit_that_stays_wrong_is_named(card: Card, section: str) -> None:
    with Bundle(card.path) as bundle:
        found = bundle.section(section)
        bundle.file.forget(0, bundle.file.size)
        card.flip(found.offset + found.length // 2)
        with pytest.raises(DamagedRun, match=rf"'{section}' is damaged at byte"):
            bundle.verify()


def test_a_bit_that_flips_while_it_answers(
    card: Card, expected: list[Floats], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # reads ahead may meet the flip before anybody asks
    with model_on(card.path) as model:
        section = model._bundle.section("layer.1.ffn")
        card.flip(section.offset + section.run + 9, times=1)
        assert same(text(model), expected)
        assert sum("reading it once more" in r.message for r in caplog.records) == 1
        card.flip(section.offset + section.run + 9)
        with pytest.raises(DamagedRun, match=r"'layer\.1\.ffn' is damaged"):
            text(model)
        card.put_back()
        assert same(text(model), expected)


def test_an_embedding_row_that_rots(card: Card) -> None:
    with Bundle(card.path) as bundle:
        section, form = bundle.section("head"), bundle.header.row_format("head")
        right = bundle.table_rows("head", np.array([37]))
        bundle.file.forget(0, bundle.file.size)
        card.flip(section.offset + 37 * form.nbytes + 5, times=1)
        assert np.array_equal(bundle.table_rows("head", np.array([37])), right)
        bundle.file.forget(0, bundle.file.size)
        card.flip(section.offset + 37 * form.nbytes + 5)
        with pytest.raises(DamagedRun):
            bundle.table_rows("head", np.array([37]))


def test_a_header_and_a_table_that_rot(card: Card) -> None:
    with Bundle(card.path) as bundle:
        table = bundle.header.checksums.offset
    for offset, error in ((PREFIX.size + 100, DamagedHeader), (table + 3, DamagedRun)):
        card.flip(offset, times=1)
        Bundle(card.path).close()
        card.flip(offset)
        with pytest.raises(error):
            Bundle(card.path)


def test_a_bundle_that_is_replaced_goes_on_being_read(
    tiny_bundle: Path, tmp_path: Path, expected: list[Floats]
) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "model.flash"))
    with model_on(path) as model:
        (tmp_path / "new").write_bytes(b"another file altogether")
        (tmp_path / "new").rename(path)
        assert same(text(model), expected)


def test_a_pipe_in_the_place_of_a_bundle_is_not_waited_for(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "model.flash"))
    with closing(CardFile(path, Patience())) as file:
        path.unlink()
        os.mkfifo(path)

        def fails(*_: object) -> bytes:
            raise OSError(errno.EIO, "no such card")

        monkeypatch.setattr(os, "pread", fails)
        with pytest.raises(CardError, match="is the card in place"):
            file.read(0, 10)
    with pytest.raises(InputMissing, match="is not a file"):
        CardFile(path, Patience())


def test_a_bundle_that_is_cut_in_place_is_said(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "model.flash"))
    with model_on(path) as model:
        with path.open("r+b") as file:
            file.truncate(600_000)
        with pytest.raises(CardError, match=r"model\.flash: the file ends at byte \d+; was it replaced"):
            text(model)


def test_a_bundle_that_is_written_over_in_place_is_said(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "model.flash"))
    with model_on(path) as model:
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        with pytest.raises(DamagedRun, match="damaged at byte"):
            text(model)
