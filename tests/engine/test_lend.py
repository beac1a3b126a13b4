"""What a short text does not need of the KV cache and of the workspace holds groups, and goes back in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashd.bundle.reader import Bundle
from flashd.engine.forward.ffn import streamed
from flashd.engine.forward.ffn.streamed import StreamedFfn
from flashd.engine.forward.paged import PagedModel
from flashd.engine.forward.unpacked import in_turn
from flashd.engine.model.kv_cache import SPARE, KvCache
from flashd.engine.model.sizes import TREE_NODES
from flashd.engine.planning.plan import make_plan
from flashd.system import freed_memory
from flashd.system.freed_memory import PAGE, give_back, use_small_pages
from flashd.system.memory import MIB, resident_now
from tests.engine.test_paths import plan

CONTEXT = 512
PINNED = 2


@contextmanager
def lending(path: Path, lent: int, of_prompts: int = 0) -> Iterator[PagedModel]:
    """A model of which two groups of every layer are pinned, and up to `lent` more."""
    with Bundle(path) as bundle:
        layers = bundle.header.model.layers
        pinned, lent = (PINNED,) * layers, layers * lent
        made = dataclasses.replace(
            plan(bundle, 0.0, CONTEXT), pinned=pinned, lent_groups=lent, buffers=1, of_prompts=of_prompts
        )
        model = PagedModel(bundle, made)
        try:
            yield model
        finally:
            model.close()


def group_bytes(model: PagedModel) -> int:
    """Bytes of one group in every layer."""
    header = model._bundle.header
    return header.model.layers * header.group.nbytes


def groups_of_a_pass(model: PagedModel) -> int:
    """Groups of each layer that a pass wants from the card."""
    model.forward(np.arange(1), np.array([0]))
    before, passes = model.card.bytes_wanted, 16
    for _ in range(passes):
        model.forward(np.arange(1), np.array([0]))
    # of which the first or the last read may be counted or not
    return round((model.card.bytes_wanted - before) / (passes * group_bytes(model)))


def pinned_groups(model: PagedModel) -> set[int]:
    assert isinstance(model._ffn, StreamedFfn)
    return set(model._ffn._here)


def test_groups_stay_while_the_text_is_short_and_go_when_it_grows(tiny_bundle: Path) -> None:
    with lending(tiny_bundle, 1) as model:
        groups = model._bundle.header.model.groups
        model.forward(np.arange(3), np.array([2]))
        assert model.hit_rate == PINNED / groups
        assert pinned_groups(model) == {PINNED + 1}  # what streamed past in the first pass
        assert groups_of_a_pass(model) == groups - PINNED - 1
        model.cache.reserve(CONTEXT)
        assert pinned_groups(model) == {PINNED}
        assert groups_of_a_pass(model) == groups - PINNED


def test_groups_go_while_a_prompt_is_read(tiny_bundle: Path) -> None:
    with lending(tiny_bundle, 1, of_prompts=1 << 20) as model:
        model.cache.reserve(CONTEXT)  # so that the cache lends nothing
        for tokens, here in ((TREE_NODES, PINNED + 1), (TREE_NODES + 1, PINNED), (1, PINNED + 1)):
            model.cache.truncate(0)
            model.forward(np.arange(tokens), np.array([0]))
            assert pinned_groups(model) == {here}


def test_a_short_text_lends_what_its_attention_does_not_need(tiny_bundle: Path) -> None:
    lent: list[int] = []
    with Bundle(tiny_bundle) as bundle:
        cache = KvCache(bundle.header.model, CONTEXT, lent.append, beside=1000)
        plain = KvCache(bundle.header.model, CONTEXT, lent.append)
    for held in (100, CONTEXT, CONTEXT + SPARE):
        lent.clear()
        cache.reserve(held)
        plain.reserve(held)
        assert lent[0] - lent[1] == 1000 * max(0, CONTEXT - held)


def test_a_plan_has_what_a_pass_of_a_prompt_needs_that_others_do_not(packed: dict[str, Path]) -> None:
    with Bundle(packed["int4"]) as bundle:
        made = make_plan(bundle.header, memory=200 * MIB, context=CONTEXT, threads=2, base=60 * MIB)
    without = dataclasses.replace(made, of_prompts=0, of_unused=0)
    assert made.of_prompts > 4 * MIB and made.of_unused > 0
    # they hold groups beside what the KV cache lends, and the workspace of a plan has both
    assert made.parts["workspace"] > made.of_prompts + CONTEXT * made.of_unused
    least = made.of_prompts // max(made.group_bytes)
    assert sum(made.pinned_beside(made.of_prompts)) - sum(without.pinned) in (least, least + 1)


def test_logits_do_not_depend_on_what_is_lent(tiny_bundle: Path) -> None:
    with lending(tiny_bundle, 0) as without, lending(tiny_bundle, 2) as model:
        groups = model._bundle.header.model.groups
        assert groups > PINNED
        # grows with the text, is let go, and comes again with a new text
        for start, tokens in ((0, 5), (5, 1), (6, 300), (306, 150), (0, 3), (3, 2)):
            for each in (without, model):
                each.cache.truncate(start)
                each.cache.hold(start + tokens)
            ids, last = np.arange(start, start + tokens) % 250, np.array([tokens - 1])
            assert np.array_equal(without.forward(ids, last), model.forward(ids, last))


def test_a_pass_that_breaks_off_while_groups_come_to_stay(tiny_bundle: Path) -> None:
    def stop(done: int, layers: int, nbytes: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    ids, last = np.arange(4), np.array([3])
    with lending(tiny_bundle, 0) as without, lending(tiny_bundle, 2) as model:
        right = without.forward(ids, last)
        with pytest.raises(KeyboardInterrupt):
            model.forward(ids, last, stop)
        for _ in range(3):
            model.cache.truncate(0)
            assert np.array_equal(right, model.forward(ids, last))


def test_memory_that_is_lent_is_not_held(tiny_bundle: Path) -> None:
    lent: list[int] = []
    with Bundle(tiny_bundle) as bundle:
        cache = KvCache(bundle.header.model, CONTEXT, lent.append)
    whole = (CONTEXT + SPARE) * cache.token_bytes
    cache.reserve(CONTEXT + SPARE)
    for part in cache.parts(0, CONTEXT):
        part[:] = 1
    ends = 2 * PAGE * len(list(cache.parts(0, 1)))  # pages that two heads share are not lent
    assert lent == [whole - ends, 0]
    cache.reserve(100)  # no more than there is
    assert lent[-1] == 0 and all((part == 1).all() for part in cache.parts(0, CONTEXT))
    cache.hold(100)
    assert lent[-1] == whole - ends - 100 * cache.token_bytes
    assert all((part == 1).all() for part in cache.parts(0, 100))
    for part in cache.parts(100, CONTEXT):  # reads as zeros, but for what shares a page with others
        assert np.count_nonzero(part) * part.itemsize < 2 * PAGE < part.nbytes


def test_a_pass_that_breaks_off_between_card_and_sum(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C may: groups that streamed past are in their slots then, and some in the head's."""
    ids, last = np.arange(4), np.array([3])
    with lending(tiny_bundle, 2) as model:
        right = model.forward(ids, last)
        shares = iter(range(1000))

        def stopped(*args: Any) -> Iterator[Any]:
            for share in in_turn(*args):
                if next(shares) == 3:
                    raise KeyboardInterrupt
                yield share

        monkeypatch.setattr(streamed, "in_turn", stopped)
        model.cache.truncate(0)
        with pytest.raises(KeyboardInterrupt):
            model.forward(ids, last)
        for _ in range(2):
            model.cache.truncate(0)
            assert np.array_equal(right, model.forward(ids, last))


def test_drafts_are_asked_for_as_soon_as_groups_are_let_go(tiny_bundle: Path) -> None:
    with Bundle(tiny_bundle) as bundle:
        groups = bundle.header.model.groups
    with lending(tiny_bundle, groups - PINNED) as model:
        model.forward(np.arange(3), np.array([2]))
        assert not model.shares_reads
        model.cache.reserve(CONTEXT)
        assert model.shares_reads and model.drafts


def test_a_token_in_a_large_cache_holds_no_huge_pages(tiny_bundle: Path) -> None:
    use_small_pages()
    with Bundle(tiny_bundle) as bundle:
        cache = KvCache(bundle.header.model, 1 << 16)  # arrays of 8 MiB
    before = resident_now()
    for part in cache.parts(0, 16):
        part[:] = 1
    assert resident_now() - before < 1 << 20


def test_whole_pages_go_back_and_nothing_beside_them() -> None:
    memory = np.ones(6 * PAGE, np.uint8)
    memory = memory[-memory.ctypes.data % PAGE :]
    give_back(memory[10 : 3 * PAGE + 10])
    assert memory[:PAGE].all() and memory[3 * PAGE :].all() and not memory[PAGE : 3 * PAGE].any()
    give_back(memory[:5])
    give_back(memory[:0])


def test_nothing_goes_back_that_is_no_page_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    large = 16 << 10  # as on a Raspberry Pi 5
    monkeypatch.setattr(freed_memory, "PAGE", large)
    memory = np.ones(5 * large, np.uint8)
    memory = memory[-memory.ctypes.data % large :][: 3 * large]
    give_back(memory[4096 : 3 * large - 4096])
    assert memory[:large].all() and memory[2 * large :].all() and not memory[large : 2 * large].any()
