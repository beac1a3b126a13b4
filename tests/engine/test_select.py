"""Selected neurons: the layout of one, the product, the window, the card, and what was measured, on a tiny OPT."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from flashd.bundle.arrays import PlainRows, QuantRows
from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows.formats import NeuronFormat
from flashd.bundle.rows.kinds import Floats, RowKind
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.line import Figures
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.forward.ffn.selected import SelectedFfn
from flashd.engine.forward.paged import PagedModel
from flashd.engine.paging import eviction
from flashd.engine.paging.eviction import Frequency, shares
from flashd.engine.planning.plan import Plan, make_plan, rates_of
from flashd.errors import DataError, MemoryTooSmall
from flashd.pack.lossy.predictors import Selecting
from flashd.pack.pack import pack
from flashd.pack.rounding.rows import encode_neurons, encode_rows
from tests import tiny
from tests.engine.one_text import generate
from tests.engine.test_paths import all_logits, opened
from tests.goldens.models import GOLDENS, TOKENS
from tests.lab.replay import LastTokens, Trace, replay

TEXT = "".join(f"the {w} there, then the other {w}; " for w in ("cat", "moth", "theatre", "heath", "path") * 12)
KINDS: list[RowKind] = ["int4", "int8", "f16"]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GOLDENS["opt"].write(tmp_path_factory.mktemp("opt") / "m.gguf")


@pytest.fixture(scope="module")
def selected(opt: Path) -> Path:
    """A bundle with a predictor that may lose much: the neurons of a random model are not sparse."""
    out = opt.with_name("selected.flash")
    pack(opt, out, "f16", allowed=Selecting(TEXT, max_loss=0.5))
    return out


def plan_of(bundle: Bundle, slots: int) -> Plan:
    full = make_plan(bundle.header, memory=1 << 40, context=128, threads=2, base=0, rates=rates_of(bundle))
    return dataclasses.replace(full, slots=(slots,) * bundle.header.model.layers)


@contextmanager
def model_of(path: Path, slots: int, **options: object) -> Iterator[PagedModel]:
    with Bundle(path) as bundle:
        plan = plan_of(bundle, slots)
        model = PagedModel(bundle, plan, feed_forward=SelectedFfn(bundle, plan, **options))  # type: ignore[arg-type]
        try:
            yield model
        finally:
            model.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_neuron_is_one_record(kind: RowKind) -> None:
    random = np.random.default_rng(0)
    form = NeuronFormat(kind, 64, 2, 2)
    gate, up, down = (random.standard_normal((5, 64)).astype(np.float32) for _ in range(3))
    bias = random.standard_normal((5, 2)).astype(np.float32)
    raw = encode_neurons([encode_rows(w, form.row) for w in (gate, up)], down.T, bias, form)
    assert raw.shape == (5, form.nbytes)
    parts = form.views(raw)
    assert np.array_equal(parts.bias, bias)
    *arrays, _ = parts.arrays()
    for i, weights in enumerate((gate, up, down)):
        of_matrix = [a[:, i] for a in arrays]
        rows = PlainRows(*of_matrix) if kind == "f16" else QuantRows(*of_matrix)  # type: ignore[arg-type]
        assert np.abs(dequantise(rows, kind) - weights).max() < {"int4": 0.4, "int8": 0.03, "f16": 2e-3}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_neuron_chosen_it_is_the_dense_model(opt: Path, kind: RowKind, tmp_path: Path) -> None:
    pack(opt, tmp_path / "s.flash", kind, allowed=Selecting(TEXT, max_loss=0.5))
    with model_of(tmp_path / "s.flash", 100) as model:
        ffn = model._ffn
        assert isinstance(ffn, SelectedFfn)
        ffn._choose = lambda layer, h: np.ones((len(h), 224), np.bool_)  # type: ignore[assignment]
        logits = all_logits(model, TOKENS.tolist(), 20)
    difference = np.abs(logits - GOLDENS["opt"].logits("opt")).max() / np.ptp(logits)
    assert difference < {"int4": 0.15, "int8": 0.01, "f16": 2e-5}[kind]


def test_gated_neurons_too(tmp_path: Path) -> None:
    golden = dataclasses.replace(
        GOLDENS["llama-relu"], keys=GOLDENS["llama-relu"].keys | {"hidden_activation": "drelu"}
    )
    source = golden.write(tmp_path / "m.gguf")
    pack(source, tmp_path / "s.flash", "f16", allowed=Selecting(TEXT, max_loss=0.5))
    pack(source, tmp_path / "d.flash", "f16")
    with opened(tmp_path / "d.flash", 0.5, 64) as model:
        expected = all_logits(model, TOKENS.tolist(), 48)
    with model_of(tmp_path / "s.flash", 60) as model:
        ffn = model._ffn
        assert isinstance(ffn, SelectedFfn)
        ffn._choose = lambda layer, h: np.ones((len(h), 224), np.bool_)  # type: ignore[assignment]
        assert np.abs(all_logits(model, TOKENS.tolist(), 48) - expected).max() < 2e-5 * np.ptp(expected)


@pytest.mark.parametrize("policy", [Frequency, LastTokens])
def test_what_the_window_holds_changes_no_logit(selected: Path, policy: type[Frequency] | type[LastTokens]) -> None:
    tokens, found = TOKENS.tolist(), []
    for slots in (0, 7, 60, 224):
        with model_of(selected, slots, policy=policy) as model:
            found += [all_logits(model, tokens, chunk) for chunk in (48, 5, 1)]
            assert (model.card.bytes_wanted == 0) == (slots == 224)
    assert max(np.abs(logits - found[0]).max() for logits in found) < 1e-4 * np.ptp(found[0])


def test_it_chooses_fewer_and_stays_close(selected: Path) -> None:
    with Bundle(selected) as bundle:
        s = bundle.header.selection
    assert s is not None and s.loss <= 0.5 and s.perplexity != s.perplexity_exact
    assert min(s.chosen) < 0.6 and all(0.2 < f < 0.8 for f in s.fired)
    with model_of(selected, 30) as model:
        logits = all_logits(model, TOKENS.tolist(), 48)
    expected = GOLDENS["opt"].logits("opt")
    assert 0 < np.abs(logits - expected).max() < 0.5 * np.ptp(expected)


@pytest.mark.parametrize("policy", [Frequency, LastTokens])
def test_the_replay_of_a_trace_counts_what_the_engine_counted(
    selected: Path, policy: type[Frequency] | type[LastTokens]
) -> None:
    for slots, gap in ((0, 4096), (40, 4096), (90, 16 << 10)):
        trace = Trace()
        with model_of(selected, slots, policy=policy, gap=gap, on_chosen=trace.record) as model:
            all_logits(model, TOKENS.tolist(), 1)
            counted = model.card
        with Bundle(selected) as bundle:
            said = replay(trace, bundle.header, rates_of(bundle), [slots] * 4, policy, gap)
        assert counted.bytes_read > 0
        assert said.reads == counted.reads and said.bytes_wanted == counted.bytes_wanted
        assert abs(said.bytes_read / counted.bytes_read - 1) < 0.05


def test_the_same_text_with_drafts_and_without(selected: Path) -> None:
    said = []
    for drafts in (True, False):
        with model_of(selected, 50) as model:
            tokens = generate(
                Conversation(model), TOKENS[:10].tolist(), Sampler(Sampling()), limit=12, eos=(), figures=Figures(),
                drafts=drafts,
            )  # fmt: skip
            said.append(list(tokens))
    assert said[0] == said[1] and len(said[0]) == 12


def test_a_pass_that_breaks_off_leaves_the_next_one_right(selected: Path) -> None:
    break_off_and_go_on(selected)


def break_off_and_go_on(path: Path) -> None:
    def stop(done: int, layers: int, nbytes: int) -> None:
        if nbytes > 40_000:
            raise KeyboardInterrupt

    with model_of(path, 20) as model:
        expected = model.forward(TOKENS[:9], np.array([8]))
        model.cache.truncate(0)
        with pytest.raises(KeyboardInterrupt):
            model.forward(TOKENS[:9], np.array([8]), stop)
        assert np.allclose(model.forward(TOKENS[:9], np.array([8])), expected, atol=1e-4)


def test_the_engine_s_own_path_and_its_plan(selected: Path) -> None:
    with Bundle(selected) as bundle:
        rates = rates_of(bundle)
        assert rates is not None
        least = make_plan(bundle.header, memory=1 << 30, context=64, threads=1, base=0, rates=rates).smallest
        with pytest.raises(MemoryTooSmall):
            make_plan(bundle.header, memory=least - 1, context=64, threads=1, base=0, rates=rates)
        memory = least + 100 * bundle.header.unit_bytes
        plan = make_plan(bundle.header, memory=memory, context=64, threads=1, base=0, rates=rates)
        assert sum(plan.slots) == 100 and plan.total <= memory
        held = sum(bundle.section(f"layer.{i}.{p}").length for i in range(4) for p in ("narrow", "wide", "lean"))
        assert plan.parts["predictors"] == held > 0
        model = PagedModel(bundle, plan)
        try:
            model.forward(TOKENS[:5], np.array([4]))
            assert 0 < model.hit_rate < 1 and not model.drafts
        finally:
            model.close()


def test_dense_bundles_know_nothing_of_it(opt: Path, tmp_path: Path) -> None:
    header = pack(opt, tmp_path / "d.flash", "int4")
    assert "selection" not in msgspec.json.decode(msgspec.json.encode(header))
    assert header.unit_bytes == header.group.nbytes
    with opened(tmp_path / "d.flash", 0.5, 64) as model:
        model.forward(TOKENS[:5], np.array([4]))


def test_what_cannot_be_met_is_refused(opt: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--select exact"):
        pack(opt, tmp_path / "m.flash", "f16", allowed=Selecting(TEXT, max_loss=-0.9))
    with pytest.raises(DataError, match="longer one with --text"):
        pack(opt, tmp_path / "m.flash", "f16", allowed=Selecting("too short"))
    dense = tiny.write(tmp_path / "silu.gguf")
    with pytest.raises(DataError, match="silu"):
        pack(dense, tmp_path / "m.flash", "f16", allowed=Selecting(TEXT))
    assert not (tmp_path / "m.flash").exists()


def test_slots_go_where_they_miss_least() -> None:
    rates = np.array([[0.9, 0.8, 0.7, 0.0], [0.75, 0.1, 0.1, 0.1]], np.float32)
    assert shares(rates, 3) == [2, 1]
    assert shares(rates, 8) == [4, 4] and shares(rates, 0) == [0, 0]


def test_policies_keep_what_they_should() -> None:
    rates: Floats = np.array([0.5, 0.1, 0.1, 0.1, 0.0], np.float32)
    last, often = LastTokens(rates), Frequency(rates)
    everyone = np.ones(5, np.bool_)
    assert np.flatnonzero(eviction.kept(last, everyone, 2)).tolist() == [0, 1]
    for used in (3, 4):
        mask = np.zeros(5, np.bool_)
        mask[used] = True
        last.used(mask)
        often.used(mask)
    assert np.flatnonzero(eviction.kept(last, everyone, 2)).tolist() == [3, 4]
    assert np.flatnonzero(eviction.kept(often, everyone, 1)).tolist() == [0]
