"""The head whose unlikely rows stay on the card: the same logits, for the bytes that were left out of RAM."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from flashd.bundle.codec import decode_header, encode
from flashd.bundle.errors import BadSection
from flashd.bundle.prefix import PREFIX, ROWS_OF_A_RUN, digest
from flashd.bundle.reader import Bundle
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.branches import Branches, behind
from flashd.engine.planning.plan import BUFFERS, Plan, make_plan, smallest
from flashd.pack.pack import pack
from flashd.system import memory as planning
from tests import tiny
from tests.engine.test_paths import plan

KEPT = 16


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    pack(tiny.write(folder / "tiny.gguf", tied=request.param), folder / "tiny.flash", "int4")
    return folder / "tiny.flash"


@contextmanager
def model(path: Path, pinned: float, head_rows: int | None) -> Iterator[PagedModel]:
    with Bundle(path) as opened:
        made = plan(opened, pinned, context=64)
        rows = opened.header.model.vocabulary if head_rows is None else head_rows
        running = PagedModel(opened, dataclasses.replace(made, head_rows=rows))
        try:
            yield running
        finally:
            running.close()


def two_passes(running: PagedModel) -> npt.NDArray[np.float32]:
    tokens = np.arange(12)
    first = running.forward(tokens, np.array([3, 11]))
    return np.concatenate([first, running.forward(np.array([5]), np.array([0]))])


@pytest.mark.parametrize("pinned", [0.0, 0.5, 1.0])
def test_logits_are_those_of_a_head_in_ram(bundle: Path, pinned: float) -> None:
    with model(bundle, pinned, None) as whole, model(bundle, pinned, KEPT) as part:
        assert np.array_equal(two_passes(whole), two_passes(part))


def test_what_is_not_in_ram_is_read_once_a_pass(bundle: Path) -> None:
    with Bundle(bundle) as opened:
        section = opened.section("head")
        missing = section.length - KEPT // ROWS_OF_A_RUN * section.run
    with model(bundle, 1.0, KEPT) as running:
        assert running.shares_reads
        two_passes(running)
    # and is read ahead into every buffer that is idle: here a pass has one extent
    times, rest = divmod(running.card.bytes_wanted, missing)
    assert rest == 0
    assert 2 <= times <= 2 + BUFFERS


def test_a_draft_chooses_among_the_rows_in_ram(bundle: Path) -> None:
    with model(bundle, 0.5, KEPT) as running:
        two_passes(running)
        guesses = running.draft(np.array([7]), Branches([np.arange(running.cache.length)], [behind(0)]))
        assert set(guesses.tokens[0].tolist()) <= set(range(KEPT)) and guesses.odds.sum() <= 1 + 1e-5
        assert running.cache.length == 14


def test_ram_goes_to_likely_rows_then_groups_then_the_other_rows(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LIKELY", KEPT)
    monkeypatch.setattr(planning, "_resident_parts", lambda header, context: None)
    with Bundle(bundle) as opened:
        header = opened.header
    least, a_group = smallest(header, 64, 0), header.model.layers * header.group.nbytes
    row, m = header.row_format("head").nbytes, header.model

    def of(memory: int) -> Plan:
        return make_plan(header, memory=memory, context=64, threads=1, base=0)

    assert (of(least).head_rows, of(least).pinned_groups) == (KEPT, 0)
    assert (of(least + a_group).head_rows, of(least + a_group).pinned_groups) == (KEPT, 1)
    full = of(least + m.groups * a_group + ROWS_OF_A_RUN * row)
    assert (full.head_rows, full.pinned_groups) == (KEPT + ROWS_OF_A_RUN, m.groups)
    assert full.card_bytes == (m.vocabulary - full.head_rows) * row
    everything = of(1 << 40)
    assert (everything.head_rows, everything.card_bytes) == (m.vocabulary, 0)
    for made in (of(least), full, everything):
        assert made.total <= made.memory
        assert made.parts["head"] == made.head_rows * row


def test_a_head_that_is_not_checked_by_rows_is_refused(bundle: Path) -> None:
    with Bundle(bundle) as opened:
        header = opened.header
    sections, first = [], 0
    for section in header.sections:
        run = 2 * section.run if section.name == "head" else section.run
        sections.append(msgspec.structs.replace(section, run=run, first=first))
        first += sections[-1].runs
    checksums = msgspec.structs.replace(header.checksums, length=8 * first)
    forged = msgspec.structs.replace(header, sections=sections, checksums=checksums)
    body = encode(forged, 1 << 40)[PREFIX.size :]
    with pytest.raises(BadSection, match="'head' has runs of 2432 bytes, not 1216"):
        decode_header(body, digest(body), 1 << 40)
