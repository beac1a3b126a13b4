"""Mixtures of experts: what is read from the card, what stays in RAM, and that answers depend on neither."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from flashd.bundle import prefix
from flashd.bundle.errors import BadSection, DamagedHeader, DamagedRun
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.cli.printing import cost_in_words
from flashd.engine import engine as engines
from flashd.engine.cost import cost
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.forward import attention
from flashd.engine.forward.attention import Attention
from flashd.engine.forward.ffn import experts
from flashd.engine.paging import card
from flashd.engine.paging.card import CardQueue, Extent
from flashd.engine.paging.card_speed import IN_FLIGHT, CardSpeed, remember
from flashd.engine.paging.eviction import LeastRecentlyUsed, Numbers
from flashd.engine.planning import parts, plan, unpacked
from flashd.engine.planning.draft import Pair
from flashd.engine.planning.parts import BUFFERS
from flashd.engine.planning.plan import make_plan
from flashd.errors import MemoryTooSmall
from flashd.graphs.constant import Arithmetic
from flashd.pack import groups
from flashd.pack.pack import pack
from flashd.system.memory import MIB
from tests.engine.test_paths import all_logits, opened
from tests.engine.test_paths import plan as made_plan
from tests.goldens.models import EXPERTS, GOLDENS, LAYERS, TOKENS, USED
from tests.reference import relative

ONE_BLOCK = 4096
"""The most bytes of a group, so that one has 32 neurons and an expert several."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture; of its experts, an expert is two groups."""
    folder = tmp_path_factory.mktemp("mixture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MOST_BYTES", ONE_BLOCK)
        pack(GOLDENS["qwen3moe"].write(folder / "m.gguf"), folder / "m.flash", "int4")
    return folder / "m.flash"


@pytest.fixture
def no_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "TRUSTED", 2.0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Numbers]]:
    """The experts [T, K] that a pass used, layer by layer."""
    out: list[Numbers] = []
    real = LeastRecentlyUsed.use

    def use(self: LeastRecentlyUsed, units: Numbers) -> None:
        out.append(units)
        real(self, units)

    monkeypatch.setattr(LeastRecentlyUsed, "use", use)
    yield out


def expert_bytes(bundle: Path) -> int:
    with Bundle(bundle) as opened_bundle:
        return opened_bundle.header.model.expert_groups * opened_bundle.header.group.nbytes


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 5, 6])
def test_a_token_reads_the_experts_that_are_not_in_ram(
    bundle: Path, asked: list[Numbers], no_guesses: None, capacity: int
) -> None:
    here = [OrderedDict.fromkeys(reversed(range(capacity))) for _ in range(LAYERS)]
    with opened(bundle, capacity / EXPERTS + 1e-6, 64) as model:
        for token in TOKENS[:30].tolist():
            before = model.card.bytes_wanted
            asked.clear()
            model.forward(np.array([token]), np.array([0]))
            assert len(asked) == LAYERS and all(used.shape == (1, USED) for used in asked)
            missed = 0
            for layer, used in zip(here, asked, strict=True):
                missed += sum(expert not in layer for expert in used[0].tolist())
                for expert in sorted(used[0].tolist(), reverse=True):
                    layer[expert] = None
                    layer.move_to_end(expert)
                while len(layer) > capacity:
                    layer.popitem(last=False)
            assert model.card.bytes_wanted - before == missed * expert_bytes(bundle)


def test_a_token_said_again_reads_nothing(bundle: Path, no_guesses: None) -> None:
    with opened(bundle, USED / EXPERTS + 1e-6, 64) as model:
        first = model.forward(TOKENS[:1], np.array([0]))
        read = model.card.bytes_wanted
        assert read > 0
        for _ in range(3):
            model.cache.truncate(0)
            assert np.array_equal(model.forward(TOKENS[:1], np.array([0])), first)
        assert model.card.bytes_wanted == read


@pytest.mark.parametrize("capacity", [0, 2])
def test_a_chunk_reads_each_expert_that_it_needs_once(
    bundle: Path, asked: list[Numbers], no_guesses: None, capacity: int
) -> None:
    with opened(bundle, capacity / EXPERTS + 1e-6, 64) as model:
        model.forward(TOKENS, np.array([0]))
        needed = [set(used.reshape(-1).tolist()) for used in asked]
        assert all(len(used) > capacity for used in needed)
        missed = sum(len(used - set(range(capacity))) for used in needed)
        assert model.card.bytes_wanted == missed * expert_bytes(bundle)


# routers behind and before the attention, one that takes something of its own, and experts of 4 bits in the file
@pytest.mark.parametrize("name", ["qwen3moe", "smallthinker", "gemma4-moe", "gpt-oss"])
@pytest.mark.parametrize("arithmetic", get_args(Arithmetic))
def test_answers_do_not_depend_on_what_is_in_ram_or_guessed(
    tmp_path: Path, name: str, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MOST_BYTES", ONE_BLOCK)
    pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    # several reads an expert, and some experts of each layer guessed in part
    monkeypatch.setattr(card, "READ_BYTES", 6 << 10)
    tokens = TOKENS[:10].tolist()
    with opened(tmp_path / "m.flash", 1.0, 64, arithmetic) as model:
        expected = {chunk: all_logits(model, tokens, chunk) for chunk in (1, 7)}
        assert np.array_equal(expected[1], expected[7])
        assert model.card.bytes_read == 0 and model.hit_rate == 1
    for trusted in (0.0, 2.0):
        monkeypatch.setattr(experts, "TRUSTED", trusted)
        for capacity in (0, 3):
            with opened(tmp_path / "m.flash", capacity / EXPERTS + 1e-6, 64, arithmetic) as model:
                for chunk, logits in expected.items():
                    assert np.array_equal(all_logits(model, tokens, chunk), logits)
                assert model.hit_rate < 1


@pytest.mark.parametrize("arithmetic", get_args(Arithmetic))
def test_experts_that_all_fit_are_constants_of_sessions(bundle: Path, arithmetic: Arithmetic) -> None:
    tokens = TOKENS[:10].tolist()
    with Bundle(bundle) as opened_bundle:
        header = opened_bundle.header
    made, less = (
        make_plan(header, memory=memory, context=64, threads=1, base=0, arithmetic=arithmetic)
        for memory in (1 << 30, plan.smallest(header, 64, 0, arithmetic=arithmetic) + (64 << 10))
    )
    assert made.constant_experts and made.pinned == made.groups and not made.buffers
    assert made.parts["experts"] >= LAYERS * EXPERTS * parts.expert_held(header.group, header.model, arithmetic)
    assert less.total < made.total and not less.constant_experts
    with opened(bundle, None, 64, arithmetic) as constant, opened(bundle, 1.0, 64, arithmetic) as unpacked:
        assert relative(all_logits(constant, tokens, 7), all_logits(unpacked, tokens, 7)) < 1e-5
        assert np.array_equal(all_logits(constant, tokens, 7), all_logits(constant, tokens, 1))


@pytest.mark.parametrize("name", ["qwen3moe", "granitehybrid", "llama3"])
def test_a_text_grows_on_where_free_memory_is_given_back(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    found = []
    for gaps in (attention.GAPS, 0):  # as after some thousand tokens: in each pass
        monkeypatch.setattr(attention, "GAPS", gaps)
        with opened(tmp_path / "m.flash", 0.5, 64) as model:
            found.append(all_logits(model, TOKENS.tolist(), 7))
    assert np.array_equal(found[0], found[1])


def test_a_right_guess_is_not_read_again(bundle: Path, asked: list[Numbers], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [TOKENS[i : i + 1] for i in range(12)]
    guessed: list[Any] = []
    real = CardQueue.guess

    def guess(self: CardQueue, extents: list[Extent]) -> None:
        guessed.append(extents)
        real(self, extents)

    monkeypatch.setattr(CardQueue, "guess", guess)
    monkeypatch.setattr(experts, "TRUSTED", 0.0)
    with opened(bundle, 0.0, 64) as model:
        for token in tokens:
            model.forward(token, np.array([0]))
    least = len(tokens) * LAYERS * USED
    pairs = {(i, e.section, e.first) for i, extents in enumerate(guessed) for e in extents}
    assert len(pairs) == len(tokens) * (LAYERS - 1) * USED
    right = wrong = 0
    for i, extents in enumerate(guessed):
        step, layer = divmod(i, LAYERS - 1)
        used = asked[step * LAYERS + layer + 1][0].tolist()
        right += sum(e.first // e.count in used for e in extents)
        wrong += sum(e.first // e.count not in used for e in extents)
    assert right > wrong > 0
    read = model.card.bytes_wanted / expert_bytes(bundle)
    assert least <= read <= least + wrong


def test_where_guesses_are_wrong_they_are_not_read(
    bundle: Path, asked: list[Numbers], monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed: list[Extent] = []
    real = CardQueue.guess

    def guess(self: CardQueue, extents: list[Extent]) -> None:
        guessed.extend(extents)
        real(self, extents)

    monkeypatch.setattr(CardQueue, "guess", guess)
    before: set[bool] = set()
    for first, second in itertools.pairwise(TOKENS[:9]):
        with opened(bundle, 0.0, 64) as model:
            asked.clear()
            guessed.clear()
            model.forward(first[None], np.array([0]))
            assert {e.section for e in guessed} == set(range(1, LAYERS))
            right = [
                sum(e.section == i and e.first // e.count in asked[i][0] for e in guessed) for i in range(LAYERS)
            ]
            guessed.clear()
            model.forward(second[None], np.array([0]))
            again = {e.section for e in guessed}
            for layer in range(1, LAYERS):
                if right[layer] in (0, USED):
                    assert (layer in again) == (right[layer] == USED)
                    before.add(layer in again)
    assert before == {True, False}


@pytest.mark.parametrize(("name", "known"), [("qwen3moe", False), ("smallthinker", True)])
def test_a_layer_s_reads_are_one_batch_and_go_on_while_it_attends(
    name: str, known: bool, packed_golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that its router wants if that comes before the attention, and guesses if it comes behind it."""
    monkeypatch.setattr(experts, "TRUSTED", 0.0)
    batches: list[int] = []
    under_way: list[tuple[int, set[int]]] = []
    together = threading.Barrier(IN_FLIGHT, timeout=60)
    wait = [True]
    want, fill, attend = CardQueue.want, CardQueue._fill, Attention.__call__

    def wanted(self: CardQueue, extents: Sequence[Extent]) -> None:
        batches.append(len(extents))
        want(self, extents)

    def filled(self: CardQueue, *args: Any) -> None:
        if wait:  # the first reads begin before one of them ends
            together.wait()
            wait.clear()
        fill(self, *args)

    def attended(self: Attention, i: int, *args: Any, **more: Any) -> Any:
        under_way.append((i, {read.extent.section for read in model._ffn._queue._reads}))  # type: ignore[attr-defined]
        return attend(self, i, *args, **more)

    for of, name_of, new in (
        (CardQueue, "want", wanted), (CardQueue, "_fill", filled), (Attention, "__call__", attended),
    ):  # fmt: skip
        monkeypatch.setattr(of, name_of, new)
    with opened(packed_golden(name), 0.0, 64) as model:
        for token in TOKENS[:4]:
            model.forward(token[None], np.array([0]))
        direct = model._ffn._queue._file._asked_direct  # type: ignore[attr-defined]
    assert direct and batches == [USED] * LAYERS * 4
    assert [i for i, _ in under_way] == list(range(LAYERS)) * 4
    assert all((i in sections) == (i > 0 or known) for i, sections in under_way)


@pytest.mark.parametrize("depth", [1, BUFFERS])
def test_experts_are_read_at_the_depth_that_the_card_likes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember(bundle, CardSpeed(bandwidth=1e9, random_reads={4096: 1e5}, when=0.0, depth=depth))
    under_way, most, lock = [0], [0], threading.Lock()
    fill = CardQueue._fill

    def filled(self: CardQueue, *args: Any) -> None:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        fill(self, *args)
        with lock:
            under_way[0] -= 1

    monkeypatch.setattr(CardQueue, "_fill", filled)
    with opened(bundle, 0.0, 64) as model:
        model.forward(TOKENS[:8], np.array([0]))
    assert most[0] == depth


def test_what_an_answer_cost_the_card_is_told(
    bundle: Path, no_guesses: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        engines, "plans_for", lambda bundle, *_: Pair(made_plan(bundle, 0.5, context=64), None, lambda plan: 1.0)
    )
    with Bundle(bundle) as opened_bundle, engines.Engine(opened_bundle, engines.Budget(None, 64, 1)) as engine:
        answer = engines.Answer()
        list(engine.pieces(engine.begin(TOKENS[:5].tolist(), Sampling(), answer, limit=6, ignore_eos=True)))
        assert "card_bandwidth_share" not in cost(engine, answer)
        remember(bundle, CardSpeed(bandwidth=1e5, random_reads={4096: 100.0}, when=0.0))
        figures = cost(engine, answer)
    share, each = figures["card_bandwidth_share"], figures["card_bytes_per_token"]
    assert each * 5 == answer.figures.decode_card_bytes > expert_bytes(bundle)
    assert share == pytest.approx(5 * each / answer.figures.decode_seconds / 1e5)
    assert 0 < figures["window_hit_rate"] < 1
    assert cost_in_words("stop", figures).splitlines()[2] == (
        f"card      {each / MIB:.1f} MiB and {figures['card_reads_per_token']:.0f} reads a token,"
        f" {100 * figures['window_hit_rate']:.0f} % of neurons found in RAM,"
        f" {100 * share:.0f} % of what the card can give"
    )


def test_a_pass_that_breaks_off_leaves_the_next_one_right(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "READ_BYTES", 6 << 10)  # an expert is two reads
    with opened(bundle, 1.0, 64) as model:
        expected = model.forward(TOKENS[:9], np.array([8]))
    steps = iter(range(0))

    def stop(done: int, layers: int, nbytes: int) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    for before in (0, 1, 2, 5, 9, 12):
        with opened(bundle, 0.5, 64) as model:
            steps = iter(range(before))
            with pytest.raises(KeyboardInterrupt):
                model.forward(TOKENS[:9], np.array([8]), stop)
            assert model.cache.length == 0
            assert np.array_equal(model.forward(TOKENS[:9], np.array([8])), expected)


def test_a_damaged_expert_is_named_and_others_still_answer(
    bundle: Path, tmp_path: Path, asked: list[Numbers], no_guesses: None
) -> None:
    with opened(bundle, 1.0, 64) as model:
        expected = [model.forward(token[None], np.array([0])) for token in TOKENS[:12]]
        used = [{int(asked[LAYERS * i + layer][0, k]) for k in range(USED)} for i in range(12) for layer in [2]]
    expert = next(iter(used[5] - used[0]))
    path = Path(shutil.copy(bundle, tmp_path / "damaged.flash"))
    with Bundle(path) as opened_bundle:
        section = opened_bundle.section("layer.2.ffn")
    with path.open("r+b") as file:
        file.seek(section.offset + expert * expert_bytes(bundle) + 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with opened(path, 0.0, 64) as model:
        for token, uses, logits in zip(TOKENS, used, expected, strict=False):
            if expert in uses:
                with pytest.raises(DamagedRun, match=r"layer\.2\.ffn"):
                    model.forward(token[None], np.array([0]))
                break
            assert np.array_equal(model.forward(token[None], np.array([0])), logits)
        model.cache.truncate(0)
        assert np.array_equal(model.forward(TOKENS[:1], np.array([0])), expected[0])


# --- the plan ---------------------------------------------------------------------------------------------


def test_a_plan_has_room_for_whole_experts_and_counts_all(bundle: Path) -> None:
    with Bundle(bundle) as opened_bundle:
        header = opened_bundle.header
    m, nbytes = header.model, expert_bytes(bundle)
    held = m.expert_groups * unpacked.group_kept(header.group)
    least = plan.smallest(header, 64, 0)
    routers = sum(s.length for s in header.sections if s.name.endswith(".router"))
    assert routers == LAYERS * EXPERTS * m.hidden * 2
    previous = -1
    for more in range(0, 8 * LAYERS * held, held // 3):
        made = make_plan(header, memory=least + more, context=64, threads=1, base=0)
        assert len(set(made.pinned)) == 1 and not made.resident
        room, rest = divmod(made.pinned[0], m.expert_groups)
        assert rest == 0 and room == min(EXPERTS, more // (LAYERS * held))
        assert made.total <= least + more and made.parts["experts"] == room * LAYERS * held
        assert made.card_bytes == LAYERS * USED * nbytes * (EXPERTS - room) // EXPERTS
        assert room >= previous
        previous = room
    assert previous == EXPERTS and made.buffers == 0 and made.card_bytes == 0
    with pytest.raises(MemoryTooSmall):
        make_plan(header, memory=least - 1, context=64, threads=1, base=0)


# --- headers that lie -------------------------------------------------------------------------------------


def forged(bundle: Path, **changes: Any) -> bytes:
    with Bundle(bundle) as opened_bundle:
        header = opened_bundle.header
    assert header.model.experts is not None
    mixture = msgspec.structs.replace(header.model.experts, **changes)
    model = msgspec.structs.replace(header.model, experts=mixture)
    return msgspec.json.encode(msgspec.structs.replace(header, model=model))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"count": 0}, DamagedHeader, "does not make sense"),
        ({"count": 5}, DamagedHeader, "do not share out to 5 experts in groups"),
        ({"count": 3}, BadSection, r"layer\.0\.router' has .* bytes, but its model needs"),
        ({"count": 12, "used": 12}, BadSection, r"layer\.0\.router' has .* bytes, but its model needs"),
        ({"used": 7}, DamagedHeader, "a token uses 7 experts of 6"),
        ({"used": 0}, DamagedHeader, "does not make sense"),
        ({"scores": "tanh"}, DamagedHeader, "does not make sense"),
        ({"scale": 0.0}, DamagedHeader, "does not make sense"),
    ],
)
def test_a_header_with_other_experts_than_the_file_is_refused(
    bundle: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    body = forged(bundle, **changes)
    with pytest.raises(error, match=match):
        codec.decode_header(body, prefix.digest(body), bundle.stat().st_size)


def test_a_mixture_without_a_router_is_refused(bundle: Path) -> None:
    with Bundle(bundle) as opened_bundle:
        header = opened_bundle.header
    name = "layer.1.router"
    sections = [msgspec.structs.replace(s, name="layer.1.other") if s.name == name else s for s in header.sections]
    body = msgspec.json.encode(msgspec.structs.replace(header, sections=sections))
    with pytest.raises(BadSection, match=f"{name}.* is missing"):
        codec.decode_header(body, prefix.digest(body), bundle.stat().st_size)
