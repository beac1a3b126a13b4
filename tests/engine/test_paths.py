"""The paged, the partly pinned and the resident path against a plain float32 forward pass, and each other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import RowKind
from flashd.engine.engine import Prompts
from flashd.engine.forward import unpacked
from flashd.engine.forward.paged import PagedModel
from flashd.engine.forward.resident import ResidentModel
from flashd.engine.model import sizes
from flashd.engine.model.branches import Branches, behind
from flashd.engine.model.contract import Model
from flashd.engine.model.sizes import MOST_TEXTS
from flashd.engine.planning.parts import BUFFERS
from flashd.engine.planning.plan import Plan, make_plan
from flashd.graphs.constant import Arithmetic
from flashd.pack.pack import pack
from tests import tiny
from tests.goldens.models import GOLDENS, TOKENS
from tests.reference import Floats, Reference, kl, relative

THREADS = len(os.sched_getaffinity(0))

ARITHMETICS: tuple[Arithmetic, ...] = ("int8", "float32")


@pytest.fixture(scope="module")
def of_smollm(smollm: Path) -> Reference:
    """SmolLM2's. It takes a while to open. Have it forget what it saw first."""
    return Reference(smollm)


def plan(bundle: Bundle, pinned: float | None, context: int = 1024, arithmetic: Arithmetic | None = None) -> Plan:
    """A plan that pins a share of each layer's groups, or for None one that holds everything, in this arithmetic."""
    header = bundle.header
    full = make_plan(
        header,
        memory=1 << 40,
        context=context,
        threads=THREADS,
        base=0,
        arithmetic=arithmetic,
    )
    if pinned is None:
        return full
    groups = tuple(int(pinned * every) for every in header.model.layer_groups)
    return dataclasses.replace(
        full, resident=False, pinned=groups, buffers=BUFFERS, texts=MOST_TEXTS, int8_layers=0, int8_head=False,
        constant_experts=False,
    )  # fmt: skip


@contextmanager
def opened(
    path: Path, pinned: float | None, context: int = 1024, arithmetic: Arithmetic | None = None
) -> Iterator[Model]:
    with Bundle(path) as bundle:
        made = plan(bundle, pinned, context, arithmetic)
        model: Model = ResidentModel(bundle, made) if made.resident else PagedModel(bundle, made)
        try:
            yield model
        finally:
            model.close()


def all_logits(model: Model, tokens: list[int], chunk: int) -> Floats:
    """Logits behind each of `tokens`, so many a pass. If that is one, those in the middle still come together."""
    model.cache.truncate(0)
    singly, last = range(0, len(tokens), chunk), len(tokens) - 12
    starts = singly if chunk > 1 or last < 4 else [*range(5), *range(last, len(tokens))]
    parts = [tokens[i:j] for i, j in pairwise([*starts, len(tokens)])]
    return np.concatenate([model.forward(np.array(p, np.int64), np.arange(len(p))) for p in parts])


def tokens_of(path: Path, text: str) -> list[int]:
    return _prompts(path).plain(text)


@lru_cache(maxsize=4)
def _prompts(path: Path) -> Prompts:
    """SmolLM2's tokenizer takes a while to open."""
    with Bundle(path) as bundle:
        return Prompts(bundle)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_f16_rows_agree_with_the_reference(tmp_path: Path, family: str, tied: bool) -> None:
    source = tiny.write(tmp_path / "m.gguf", family, tied=tied)
    pack(source, tmp_path / "m.flash", "f16")
    tokens = tokens_of(tmp_path / "m.flash", "the quick brown fox, then the other one; thesis.")
    expected = Reference(source).logits(tokens)
    paged: list[Floats] = []
    for pinned in (0.0, 0.5, 1.0):
        with opened(tmp_path / "m.flash", pinned, 128) as model:
            paged += [all_logits(model, tokens, chunk) for chunk in (16, 5, 1)]
    assert relative(expected, paged[0]) < 1e-3
    assert all(np.array_equal(paged[0], logits) for logits in paged)


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
)
def test_every_source_type_packs_and_answers_alike(tmp_path: Path, kind: Kind) -> None:
    source = tiny.write(tmp_path / "m.gguf", kind=kind)
    pack(source, tmp_path / "m.flash", "int8")
    tokens = tokens_of(tmp_path / "m.flash", "the weather there")
    expected = Reference(source).logits(tokens)
    ways: list[tuple[float | None, Arithmetic]] = [(None, "int8"), (None, "float32"), (0.0, "float32")]
    for pinned, arithmetic in ways:
        with opened(tmp_path / "m.flash", pinned, 64, arithmetic) as model:
            assert relative(expected, all_logits(model, tokens, 64)) < 0.04


@pytest.fixture(scope="module")
def expected_of_smollm(
    packed: dict[str, Path], of_smollm: Reference, prose: str, chat: str
) -> list[tuple[list[int], Floats]]:  # fmt: skip
    """128 tokens of each text, and their logits."""
    found = []
    for text in (prose, chat):
        tokens = tokens_of(packed["int4"], text)[:128]
        of_smollm.forget()
        found.append((tokens, of_smollm.logits(tokens)))
    return found


@pytest.mark.parametrize(("kind", "limit"), [("int4", 0.03), ("int8", 0.01)])
def test_smollm_is_close_to_the_reference_on_every_path(
    packed: dict[str, Path], expected_of_smollm: list[tuple[list[int], Floats]], kind: RowKind, limit: float
) -> None:
    texts, expected = zip(*expected_of_smollm, strict=True)
    assert [len(tokens) for tokens in texts] == [128, 128]
    resident: dict[Arithmetic, list[Floats]] = {}
    for arithmetic in ARITHMETICS:
        with opened(packed[kind], None, arithmetic=arithmetic) as model:
            resident[arithmetic] = [all_logits(model, tokens, 64) for tokens in texts]
        assert all(kl(e, r) <= limit for e, r in zip(expected, resident[arithmetic], strict=True))
    ways: list[tuple[float, int, Arithmetic]] = [
        (0.0, 128, "int8"), (0.5, 61, "int8"), (1.0, 64, "int8"), (0.5, 61, "float32"),
    ]  # fmt: skip
    paged = []
    for pinned, chunk, arithmetic in ways:
        with opened(packed[kind], pinned, arithmetic=arithmetic) as model:
            paged.append([all_logits(model, tokens, chunk) for tokens in texts])
    for i in range(len(texts)):
        assert relative(resident["float32"][i], paged[-1][i]) <= 1e-3
        assert all(kl(expected[i], logits[i]) <= limit for logits in paged)
        assert all(np.array_equal(paged[0][i], logits[i]) for logits in paged[:3])


QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three animals that live in the sea.",
    "Write a short poem about rain.",
    "How do I boil an egg?",
    "What is a prime number?",
    "Explain what a computer does.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What should I pack for a day at the beach?",
]


def greedy_alike(bundle: Path, reference: Reference, arithmetic: Arithmetic) -> int:
    """On how many of the questions the first 32 greedy tokens are the reference's own.

    They are if the reference says each of them behind those before it, which one pass of it tells.
    """
    same = 0
    with opened(bundle, None, arithmetic=arithmetic) as model:
        for question in QUESTIONS:
            prompt = tokens_of(bundle, f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
            model.cache.truncate(0)
            out: list[int] = []
            step = prompt
            for _ in range(32):
                out.append(int(model.forward(np.array(step, np.int64), np.array([len(step) - 1]))[0].argmax()))
                step = out[-1:]
            reference.forget()
            likely = reference.logits([*prompt, *out[:-1]])[len(prompt) - 1 :].argmax(1)
            same += out == likely.tolist()
    return same


@pytest.mark.parametrize(("arithmetic", "least"), [("float32", 8), ("int8", 4)])
def test_greedy_text_is_the_reference_s_own(
    packed: dict[str, Path], of_smollm: Reference, arithmetic: Arithmetic, least: int
) -> None:
    """Two likely words that are nearly as likely change places by the rounding of int8, and all that follows."""
    assert greedy_alike(packed["int8"], of_smollm, arithmetic) >= least


@pytest.mark.skipif("FLASHD_QWEN_GGUF" not in os.environ, reason="FLASHD_QWEN_GGUF names no file")
@pytest.mark.parametrize(("kind", "limit"), [("int4", 0.03), ("int8", 0.01)])
def test_qwen_is_close_to_the_reference(tmp_path: Path, prose: str, chat: str, kind: RowKind, limit: float) -> None:
    source, out = Path(os.environ["FLASHD_QWEN_GGUF"]), tmp_path / "m.flash"
    pack(source, out, kind)
    reference = Reference(source)
    for text in (prose, chat):
        tokens = tokens_of(out, text)
        reference.forget()
        expected = reference.logits(tokens)
        with opened(out, 0.3, arithmetic="float32") as model:
            paged = all_logits(model, tokens, 128)
        with opened(out, None, arithmetic="float32") as model:
            resident = all_logits(model, tokens, 128)
        with opened(out, None, arithmetic="int8") as model:
            assert kl(expected, all_logits(model, tokens, 128)) <= limit
        print(f"{kind}: KL {kl(expected, paged):.4f}, paged to resident {relative(resident, paged):.1e}")
        assert kl(expected, paged) <= limit
        assert relative(resident, paged) <= 1e-3
    if kind == "int8":
        assert greedy_alike(out, reference, "float32") >= 8


def test_a_pass_reads_what_is_not_pinned_once(tiny_bundle: Path) -> None:
    for pinned in (0.0, 0.5):
        with Bundle(tiny_bundle) as bundle:
            made = plan(bundle, pinned, 128)
            model = PagedModel(bundle, dataclasses.replace(made, buffers=1))
            try:
                missing = (made.groups[0] - made.pinned[0]) * bundle.header.group.nbytes * bundle.header.model.layers
                for passes in range(1, 4):
                    model.forward(np.arange(5), np.array([4]))
                    # one more extent may be under way: the next pass's first, which is a layer's all here
                    ahead = missing // bundle.header.model.layers
                    assert passes * missing <= model.card.bytes_wanted <= passes * missing + ahead
            finally:
                model.close()


def test_a_pass_that_breaks_off_leaves_the_next_one_right(tiny_bundle: Path) -> None:
    def stop_in_layer_one(done: int, layers: int, nbytes: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    tokens = np.arange(20, 30)
    with opened(tiny_bundle, 0.3, 64) as model:
        expected = model.forward(tokens, np.array([9]))
        model.cache.truncate(0)
        with pytest.raises(KeyboardInterrupt):
            model.forward(tokens, np.array([9]), stop_in_layer_one)
        assert model.cache.length == 0
        assert np.array_equal(model.forward(tokens, np.array([9])), expected)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "opt", "phi2", "bitnet"])
def test_a_pass_may_have_more_tokens_than_go_through_a_product_together(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "f16")
    tokens, parents = TOKENS.tolist(), [behind(0), 0, 0, 1, 1, 3, 2, 6]
    found = []
    for at_once in (128, 5):
        monkeypatch.setattr(sizes, "TOKENS_AT_ONCE", at_once)
        monkeypatch.setattr(sizes, "TOKENS_ATTENDING", at_once)
        monkeypatch.setattr(unpacked, "TOKENS_UNPACKED", at_once)
        with opened(tmp_path / "m.flash", 0.5, 64) as model:
            logits = all_logits(model, tokens, 48)
            if model.branches:
                some = np.array(tokens[: len(parents)])
                branches = Branches([np.arange(40)], parents)
                logits = np.concatenate([logits, model.forward(some, np.arange(len(some)), branches=branches)])
            found.append(logits)
    assert np.array_equal(found[0], found[1])
