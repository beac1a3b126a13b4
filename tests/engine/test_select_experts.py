"""Neurons selected within experts: what a token reads, that answers are the model's own, and when it pays at all.

The model is a SmallThinker of which few neurons fire: one dimension of what goes into every FFN is large, and every
gate row is against it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle import prefix
from flashd.bundle.arrays import PlainNeurons
from flashd.bundle.errors import BadSection, DamagedHeader
from flashd.bundle.prefix import VERSION
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.bundle.rows.formats import GroupFormat, NeuronFormat
from flashd.bundle.rows.kinds import Floats
from flashd.cli.main import main
from flashd.engine.forward.ffn.router import Router
from flashd.engine.forward.ffn.selected import Predictor, SelectedFfn
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.kv_cache import SPARE
from flashd.engine.paging.eviction import Mask, Numbers
from flashd.engine.planning import parts
from flashd.engine.planning.plan import make_plan, rates_of
from flashd.errors import DataError, MemoryTooSmall
from flashd.pack.groups import group_neurons
from flashd.pack.lossy import predictors
from flashd.pack.lossy.predictors import PredictedFfn, PredictedLayer, Selecting
from flashd.pack.pack import pack
from tests.engine.test_paths import all_logits, opened
from tests.engine.test_select import TEXT, break_off_and_go_on, model_of
from tests.goldens.models import EXPERTS, GOLDENS, LAYERS, TOKENS, USED, Golden, mixture
from tests.lab.replay import Trace, replay

NEURONS, FILLED = 80, 96  # of an expert, and with those that fill its last block
AGAINST = (0.1, 0.11, 0.12, 0.25)
"""So that about one neuron in ten fires, of each layer."""

NEVER = 5
"""An expert that no token is routed to."""


@dataclasses.dataclass(frozen=True)
class Biased(Golden):
    """Dimension 0 of the residual stream is 4 in every layer; `against` it is each gate row of a layer."""

    against: tuple[float, ...] = ()

    def tensors(self) -> dict[str, Floats]:
        """By GGUF name."""
        out = super().tensors()
        for name, values in out.items():
            match name.split(".")[-2]:
                case "token_embd":
                    values[:, 0] = 4
                case "attn_q" | "attn_k" | "attn_v":
                    values[:, 0] = 0
                case "attn_output":
                    values[0] = 0
                case "ffn_gate_inp":
                    values[:, 0] = np.where(np.arange(EXPERTS) == NEVER, -9, 0)
                case "ffn_gate_exps" | "ffn_gate":
                    values[..., 0] = -self.against[int(name.split(".")[1])]
                case "ffn_down_exps" | "ffn_down":
                    values[..., 0, :] = 0
        return out


def biased(name: str, against: tuple[float, ...] = AGAINST) -> Biased:
    golden = GOLDENS[name]
    keys = golden.keys | {"expert_feed_forward_length": NEURONS, "hidden_activation": "relu"}
    return Biased(golden.architecture, keys, golden.layer | mixture(NEURONS), golden.model, against=against)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return biased("smallthinker").write(tmp_path_factory.mktemp("sparse") / "m.gguf")


@pytest.fixture(scope="module")
def selected(source: Path) -> Path:
    """With what was said while it was packed, in the file `said` beside it. Do not write to them."""
    saying = logging.FileHandler(source.with_name("said"))
    logging.getLogger("flashd").addHandler(saying)
    pack(source, source.with_name("selected.flash"), "f16", allowed=Selecting(TEXT, max_loss=0.05))
    logging.getLogger("flashd").removeHandler(saying)
    saying.close()
    return source.with_name("selected.flash")


def routes(monkeypatch: pytest.MonkeyPatch) -> list[Numbers]:
    """The experts [T, K] that passes use from now on, layer by layer."""
    out: list[Numbers] = []
    real = Router.__call__

    def call(self: Router, layer: int, x: Floats) -> tuple[Numbers, Floats]:
        used, weights = real(self, layer, x)
        out.append(used)
        return used, weights

    monkeypatch.setattr(Router, "__call__", call)
    return out


def all_that_fire(path: Path) -> Callable[..., Mask]:
    """A predictor that is never wrong: it looks at the gates themselves."""
    with Bundle(path) as bundle:
        form, gates = bundle.header.neuron, []
        for i in range(LAYERS):
            raw = np.frombuffer(bundle.read(f"layer.{i}.ffn"), np.uint8).reshape(-1, form.nbytes)
            rows = form.views(raw)
            assert isinstance(rows, PlainNeurons)
            gates.append(rows.w[:, 0].astype(np.float32).reshape(EXPERTS, FILLED, -1))

    def fires(self: Predictor, layer: int, h: Floats, expert: int = 0) -> Mask:
        return np.asarray(h @ gates[layer][expert].T > 0)

    return fires


def everything(self: Predictor, layer: int, h: Floats, expert: int = 0) -> Mask:
    """A predictor of a layer in which all neurons of an expert take part."""
    return np.ones((len(h), FILLED), np.bool_)


@pytest.mark.parametrize("name", ["smallthinker", "qwen3moe"])  # routers before and behind the attention
def test_with_all_that_fire_chosen_it_is_the_exact_model(
    tmp_path: Path, name: str, source: Path, selected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "smallthinker":
        source, selected = biased(name).write(tmp_path / "m.gguf"), tmp_path / "s.flash"
        pack(source, selected, "f16", allowed=Selecting(TEXT, max_loss=0.05))
    pack(source, tmp_path / "exact.flash", "f16")
    with opened(tmp_path / "exact.flash", 0.5, 64) as model:
        expected = all_logits(model, TOKENS.tolist(), 20)
    monkeypatch.setattr(Predictor, "__call__", all_that_fire(selected))
    trace = Trace()
    for slots in (0, 40, FILLED * EXPERTS):
        with model_of(selected, slots, on_chosen=trace.record) as model:
            for chunk in (20, 1):
                assert np.abs(all_logits(model, TOKENS.tolist(), chunk) - expected).max() < 1e-3 * np.ptp(expected)
    monkeypatch.setattr(Predictor, "__call__", everything)
    with model_of(selected, 40) as model:
        assert np.abs(all_logits(model, TOKENS.tolist(), 20) - expected).max() < 1e-3 * np.ptp(expected)
    share = np.mean([trace.of_layer(i).mean() for i in range(LAYERS)])
    assert 0.02 < share / (USED / EXPERTS) < 0.15


def test_a_token_reads_the_chosen_neurons_of_its_experts_alone(
    selected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, trace = routes(monkeypatch), Trace()
    with model_of(selected, 0, on_chosen=trace.record) as model:
        form = model._bundle.header.neuron
        for token in TOKENS[:20].tolist():
            before = model.card.bytes_wanted
            used.clear()
            trace.passes.clear()
            model.forward(np.array([token]), np.array([0]))
            for (layer, chosen), experts in zip(trace.passes, used, strict=True):
                of_expert = chosen.reshape(EXPERTS, FILLED).sum(1)
                assert set(np.flatnonzero(of_expert).tolist()) <= set(experts[0].tolist()), layer
            count = sum(int(mask.sum()) for _, mask in trace.passes)
            assert model.card.bytes_wanted - before == count * form.nbytes
            assert 0 < count < 0.5 * LAYERS * USED * FILLED


def test_the_replay_of_a_trace_counts_what_the_engine_counted(selected: Path) -> None:
    for slots, gap in ((0, 4096), (90, 16 << 10)):
        trace = Trace()
        with model_of(selected, slots, gap=gap, on_chosen=trace.record) as model:
            all_logits(model, TOKENS.tolist(), 1)
            counted = model.card
        with Bundle(selected) as bundle:
            said = replay(trace, bundle.header, rates_of(bundle), [slots] * LAYERS, gap=gap)
        assert counted.bytes_read > 0
        assert said.reads == counted.reads and said.bytes_wanted == counted.bytes_wanted
        assert abs(said.bytes_read / counted.bytes_read - 1) < 0.05


def test_what_the_window_holds_changes_no_logit_and_it_holds_no_more_than_it_may(selected: Path) -> None:
    found = []
    for slots in (0, 7, 100, FILLED * EXPERTS):
        with model_of(selected, slots) as model:
            ffn = model._ffn
            assert isinstance(ffn, SelectedFfn)
            for chunk in (48, 5, 1):
                found.append(all_logits(model, TOKENS.tolist(), chunk))
                assert all(window.used == min(slots, window.capacity) for window in ffn._windows)
            assert (model.card.bytes_wanted == 0) == (slots == FILLED * EXPERTS)
    assert max(np.abs(logits - found[0]).max() for logits in found) < 1e-4 * np.ptp(found[0])


def test_a_pass_that_breaks_off_leaves_the_next_one_right(selected: Path) -> None:
    break_off_and_go_on(selected)


def test_the_plan_counts_predictors_routers_and_windows(selected: Path) -> None:
    with Bundle(selected) as bundle:
        rates = rates_of(bundle)
        assert rates is not None

        def planned(memory: int) -> Any:
            return make_plan(bundle.header, memory=memory, context=64, threads=1, base=0, rates=rates)

        least = planned(1 << 30).smallest
        with pytest.raises(MemoryTooSmall):
            planned(least - 1)
        plan = planned(least + 100 * bundle.header.unit_bytes)
        assert sum(plan.slots) == 100 and plan.total <= plan.memory
        sections = {s.name: s.length for s in bundle.header.sections}
        held = {
            part: sum(sections[f"layer.{i}.{part}"] for i in range(LAYERS)) for part in ("narrow", "wide", "lean")
        }
        assert plan.parts["predictors"] == held["narrow"] + held["wide"] + held["lean"] > 0
        rotary = (64 + SPARE) * sections["rope"]  # for each token of the context
        assert plan.parts["attention"] == parts.attention_held(bundle.header, "float32") + rotary
        hottest = np.sort(rates.reshape(-1))[:-100]
        assert plan.card_bytes == pytest.approx(float(hottest.sum()) * bundle.header.unit_bytes, abs=1)
        for memory in (least, plan.memory):
            model = PagedModel(bundle, planned(memory))
            try:
                model.forward(TOKENS[:5], np.array([4]))
                assert (0 < model.hit_rate < 1) == (memory > least) and not model.drafts and not model.shares_reads
            finally:
                model.close()


def test_what_was_fitted_is_of_those_tokens_that_use_an_expert(selected: Path) -> None:
    with Bundle(selected) as bundle:
        s, rates = bundle.header.selection, rates_of(bundle)
        assert s is not None and rates is not None
        leans = [bundle.floats(f"layer.{i}.lean").reshape(EXPERTS, FILLED) for i in range(LAYERS)]
    assert all(0.02 < fired / (USED / EXPERTS) < 0.15 for fired in s.fired)
    assert np.allclose(s.chosen, rates.mean(1)) and max(s.chosen) < 0.2
    of_experts = rates.reshape(LAYERS, EXPERTS, FILLED)
    assert of_experts.max() <= 1 and (of_experts[:, -1] == 0).all() and (of_experts[:, :-1].max(2) > 0).all()
    # an expert of which nothing is known has all its neurons, and none of those that only fill it up
    for lean in leans:
        assert (lean[-1, :NEURONS] == predictors.ALWAYS).all() and (np.abs(lean[0, :NEURONS]) < 1e6).all()
        assert (lean[:, NEURONS:] == -predictors.ALWAYS).all()


def test_the_commands_know_it(selected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", str(selected), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["selection"] == "predictor" and facts["experts"] == EXPERTS and len(facts["chosen"]) == LAYERS
    main(["plan", str(selected), "--memory", "2G"])
    assert "predictors" in capsys.readouterr().out
    assert main(["verify", str(selected)]) == 0


# --- what pack chooses ------------------------------------------------------------------------------------


def test_where_most_neurons_fire_experts_stay_whole(
    tmp_path: Path, selected: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = biased("smallthinker", (-1.0,) * LAYERS).write(tmp_path / "m.gguf")
    header = pack(model, tmp_path / "whole.flash", "int4", allowed=Selecting(TEXT, max_loss=0.05))
    assert header.selection is None
    (line,) = [r.message for r in caplog.records if r.name == "flashd.pack.lossy.predictor_search"]
    assert "packed exact, with whole experts: single neurons take a card" in line and "80 %" in line
    pack(model, tmp_path / "exact.flash", "int4")
    assert (tmp_path / "whole.flash").read_bytes() == (tmp_path / "exact.flash").read_bytes()


def test_where_few_fire_neurons_are_single_and_it_says_why(selected: Path) -> None:
    with Bundle(selected) as bundle:
        assert bundle.header.selection is not None and bundle.header.selection.loss <= 0.05
    (line,) = selected.with_name("said").read_text().splitlines()
    assert "packed with single neurons: single neurons take a card" in line and "KiB in 8)" in line
    assert selected.read_bytes()[8] == VERSION


class _Firing(PredictedLayer):
    """Neurons that fire by themselves, so often."""

    def chosen(self, part: PredictedFfn, h: Floats) -> Mask:
        return np.random.default_rng(0).random((len(h), len(part.order))) < self.fired


def firing(share: float, neurons: int, tokens: int = 20) -> list[PredictedLayer]:
    unseen: Any = None
    part = PredictedFfn(np.arange(neurons), neurons, unseen, np.arange(tokens), 0)
    nothing = np.zeros(0, np.float32)
    return [_Firing([part], np.arange(1), np.zeros((tokens, 1), np.float32), share, nothing, nothing)]


@pytest.mark.parametrize(("share", "pays"), [(0.4, False), (0.1, True)])
def test_at_smallthinkers_sizes_one_neuron_in_ten_pays_and_four_do_not(share: float, pays: bool) -> None:
    """Of the 4B: hidden size 1536, experts of 768 neurons, int4 rows."""
    form = NeuronFormat("int4", 1536, 2)
    neurons = predictors.cost_of_neurons(firing(share, 768), form.nbytes)
    group = GroupFormat("int4", 1536, 2, neurons=group_neurons(768, 1536, 2, expert=True))
    whole = predictors.Cost(768 // group.neurons * group.nbytes + prefix.PAGE, 1)
    assert (neurons.weight <= predictors.WORTH * whole.weight) == pays
    assert abs(neurons.nbytes / whole.nbytes - (0.3 if pays else 0.92)) < 0.1


def test_a_predictor_s_reads_are_bridged_as_the_engine_s_are() -> None:
    from flashd.engine.paging.card import extents

    for share in (0.02, 0.1, 0.5):
        (layer,) = firing(share, 768)
        chosen = layer.chosen_of_texts(layer.parts[0])
        reads = [extents(0, np.flatnonzero(mask).tolist(), 2000) for mask in chosen]
        cost = predictors.cost_of_neurons([layer], 2000)
        assert cost.reads == pytest.approx(np.mean([len(r) for r in reads]))
        units = np.mean([sum(e.count for e in r) for r in reads])
        assert cost.nbytes == pytest.approx(2000 * units + prefix.PAGE * cost.reads)


def test_experts_whose_neurons_are_not_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its activation silu makes few neurons zero"):
        pack(GOLDENS["qwen3moe"].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "f16", allowed=Selecting(TEXT))


# --- headers that lie -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"count": 5}, DamagedHeader, "do not share out to 5 experts in groups"),
        ({"count": 3, "used": 2}, BadSection, r"layer\.0\.router' has .* bytes, but its model needs"),
        ({"count": 18}, DamagedHeader, "do not share out to 18 experts in groups"),
        ({"used": 7}, DamagedHeader, "a token uses 7 experts of 6"),
        ({"ranks": [64] * LAYERS}, BadSection, r"layer\.0\.narrow' has .* bytes, but its model needs"),
        ({"ranks": [32] * (LAYERS - 1)}, DamagedHeader, "not every one of 4 layers has a predictor"),
        ({"experts": None}, BadSection, r"layer\.0\.narrow' has .* bytes, but its model needs"),
        ({"neurons": FILLED * EXPERTS * 2}, BadSection, r"layer\.0\.ffn' has .* bytes, but its model needs"),
    ],
)
def test_a_header_with_other_experts_than_the_file_is_refused(
    selected: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with Bundle(selected) as bundle:
        header = bundle.header
    parts: list[Any] = [header.model.experts, header.model, header.selection]
    parts = [
        msgspec.structs.replace(p, **{k: v for k, v in changes.items() if k in p.__struct_fields__}) for p in parts
    ]
    model = msgspec.structs.replace(parts[1], **({} if "experts" in changes else {"experts": parts[0]}))
    body = msgspec.json.encode(msgspec.structs.replace(header, model=model, selection=parts[2]))
    with pytest.raises(error, match=match):
        codec.decode_header(body, prefix.digest(body), selected.stat().st_size)
