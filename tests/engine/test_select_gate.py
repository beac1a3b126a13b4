"""The gate as the decision: exact where there are zeros, thresholds elsewhere, what is read, what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle import header, prefix
from flashd.bundle.arrays import PlainNeurons, PlainRows, QuantRows
from flashd.bundle.errors import BadSection, DamagedHeader
from flashd.bundle.prefix import VERSION
from flashd.bundle.reader import Bundle, dequantise
from flashd.bundle.rows import codec
from flashd.bundle.rows.formats import NeuronFormat
from flashd.bundle.rows.kinds import BLOCK, Floats, RowKind
from flashd.cli.main import main
from flashd.engine.forward.ffn.selected import Gate, SelectedFfn
from flashd.engine.forward.paged import PagedModel
from flashd.engine.planning.plan import make_plan, rates_of
from flashd.errors import DataError, MemoryTooSmall
from flashd.pack.lossy import gate_search as gated_layers
from flashd.pack.lossy import gates
from flashd.pack.lossy.calibration import Seen
from flashd.pack.lossy.gates import Gating, fit
from flashd.pack.lossy.narrow_groups import Judgement
from flashd.pack.pack import pack
from tests.engine.test_paths import all_logits, opened
from tests.engine.test_select import break_off_and_go_on, model_of
from tests.engine.test_select_experts import Biased
from tests.fuzz.test_files import signed_again
from tests.goldens.models import GOLDENS, HIDDEN, LAYERS, NEURONS, TOKENS
from tests.lab.replay import Trace
from tests.reference import relative

FILLED = 224  # neurons, with those that fill the last block
LIKE_TO_COME = "".join(
    f"{n} of the {w} there, then the other {w}; " for n, w in enumerate(("cat", "moth", "path") * 70)
)


@pytest.fixture
def always_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a random model's neurons fire, and a card reads across what does not."""
    monkeypatch.setattr("flashd.pack.lossy.gate_search.WORTH", 9.0)


def source_of(folder: Path, activation: str) -> Path:
    golden = GOLDENS["llama-fatrelu"]
    return dataclasses.replace(golden, keys=golden.keys | {"hidden_activation": activation}).write(folder / "m.gguf")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ReLU model of which one neuron in ten fires, so that its gates pay. Do not write to it."""
    golden = GOLDENS["llama-relu"]
    model = Biased(golden.architecture, golden.keys, golden.layer, golden.model, against=(0.1, 0.1, 0.1, 0.1))
    return model.write(tmp_path_factory.mktemp("sparse") / "m.gguf")


@pytest.fixture(scope="module")
def gated(sparse: Path) -> Path:
    """Its bundle, int4 rows. Do not write to it."""
    out = sparse.with_name("gated.flash")
    assert pack(sparse, out, "int4", allowed=Gating(0.01, LIKE_TO_COME)).selection is not None
    return out


@pytest.fixture(scope="module")
def silu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose thresholds lose something, f16 rows. Do not write to it."""
    folder = tmp_path_factory.mktemp("silu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashd.pack.lossy.gate_search.WORTH", 9.0)
        patch.setattr("flashd.pack.lossy.gate_search.LEVELS", (0.4,))
        pack(GOLDENS["llama3"].write(folder / "m.gguf"), folder / "m.flash", "f16", allowed=Gating(0.9, LIKE_TO_COME))
    return folder / "m.flash"


def all_take_part(model: PagedModel) -> None:
    chooser = model._ffn._choose  # type: ignore[attr-defined]
    assert isinstance(chooser, Gate)
    chooser._parts = [(rows, np.zeros_like(floors)) for rows, floors in chooser._parts]


def all_layers_are_dense(model: PagedModel, kind: RowKind) -> None:
    """Asserts that each layer is what a dense product with the bundle's own rows makes of all neurons."""
    h = np.random.default_rng(1).standard_normal((7, HIDDEN)).astype(np.float32)
    bundle, ffn, m = model._bundle, model._ffn, model._bundle.header.model
    form = bundle.header.neuron
    for i in range(LAYERS):
        units = form.views(np.frombuffer(bundle.read(f"layer.{i}.ffn"), np.uint8).reshape(-1, form.nbytes))
        *arrays, _ = units.arrays()
        of_rows = PlainRows if kind == "f16" else QuantRows
        up, down = (dequantise(of_rows(*(a[:, part] for a in arrays)), kind) for part in (0, 1))  # type: ignore[arg-type]
        gate, up_products = h @ dequantise(bundle.rows(f"layer.{i}.gate"), kind).T, h @ up.T
        if m.activation == "fatrelu":
            a = np.where(gate > m.threshold, gate, 0)
        else:
            a = np.maximum(gate, 0) ** (2 if m.activation == "relu2" else 1)
        expected = (a * (np.maximum(up_products, 0) if m.activation == "drelu" else up_products)) @ down
        assert np.abs(ffn(i, h, lambda *step: None) - expected).max() < 1e-4 * np.ptp(expected)


# --- exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "kind"), [("relu", "int4"), ("drelu", "int4"), ("fatrelu", "int8"), ("relu2", "f16")]
)
def test_where_the_activation_has_zeros_it_is_the_exact_model_at_the_same_rows(
    tmp_path: Path, activation: str, kind: RowKind, always_worth: None
) -> None:
    source = source_of(tmp_path, activation)
    header = pack(source, tmp_path / "g.flash", kind, allowed=Gating(0.01, LIKE_TO_COME))
    with model_of(tmp_path / "g.flash", FILLED) as model:
        all_layers_are_dense(model, kind)
        expected = all_logits(model, TOKENS.tolist(), 48)
    # a column of down is a row here, and part of its group's rows in the exact bundle: each is rounded in its way
    pack(source, tmp_path / "e.flash", kind)
    with opened(tmp_path / "e.flash", 0.5, 64, "float32") as model:
        apart = relative(all_logits(model, TOKENS.tolist(), 48), expected)
        assert apart < {"int4": 0.3, "int8": 0.02, "f16": 1e-5}[kind]
    for slots, chunk in ((0, 48), (60, 5), (FILLED, 1)):
        with model_of(tmp_path / "g.flash", slots) as model:
            difference = np.abs(all_logits(model, TOKENS.tolist(), chunk) - expected).max()
            assert difference < 1e-5 * np.ptp(expected), (slots, chunk)
            assert (model.card.bytes_wanted == 0) == (slots == FILLED)
    s = header.selection
    assert s is not None and s.kind == "gate" and s.thresholds == [0.0] * LAYERS
    assert abs(s.loss) < 1e-6
    assert s.chosen == s.fired and all(0.3 < share < 0.6 for share in s.fired)


def test_a_token_reads_the_rows_of_those_that_fire_and_no_gates(
    sparse: Path, gated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(sparse, gated.with_name("exact.flash"), "int4")
    with Bundle(gated.with_name("exact.flash")) as exact:
        group_bytes = exact.header.group.nbytes
    trace, read = Trace(), set[str]()
    real = Bundle._checked

    def checked(self: Bundle, section: header.Section, *args: Any) -> bytes:
        read.add(section.name)
        return real(self, section, *args)

    with model_of(gated, 0, on_chosen=trace.record) as model:
        monkeypatch.setattr(Bundle, "_checked", checked)
        form = model._bundle.header.neuron
        assert form.nbytes < 0.65 * group_bytes / BLOCK
        for token in TOKENS[:20].tolist():
            before = model.card.bytes_wanted
            trace.passes.clear()
            model.forward(np.array([token]), np.array([0]))
            count = sum(int(mask.sum()) for _, mask in trace.passes)
            assert model.card.bytes_wanted - before == count * form.nbytes
            assert 0 < count < 0.3 * LAYERS * NEURONS
    assert read == {"head"}  # which input embeddings come from too


def test_a_pass_that_breaks_off_leaves_the_next_one_right(gated: Path) -> None:
    break_off_and_go_on(gated)


def test_the_plan_counts_gates(gated: Path) -> None:
    with Bundle(gated) as bundle:
        rates = rates_of(bundle)

        def planned(memory: int) -> Any:
            return make_plan(bundle.header, memory=memory, context=64, threads=1, base=0, rates=rates)

        least = planned(1 << 30).smallest
        with pytest.raises(MemoryTooSmall, match="the smallest that works is --memory"):
            planned(least - 1)
        plan = planned(least + 100 * bundle.header.unit_bytes)
        assert sum(plan.slots) == 100 and plan.total <= plan.memory
        sections = {s.name: s.length for s in bundle.header.sections}
        held = sum(sections[f"layer.{i}.{p}"] for i in range(LAYERS) for p in ("gate", "floors"))
        assert plan.parts["gates"] == held > LAYERS * FILLED * bundle.header.row_format("gate").nbytes
        model = PagedModel(bundle, plan)
        try:
            model.forward(TOKENS[:5], np.array([4]))
            assert 0 < model.hit_rate < 1 and not model.drafts and not model.shares_reads
        finally:
            model.close()


# --- thresholds -------------------------------------------------------------------------------------------


def test_a_layer_is_what_a_dense_product_makes_of_those_above_their_floors(silu: Path) -> None:
    h = np.random.default_rng(1).standard_normal((7, HIDDEN)).astype(np.float32)
    with model_of(silu, 50) as model:
        ffn, bundle = model._ffn, model._bundle
        assert isinstance(ffn, SelectedFfn)
        for i in range(LAYERS):
            gates = dequantise(bundle.rows(f"layer.{i}.gate"), "f16")
            form = bundle.header.neuron
            units = form.views(np.frombuffer(bundle.read(f"layer.{i}.ffn"), np.uint8).reshape(-1, form.nbytes))
            assert isinstance(units, PlainNeurons)
            up, down = units.w[:, 0].astype(np.float32), units.w[:, 1].astype(np.float32)
            products = h @ gates.T
            a = products / (1 + np.exp(-products))
            chosen = np.abs(a) > bundle.floats(f"layer.{i}.floors")
            assert 0.2 < chosen.mean() < 0.9
            expected = (a * chosen * (h @ up.T)) @ down
            assert np.abs(ffn(i, h, lambda *step: None) - expected).max() < 1e-4 * np.ptp(expected)


def test_with_no_floors_it_is_the_dense_model(silu: Path) -> None:
    expected = GOLDENS["llama3"].logits("llama3")
    with model_of(silu, 40) as model:
        lossy = np.abs(all_logits(model, TOKENS.tolist(), 20) - expected).max()
        all_take_part(model)
        assert np.abs(all_logits(model, TOKENS.tolist(), 20) - expected).max() < 1e-3 * np.ptp(expected) < lossy


def test_what_the_window_holds_changes_no_logit(silu: Path) -> None:
    found = []
    for slots in (0, 33, FILLED):
        with model_of(silu, slots) as model:
            found += [all_logits(model, TOKENS.tolist(), chunk) for chunk in (48, 1)]
    assert max(np.abs(logits - found[0]).max() for logits in found) < 1e-4 * np.ptp(found[0])


def test_the_header_says_what_was_measured(silu: Path) -> None:
    with Bundle(silu) as bundle:
        s, rates = bundle.header.selection, rates_of(bundle)
        floors = [bundle.floats(f"layer.{i}.floors") for i in range(LAYERS)]
    assert s is not None and rates is not None and s.kind == "gate" and s.ranks == []
    assert s.tokens == 3 * 127 and s.perplexity != s.perplexity_exact and 0.55 < np.mean(s.chosen) < 0.65
    assert len(set(s.chosen)) > 1 and min(s.thresholds) > 0 and min(s.fired) > 0.99
    assert np.allclose(rates[:, :NEURONS].mean(1), s.chosen) and (rates[:, NEURONS:] == 0).all()
    for floor, threshold in zip(floors, s.thresholds, strict=True):
        assert (floor[:NEURONS] > 0).all() and (floor[:NEURONS] <= threshold / gates.LEAST * 1.001).all()
    assert silu.read_bytes()[8] == VERSION


def of_layers(*errors: list[float], fired: float = 1.0) -> list[gates.GatedLayer]:
    nothing, none = np.zeros(0, np.float32), np.zeros(0, np.bool_)
    return [gates.GatedLayer(nothing, none, nothing, np.array(e, np.float32), nothing, None, fired) for e in errors]


def test_layers_that_bear_it_skip_more() -> None:
    steps = np.arange(gates.STEPS) / gates.STEPS
    layers = of_layers(*(list(size * steps**2) for size in (1.0, 4.0, 100.0)))
    for level in gates.LEVELS:
        gates.share_out(layers, level)
        skipped = [layer.step / gates.STEPS for layer in layers]
        assert skipped == sorted(skipped, reverse=True) and level - 0.1 < np.mean(skipped) <= level + 1e-6
    gates.share_out(layers, 0.3)
    uniform = sum(layer.errors[3] for layer in layers)
    assert sum(layer.errors[layer.step] for layer in layers) < 0.5 * uniform
    gates.share_out(layers, 0.0)
    assert [layer.step for layer in layers] == [0, 0, 0]


def test_a_step_of_a_layer_that_fires_little_saves_little() -> None:
    layers = of_layers([0.0, 1.0] + [9.0] * 8, [0.0, 1.0] + [9.0] * 8)
    layers[1].fired = 0.1
    gates.share_out(layers, 0.1)
    assert [layer.step for layer in layers] == [1, 0]


@pytest.mark.parametrize("unequal", [False, True])
def test_neurons_are_weighed_where_that_errs_less(unequal: bool) -> None:
    random = np.random.default_rng(0)
    gates, up = (random.standard_normal((600, 96)).astype(np.float32) for _ in range(2))
    down = random.standard_normal((32, 96)).astype(np.float32)
    down /= np.linalg.norm(down, axis=0)
    if unequal:
        down *= np.exp(random.standard_normal(96)).astype(np.float32)
    seen = Seen(np.zeros((600, 32), np.float32), gates * up, np.linalg.norm(down, axis=0))
    layer, prefers = fit(gates, seen, down, np.ones((600, 32), np.float32), False)
    reach = np.corrcoef(layer.weigh, seen.reach)[0, 1] if layer.weigh.std() else 0
    assert (reach > 0.9) if unequal else layer.weigh.std() < 0.2
    assert list(layer.errors) == sorted(layer.errors) and layer.errors[0] == 0
    layer.step = 4
    chosen = layer.chosen(gates)
    assert abs(chosen.mean() - 0.6) < 0.01 and np.allclose(chosen.mean(0), layer.often, atol=1e-3)
    # in the order of the card, without the half that takes part most often
    missed = layer.missed(chosen)
    assert not missed[:, :48].any() and 0 < missed.sum() < 0.5 * chosen.sum()
    # of the others more may be skipped where the half that says most is in RAM and never skipped
    hotter = seen.sizes() > np.median(seen.sizes())
    assert np.array_equal(prefers.preferred, hotter) and (prefers.errors <= layer.errors).all()
    prefers.step = 8
    chosen = prefers.chosen(gates)
    assert chosen[:, hotter].all() and abs(chosen[:, ~hotter].mean() - 0.2) < 0.01
    assert not prefers.missed(chosen)[:, :48].any()
    assert prefers.missed(chosen).sum() == chosen[:, ~hotter].sum() < 0.6 * missed.sum()


# --- what pack chooses ------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    return (
        r.message
        for r in caplog.records
        if r.name == "flashd.pack.lossy.gate_search" and r.levelno >= logging.WARNING
    )


def test_where_no_threshold_costs_so_little_it_says_so_and_packs_exact(
    tmp_path: Path, always_worth: None, caplog: pytest.LogCaptureFixture
) -> None:
    source = GOLDENS["llama3"].write(tmp_path / "m.gguf")
    header = pack(source, tmp_path / "m.flash", "int4", allowed=Gating(-0.5, LIKE_TO_COME))
    (line,) = lines(caplog)
    assert "gates that skip 5 % of neurons raise perplexity by" in line and line.endswith("packed exact")
    pack(source, tmp_path / "e.flash", "int4")
    assert header.selection is None
    assert (tmp_path / "m.flash").read_bytes() == (tmp_path / "e.flash").read_bytes()


def test_where_a_card_gains_nothing_by_it_it_says_so_and_packs_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = pack(source_of(tmp_path, "relu"), tmp_path / "m.flash", "int4", allowed=Gating(0.01, LIKE_TO_COME))
    (line,) = lines(caplog)
    assert header.selection is None and "packed exact: its gates skip" in line and "up to 80 % are worth it" in line


@pytest.mark.parametrize(("allowed", "level"), [(0.031, 0.3), (0.006, 0.05), (9.0, 0.7), (0.004, None)])
def test_the_most_that_keeps_to_the_loss_is_taken(
    sparse: Path, tmp_path: Path, allowed: float, level: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = judged_by_level(monkeypatch, lambda preferring: 1.0)
    s = pack(sparse, tmp_path / "m.flash", "int4", allowed=Gating(allowed, LIKE_TO_COME)).selection
    assert len(levels) <= 2 * 4
    assert (s is None) if level is None else (s is not None and s.loss == pytest.approx(level / 10))


@pytest.mark.parametrize("sooner", [False, True])
def test_the_hotter_half_is_preferred_where_a_card_gives_the_others_sooner(
    sparse: Path, tmp_path: Path, sooner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by_level(monkeypatch, lambda preferring: 1.0 if preferring == sooner else 2.0)
    pack(sparse, tmp_path / "m.flash", "int4", allowed=Gating(9.0, LIKE_TO_COME))
    with Bundle(tmp_path / "m.flash") as bundle:
        floors = np.stack([bundle.floats(f"layer.{i}.floors")[:NEURONS] for i in range(LAYERS)])
    assert (floors == 0).mean() == (0.5 if sooner else 0)


def judged_by_level(monkeypatch: pytest.MonkeyPatch, units: Callable[[bool], float]) -> list[float]:
    """Of a loss that is a tenth of what is skipped, and `units` asked of the card where the hotter half is preferred.

    Returns the levels that will be tried.
    """
    levels: list[float] = []

    def tried(*others: Any) -> gated_layers._Skipping:
        layers, level = others[-2:]
        levels.append(level)
        asked = gates.Asked(100, [units(bool(layers[0].preferred.any()))], [1.0])
        return gated_layers._Skipping(level, Judgement(10.0, 10.0 * (1 + level / 10), 0.0), asked)

    monkeypatch.setattr("flashd.pack.lossy.gate_search.SPARSE", frozenset())
    monkeypatch.setattr("flashd.pack.lossy.gate_search.WORTH", 9.0)
    monkeypatch.setattr("flashd.pack.lossy.gate_search._try", tried)
    return levels


def test_what_has_no_such_gates_is_refused(tmp_path: Path) -> None:
    for name, why in (("opt", "has no gate rows"), ("qwen3moe", "in mixtures"), ("bitnet", "in BitNet")):
        with pytest.raises(DataError, match=why):
            pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4", allowed=Gating(0.1))
    source = source_of(tmp_path, "relu")
    with pytest.raises(DataError, match="longer one with --text"):
        pack(source, tmp_path / "m.flash", "int4", allowed=Gating(0.1, "too short"))
    assert not (tmp_path / "m.flash").exists()


def test_the_commands_know_it(sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "m.flash"
    text.write_text(LIKE_TO_COME)
    assert main(["pack", str(sparse), "--out", str(out), "--select", "gate", "--text", str(text)]) == 0
    assert "the gate chooses" in capsys.readouterr().out
    main(["info", str(out), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["selection"] == "gate" and facts["thresholds"] == [0.0] * LAYERS and "ranks" not in facts
    assert len(facts["chosen"]) == LAYERS and abs(facts["perplexity_loss"]) < 1e-6
    main(["plan", str(out), "--memory", "2G"])
    assert "gates" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0


# --- files that lie ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"kind": "predictor"}, DamagedHeader, "not every one of 4 layers has a predictor"),
        (
            {"kind": "predictor", "ranks": [0] * LAYERS},
            BadSection,
            r"layer\.0\.ffn' has .* bytes, but its model needs",
        ),
        ({"ranks": [32] * LAYERS}, DamagedHeader, "a gate decides only in layers"),
        ({"thresholds": [0.0]}, DamagedHeader, "not every one of 4 layers has a predictor"),
        ({"gated": False}, DamagedHeader, "a gate decides only in layers"),
        ({"biases": ["inputs"]}, DamagedHeader, "a gate decides only in layers"),
        ({"normed_neurons": 200}, DamagedHeader, "neurons of BitNet are never selected"),
        ({"ffn": "ternary"}, DamagedHeader, "neurons of BitNet are never selected"),
        ({"ffn": "int8"}, BadSection, r"layer\.0\.ffn' has .* bytes, but its model needs"),
        ({"neurons": 2 * FILLED}, BadSection, r"layer\.0\.ffn' has .* bytes, but its model needs"),
    ],
)
def test_a_header_with_other_gates_than_the_file_is_refused(
    gated: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with Bundle(gated) as bundle:
        header = bundle.header
    parts = {"model": header.model, "selection": header.selection, "formats": header.formats}
    changed: dict[str, Any] = {
        name: msgspec.structs.replace(part, **{k: v for k, v in changes.items() if k in part.__struct_fields__})  # type: ignore[union-attr,type-var]
        for name, part in parts.items()
    }
    body = msgspec.json.encode(msgspec.structs.replace(header, **changed))
    with pytest.raises(error, match=match):
        codec.decode_header(body, prefix.digest(body), gated.stat().st_size)


def test_floors_that_are_no_numbers_choose_nothing(gated: Path, tmp_path: Path) -> None:
    floors: Floats = np.full(FILLED, np.nan, np.float32)
    (tmp_path / "m.flash").write_bytes(signed(gated, "layer.1.floors", floors.tobytes()))
    trace = Trace()
    with model_of(tmp_path / "m.flash", 9, on_chosen=trace.record) as model:
        assert np.isfinite(model.forward(TOKENS[:5], np.array([4]))).all()
    assert not trace.of_layer(1).any() and trace.of_layer(0).any()


def signed(path: Path, name: str, data: bytes) -> bytes:
    """A bundle with other bytes where a section begins, and every checksum right."""
    raw = bytearray(path.read_bytes())
    with Bundle(path) as bundle:
        header, section = bundle.header, bundle.section(name)
    raw[section.offset : section.offset + len(data)] = data
    return signed_again(raw, header)


def test_one_format_for_the_file_and_the_window(gated: Path) -> None:
    with Bundle(gated) as bundle:
        form = bundle.header.neuron
        raw = np.frombuffer(bundle.read("layer.0.ffn"), np.uint8).reshape(-1, form.nbytes)
    # the row of up, and the column of down as a row of its own
    assert isinstance(form, NeuronFormat) and (form.inputs, form.biases, len(raw)) == (1, 0, FILLED)
    slots = form.empty(3)
    slots.take(form.views(raw)[:3])
    assert slots.nbytes == 3 * form.nbytes == 3 * 2 * form.row.nbytes
    assert all(np.array_equal(a, b) for a, b in zip(slots.arrays(), form.views(raw)[:3].arrays(), strict=True))
