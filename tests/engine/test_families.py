"""Every family on every path against the logits that transformers has for the same tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashd.engine.model.branches import Branches, behind
from flashd.graphs.constant import Arithmetic
from flashd.pack.families.registry import FAMILIES
from flashd.pack.pack import pack
from tests.engine.test_head import model as with_head
from tests.engine.test_paths import all_logits, opened
from tests.goldens.by_llama_cpp import FILE, perplexity
from tests.goldens.models import GOLDENS, TOKENS, Floats
from tests.reference import kl, relative

LLAMA_CPP: dict[str, float] = json.loads(FILE.read_text())
"""The perplexities of those goldens that llama.cpp computes, see by_llama_cpp.py."""


def farthest(expected: Floats, logits: Floats) -> float:
    """The largest difference, in parts of the range of the expected logits."""
    return float(np.abs(expected - logits).max() / np.ptp(expected))


@pytest.mark.parametrize("name", GOLDENS)
def test_f16_rows_agree_with_transformers_and_llama_cpp(tmp_path: Path, name: str) -> None:
    golden = GOLDENS[name]
    pack(golden.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "f16", context=golden.context)
    expected, tokens = golden.logits(name), TOKENS.tolist()
    # float16 rounds products of embeddings with projections
    limit = 1e-3 if "project_in.weight" in golden.model else 2e-5
    found = []
    for pinned, chunk in ((0.0, 20), (0.5, 1), (1.0, 48)):
        with opened(tmp_path / "m.flash", pinned, 64) as model:
            found.append(all_logits(model, tokens, chunk))
    assert farthest(expected, found[0]) < limit
    assert perplexity(found[0]) == pytest.approx(LLAMA_CPP.get(name, perplexity(expected)), rel=1e-3)
    assert all(np.array_equal(found[0], other) for other in found)  # what is pinned changes no bit


@pytest.mark.parametrize("name", GOLDENS)
def test_what_is_pinned_changes_no_bit(tmp_path: Path, name: str) -> None:
    golden = GOLDENS[name]
    pack(golden.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4", context=golden.context)
    found = []
    for pinned, chunk in ((0.0, 20), (0.5, 48), (1.0, 1)):
        with opened(tmp_path / "m.flash", pinned, 64) as model:
            found.append(all_logits(model, TOKENS.tolist(), chunk))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("name", GOLDENS)
def test_the_resident_path_agrees_with_the_paged_one(tmp_path: Path, name: str) -> None:
    golden = GOLDENS[name]
    pack(golden.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int8", context=golden.context)
    expected, tokens = golden.logits(name), TOKENS.tolist()
    with opened(tmp_path / "m.flash", 0.3, 64, "float32") as model:
        streamed = all_logits(model, tokens, 20)
    with opened(tmp_path / "m.flash", None, 64, "float32") as model:
        for chunk in (48, 1):
            resident = all_logits(model, tokens, chunk)
            assert relative(streamed, resident) < 1e-4
            if "expert_count" in golden.keys:
                # where rounding changes which expert a random router chooses, what looks at it is another
                apart = [relative(e, r) for e, r in zip(expected, resident, strict=True)]
                assert np.quantile(apart, 0.1) < 0.05
            else:
                # delta nets make queries and keys as long as all others, which makes errors of the small ones large;
                # Gemma 3n and 4 do not scale the products of queries and keys, so that rounding counts for more
                limits = {"ssm.state_size": 0.1, "attention.key_length_swa": 0.06, "altup.num_inputs": 0.06}
                limit = max([limit for key, limit in limits.items() if key in golden.keys], default=0.05)
                assert relative(expected, resident) < limit


def test_ternary_rows_agree_with_transformers(tmp_path: Path) -> None:
    """Only the head is rounded. BitNet's training rounds what goes into each product of its layers to 8 bits a
    token, which flashd does not: the whole of a layer's activations would have to be there first."""
    golden = GOLDENS["bitnet"]
    pack(golden.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4", context=golden.context)
    # int8 rounds what goes into products to 8 bits too, as that training does, though block by block
    paged: list[tuple[float | None, Arithmetic, float]] = [(p, "float32", 0.012) for p in (0.0, 0.5, 1.0)]
    for pinned, arithmetic, limit in [*paged, (None, "float32", 0.012), (None, "int8", 0.02)]:
        with opened(tmp_path / "m.flash", pinned, 64, arithmetic) as model:
            for chunk in (20, 1):
                logits = all_logits(model, TOKENS.tolist(), chunk)
                assert farthest(golden.logits("bitnet"), logits) < limit
                assert kl(golden.logits("bitnet"), logits) < (4e-4 if arithmetic == "int8" else 1e-4)
                assert kl(golden.logits("bitnet", "rounded"), logits) < 5e-4


@pytest.mark.parametrize("name", ["gemma2", "phi2"])  # a cap on logits, a bias of the head
def test_a_draft_guesses_among_part_of_a_vocabulary(tmp_path: Path, name: str) -> None:
    pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with with_head(tmp_path / "m.flash", 0.5, 96) as model:
        model.forward(TOKENS[:20], np.array([19]))
        guesses = model.draft(TOKENS[20:21], Branches([np.arange(20)], [behind(0)])).tokens[0].tolist()
    assert guesses and len(set(guesses)) == len(guesses) and all(0 <= g < 96 for g in guesses)


def test_every_family_has_a_golden() -> None:
    assert {g.architecture for g in GOLDENS.values()} == set(FAMILIES)
