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

from flashd.bundle.errors import BadSection
from flashd.bundle.prefix import PREFIX, ROWS_OF_A_RUN, digest
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.codec import decode_header, encode
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.branches import Branches, behind
from flashd.engine.planning import held, unpacked
from flashd.engine.planning.parts import BUFFERS
from flashd.engine.planning.plan import make_plan, smallest
from flashd.pack.pack import pack
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


def test_embeddings_that_are_rows_of_the_head_in_ram_are_not_read(bundle: Path) -> None:
    with model(bundle, 0.5, None) as whole, model(bundle, 0.5, KEPT) as part:
        tied = whole._bundle.header.embedding_table == "head"
        tokens = np.array([KEPT + 3, 2, KEPT - 1, 2, KEPT])
        x, _ = whole._embed(tokens, np.arange(5))
        before = part.card.table_bytes
        assert np.array_equal(part._embed(tokens, np.arange(5))[0], x)
        each = part._bundle.table_record(part._bundle.header.embedding_table, 2)[1]
        assert part.card.table_bytes - before == each * (2 if tied else 4)
        assert whole.card.table_bytes == (0 if tied else 4 * each)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "LIKELY", KEPT)
    # a model of f16 rows is never held as a whole
    header = pack(tiny.write(tmp_path / "tiny.gguf"), tmp_path / "tiny.flash", "f16")
    least, m = smallest(header, 64, 0), header.model
    form, size = header.row_format("head"), unpacked.group_kept(header.group)
    head_bytes = unpacked.rows_kept(form, m.vocabulary)
    seen = set()
    for more in range(0, 4 * (m.layers * m.groups * size + head_bytes), size // 3):
        made = make_plan(header, memory=least + more, context=64, threads=1, base=0)
        pinned = sum(made.pinned)
        assert not made.resident and made.total <= made.memory
        # over all layers, the first getting one more, and what is left is not worth another group
        assert max(made.pinned) - min(made.pinned) <= 1 and list(made.pinned) == sorted(made.pinned, reverse=True)
        assert made.parts["pinned neurons"] == pinned * size
        if pinned < m.layers * m.groups:
            assert made.head_rows == KEPT
        else:
            assert made.head_rows == m.vocabulary or (made.head_rows - KEPT) % ROWS_OF_A_RUN == 0
        assert made.parts["head"] == unpacked.rows_kept(form, made.head_rows)
        passing = (m.layers * m.groups - pinned) * header.group.nbytes
        assert made.card_bytes == passing + (m.vocabulary - made.head_rows) * form.nbytes
        seen.add((pinned, made.head_rows))
    # whatever is given is used, from nothing to everything, and never less of it for more memory
    order = sorted(seen)
    assert order[0] == (0, KEPT) and order[-1] == (m.layers * m.groups, m.vocabulary)
    assert {pinned for pinned, _ in order} == set(range(m.layers * m.groups + 1))
    assert len([rows for _, rows in order if rows > KEPT]) > 5


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
    with pytest.raises(BadSection, match="'head' has runs of 4352 bytes, not 2176"):
        decode_header(body, digest(body), 1 << 40)
