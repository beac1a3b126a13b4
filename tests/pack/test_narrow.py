"""Groups of fewer bits: what is read is what was written, and a loss is measured before it is allowed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.arrays import QuantRows
from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows.bits import pack_bits, unpack
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.bundle.rows.kinds import NARROW, Bytes, Floats, RowKind
from flashd.engine.forward.constants import Constants, multiplied
from flashd.engine.forward.paged import PagedModel
from flashd.engine.forward.products import use_threads
from flashd.errors import DataError
from flashd.pack.lossy import narrow_groups as narrowing
from flashd.pack.lossy.calibration import Seen
from flashd.pack.lossy.narrow_groups import ErrorBudget, Narrowing, Starts, Weigh, cut, floats, starts
from flashd.pack.pack import pack
from flashd.pack.rounding.gptq import DOUBT, encode_fed, factor
from flashd.pack.rounding.rows import encode_groups, encode_rows
from tests import tiny
from tests.engine.test_paths import all_logits, opened, plan
from tests.goldens.models import GOLDENS
from tests.reference import relative

TEXT = "the quick brown fox jumps over the lazy dog and " * 400


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle most of whose groups have 3 or 2 bits: a random model bears no loss, so much is allowed."""
    folder = tmp_path_factory.mktemp("narrow")
    source = tiny.write(folder / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrowing, "ERROR_BUDGETS", (ErrorBudget(0.01, 0.01),))
        header = pack(source, folder / "narrow.flash", "int4", allowed=Narrowing(0.9, TEXT))
    assert header.narrowed
    assert any(a < b for a, b in zip(header.narrowed.int3, header.narrowed.int2, strict=True))
    assert any(b < header.model.groups for b in header.narrowed.int2)
    return folder / "narrow.flash"


@given(st.data())
def test_fewer_bits_widen_to_nibbles_that_stand_for_as_much(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(NARROW))
    form = GroupFormat(kind, 32, neurons=data.draw(st.sampled_from([32, 96])))
    bits, zero = form.row.bits, 1 << (form.row.bits - 1)
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    raw = random.integers(0, 256, (2, form.nbytes), dtype=np.uint8)
    groups = form.views(raw)
    for rows, row in ((groups.inputs, form.row), (groups.down, form.column)):
        assert isinstance(rows, QuantRows)
        q = random.integers(0, 1 << bits, (*rows.q.shape[:2], row.width), dtype=np.uint8)
        rows.q[..., : row.weight_bytes] = pack_bits(q, bits)
    wide = form.groups(raw)
    for rows, to, row in ((groups.inputs, wide.inputs, form.row), (groups.down, wide.down, form.column)):
        assert isinstance(rows, QuantRows) and isinstance(to, QuantRows)
        weights = to.q[..., : row.width // 2]
        was = unpack(rows.q[..., : row.weight_bytes], bits)
        assert (unpack(weights, 4).astype(int) - 8 == was.astype(int) - zero).all()
        assert (to.q[..., row.width // 2 :] == rows.q[..., row.weight_bytes :]).all()  # digits have 4 bits anyway
        assert (to.scale == rows.scale).all() and to.step.tobytes() == rows.step.tobytes()


@pytest.mark.parametrize("kind", NARROW)
def test_errors_that_count_more_are_smaller(kind: RowKind) -> None:
    random = np.random.default_rng(1)
    weights = random.standard_normal((64, 128)).astype(np.float32)
    weights[0] = 0
    weights[1] = 0.25
    weigh = np.where(np.arange(128) % 4 == 0, 100, 1).astype(np.float32)
    form = RowFormat(kind, 128)

    def error(counts: np.ndarray) -> tuple[float, float]:
        """Of the weights that count more, and of the others."""
        off = (decoded(encode_fed(weights, form, uncorrelated(counts)), form) - weights) ** 2
        assert off[0].max() == 0 and off[1].max() < 1e-4
        return float(off[:, weigh > 1].mean()), float(off[:, weigh == 1].mean())

    alike, weighed = error(np.ones(128)), error(weigh)
    assert weighed[0] < 0.8 * alike[0] and weighed[1] > alike[1]
    assert max(alike) < {"int3": 0.04, "int2": 0.15}[kind]  # of weights whose square is 1


@pytest.mark.parametrize("kind", NARROW)
def test_weights_that_count_nothing_or_everything_are_still_weights(kind: RowKind) -> None:
    weights = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32)
    form, unused, lopsided = RowFormat(kind, 64), np.ones(64, np.float32), np.ones(64, np.float32)
    unused[:32] = 0
    lopsided[0] = 1e8

    def error(counts: np.ndarray) -> float:
        back = decoded(encode_fed(weights, form, Weigh.of(seen(counts)).inputs), form)
        return float(((back - weights) ** 2).mean())

    alike = error(np.ones(64))
    assert error(unused) < 1.5 * alike and error(lopsided) < 4 * alike


def seen(counts: np.ndarray) -> Seen:
    h = np.random.default_rng(3).standard_normal((512, len(counts))) * np.sqrt(counts)
    return Seen(h.astype(np.float32), np.ones((512, 32), np.float32), np.ones(32, np.float32))


def uncorrelated(counts: np.ndarray) -> Floats:
    """The factor of inputs with such mean squares."""
    return np.diag(1 / np.sqrt(counts)).astype(np.float32)


def decoded(raw: Bytes, form: RowFormat) -> Floats:
    """Narrow rows as what they stand for."""
    rows = form.views(raw)
    return dequantise(form.wide(rows), "int4")


def mixed(tokens: int, width: int) -> Floats:
    """Inputs [tokens, width] that are mixtures of few things, and a little of their own."""
    random = np.random.default_rng(4)
    mixing = random.standard_normal((width // 8, width))
    drawn = np.random.default_rng(tokens)
    own = 0.2 * drawn.standard_normal((tokens, width))
    return (drawn.standard_normal((tokens, width // 8)) @ mixing + own).astype(np.float32)


@pytest.mark.parametrize("kind", NARROW)
def test_of_correlated_inputs_the_outputs_err_less(kind: RowKind) -> None:
    weights = np.random.default_rng(5).standard_normal((64, 128)).astype(np.float32)
    form, fit, others = RowFormat(kind, 128), mixed(1024, 128), mixed(500, 128)
    counts = np.square(fit).mean(0)

    def error(by: Floats) -> float:
        """Of the outputs, on inputs that nothing was fitted to."""
        return float(np.square(others @ (decoded(encode_fed(weights, form, by), form) - weights).T).mean())

    assert error(factor(fit, counts)) < 0.5 * error(uncorrelated(counts))


@pytest.mark.parametrize("kind", NARROW)
def test_of_uncorrelated_inputs_each_weight_is_rounded_by_itself(kind: RowKind) -> None:
    weights = np.random.default_rng(6).standard_normal((64, 128)).astype(np.float32)
    counts = np.random.default_rng(7).uniform(0.5, 2, 128).astype(np.float32)
    form, by = RowFormat(kind, 128), uncorrelated(counts)
    raw = encode_fed(weights, form, by)
    once = (1 / np.square(np.diag(by))).reshape(1, 4, 32).astype(np.float32)
    assert (raw == encode_rows(weights, form, weigh=once)).all()


def test_the_factor_is_that_of_the_inverse() -> None:
    x = mixed(256, 64)
    counts = np.square(x).mean(0)
    expected = (1 - DOUBT) * x.T @ x / 256
    expected[np.diag_indices(64)] = counts
    found = factor(x, counts)
    assert (np.tril(found, -1) == 0).all()
    assert np.allclose(found.T @ found @ expected, np.eye(64), atol=1e-3)


def test_a_plain_ffn_with_biases_and_a_last_group_that_is_not_full(tmp_path: Path) -> None:
    source = GOLDENS["opt"].write(tmp_path / "opt.gguf")
    header = pack(source, tmp_path / "m.flash", "int4", allowed=Narrowing(0.9, TEXT))
    assert header.narrowed
    with Bundle(tmp_path / "m.flash") as bundle:
        bundle.verify()
    with opened(tmp_path / "m.flash", 0.0, 64) as part, opened(tmp_path / "m.flash", 1.0, 64) as whole:
        ids, last = np.arange(2, 20), np.array([17])
        assert np.array_equal(whole.forward(ids, last), part.forward(ids, last))


@pytest.mark.parametrize("kind", ["int4", *NARROW])
def test_matrices_are_those_of_the_groups(tiny_bundle: Path, kind: RowKind) -> None:
    """The floats on which errors are measured are what the engine multiplies, whatever the bits on the card."""
    with Bundle(tiny_bundle) as bundle:
        header = bundle.header
    form = replace(header.group, kind=kind)
    random = np.random.default_rng(0)
    shape = (2 * form.neurons, form.hidden)
    matrices = [random.standard_normal(shape).astype(np.float32) for _ in range(form.inputs)]
    down = random.standard_normal(shape[::-1]).astype(np.float32)
    records = [encode_rows(w, form.row) for w in matrices]
    none = np.zeros((len(down.T), 0), np.float32), np.zeros(0, np.float32)
    groups = form.groups(encode_groups(records, down, *none, form, None))
    dense = floats(groups, form)
    use_threads(2)
    h = random.standard_normal((3, form.hidden)).astype(np.float32)
    gate, up = (h @ m.T for m in dense.inputs)
    expected = (gate / (1 + np.exp(-gate)) * up) @ dense.down.T
    session = Constants(header, "float32").groups(groups)
    assert relative(expected, multiplied(session, h=h, before=np.zeros_like(h))) < 1e-4


def test_every_path_computes_the_same(narrow: Path) -> None:
    tokens = list(range(2, 40))
    with opened(narrow, None, arithmetic="float32") as model:
        resident = all_logits(model, tokens, 16)
    for pinned in (0.0, 0.4, 1.0):
        with opened(narrow, pinned, arithmetic="float32") as model:
            assert relative(resident, all_logits(model, tokens, 16)) <= 1e-4


def test_a_pass_reads_fewer_bytes(narrow: Path, tiny_bundle: Path) -> None:
    def bytes_of_a_pass(path: Path) -> tuple[int, int]:
        with Bundle(path) as bundle:
            made = plan(bundle, 0.0, 64)
            model = PagedModel(bundle, made)
            try:
                for _ in range(8):
                    model.forward(np.arange(1), np.array([0]))
                read = model.card.bytes_wanted / 8
            finally:
                model.close()
            ffn = sum(part.count * part.form.nbytes for part in bundle.header.ffn_sections)
        assert ffn <= read < 1.3 * ffn  # some of the next pass is read ahead
        return int(read), ffn

    # more than half of a row of 64 weights is digits and scales, which stay
    assert bytes_of_a_pass(narrow)[1] < 0.87 * bytes_of_a_pass(tiny_bundle)[1]


def test_what_was_measured_is_in_the_bundle(narrow: Path) -> None:
    with Bundle(narrow) as bundle:
        bundle.verify()
        n = bundle.header.narrowed
        assert n and abs(n.loss) <= 0.9 and 0.001 < n.divergence < 0.5 and n.tokens > 1000


def test_where_no_loss_is_small_enough_it_is_packed_exact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny.write(tmp_path / "tiny.gguf")
    with caplog.at_level(logging.WARNING):
        header = pack(source, tmp_path / "m.flash", "int4", allowed=Narrowing(-0.99, TEXT))
    assert header.narrowed is None and "packed exact" in caplog.text
    with Bundle(tmp_path / "m.flash") as bundle:
        assert {part.form.kind for part in bundle.header.ffn_sections} == {"int4"}


def test_rows_of_other_bits_and_short_texts_are_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "tiny.gguf")
    with pytest.raises(DataError, match="int4 rows"):
        pack(source, tmp_path / "m.flash", "int8", allowed=Narrowing(0.1, TEXT))
    with pytest.raises(DataError, match="longer one with --text"):
        pack(source, tmp_path / "m.flash", "int4", allowed=Narrowing(0.1, "short"))
    assert not (tmp_path / "m.flash").exists()


def test_the_default_text_is_long_enough(tiny_bundle: Path) -> None:
    with Bundle(tiny_bundle) as bundle:
        weighed, judged = cut(bundle.read("tokenizer"), None, 512)
    assert len(weighed) == 11 and len(judged) == 3
    assert not {t.tobytes() for t in weighed} & {t.tobytes() for t in judged}


def test_groups_are_narrowed_from_the_last_on_while_the_budget_lasts() -> None:
    int3, int2 = np.array([4, 3, 2, 1], np.float32), np.array([40, 30, 20, 10], np.float32)
    assert starts(int3, int2, ErrorBudget(0.5, 0.5)) == starts(int3, int2, ErrorBudget(0, 0)) == Starts(4, 4)
    assert starts(int3, int2, ErrorBudget(9, 10)) == Starts(0, 3)
    assert starts(int3, int2, ErrorBudget(5, 10)) == Starts(1, 3)
    assert starts(int3, int2, ErrorBudget(np.inf, 0)) == Starts(0, 4)
    assert starts(int3, int2, ErrorBudget(np.inf, np.inf)) == Starts(0, 0)
