"""Several states of a token, and bounds of gates: Gemma 3n, beside what every family is tested for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle.errors import BadSection, DamagedHeader
from flashd.bundle.prefix import digest
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.model.sizes import NODES
from flashd.engine.planning import parts
from flashd.engine.planning.plan import make_plan
from flashd.errors import DataError
from flashd.pack.lossy.gates import Gating
from flashd.pack.original import Original
from flashd.pack.pack import pack
from tests.engine.test_decode import said
from tests.engine.test_paths import ARITHMETICS, all_logits, opened
from tests.engine.test_prefixes import fresh, process, teach
from tests.goldens import folders
from tests.goldens.by_llama_cpp import perplexity
from tests.goldens.models import GOLDENS, HIDDEN, LAYERS, NEURONS, TOKENS, VOCABULARY, Floats, Golden
from tests.reference import relative

NAME = "gemma3n-shared"
GOLDEN = GOLDENS[NAME]
CONTEXT = 120


@pytest.fixture
def gemma(packed_golden: Callable[[str], Path]) -> Path:
    return packed_golden(NAME)


def test_the_plan_counts_states_and_the_gates_that_stay(gemma: Path) -> None:
    with Bundle(gemma) as bundle:
        header, m = bundle.header, bundle.header.model
    assert m.streams and m.streams.count == 3 and m.laurel_rank == 32
    assert [bound and bound.neurons for bound in m.bounds] == [NEURONS, None, 2 * NEURONS, None]
    assert (m.stream_width, m.carried_width, m.ffn_input_width) == (3 * HIDDEN, 4 * HIDDEN, HIDDEN + 2)
    assert {s.name for s in header.sections if s.name.endswith(".bound")} == {"layer.0.bound", "layer.2.bound"}
    held = make_plan(header, memory=1 << 40, context=CONTEXT, threads=1, base=0).parts
    assert held["token states"] > 2 * parts.held(header.row_format("stream_out"), 2 * HIDDEN, "float32")


def test_drafts_and_snapshots_change_no_word(gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "goes_on", lambda self, draft, steps, nodes, ahead: steps < NODES)
    prompt = TOKENS[:30].tolist()
    with opened(gemma, 0.9, CONTEXT) as model:
        without, _ = said(model, prompt, Sampling(), drafts=False, limit=20)
        withs, figures = said(model, prompt, Sampling(), drafts=True, limit=20)
        assert withs == without and figures.drafted > 10
    teach(gemma, tmp_path, prompt, prompt, context=CONTEXT)
    with process(gemma, tmp_path, 0.5, CONTEXT) as p:
        logits, _ = p.logits(prompt)
        assert p.passes == [] and np.array_equal(logits, fresh(gemma, prompt, 0.0))


def test_a_model_in_ram_is_as_the_paged_one_in_both_arithmetics(gemma: Path) -> None:
    with opened(gemma, 0.5, CONTEXT, "float32") as model:
        paged = all_logits(model, TOKENS.tolist(), 20)
    for arithmetic in ARITHMETICS:
        with opened(gemma, None, CONTEXT, arithmetic) as model:
            for chunk in (48, 1):
                limit = 1e-4 if arithmetic == "float32" else 0.15
                assert relative(paged, all_logits(model, TOKENS.tolist(), chunk)) < limit


def test_sample_texts_are_computed_as_answers_are(tmp_path: Path) -> None:
    original = Original.open(GOLDEN.write(tmp_path / "m.gguf"), "f16")
    calibration = original.calibration([TOKENS])
    for i in range(LAYERS):
        assert calibration.layer(i).h.shape == (len(TOKENS), HIDDEN)
    assert calibration.perplexity() == pytest.approx(perplexity(GOLDEN.logits(NAME)), rel=1e-4)


def test_gates_with_a_bound_select_nothing(tmp_path: Path) -> None:
    source = GOLDENS["gemma3n"].write(tmp_path / "m.gguf")
    with pytest.raises(DataError, match="gates that have a bound cannot choose"):
        pack(source, tmp_path / "m.flash", "int4", allowed=Gating(0.1))


class Short(Golden):
    """One whose table of token inputs has fewer rows than there are tokens, as the folders of Gemma 3n have it."""

    def tensors(self) -> dict[str, Floats]:
        tensors = super().tensors()
        table = tensors["per_layer_token_embd.weight"]
        return tensors | {"per_layer_token_embd.weight": table[: VOCABULARY - 6]}


def test_tokens_beyond_a_table_say_what_the_first_says(tmp_path: Path) -> None:
    pack(Short(**vars(GOLDEN)).write(tmp_path / "m.gguf"), tmp_path / "m.flash", "f16")
    with Bundle(tmp_path / "m.flash") as bundle:
        rows = bundle.table_rows("token_inputs", np.array([0, VOCABULARY - 7, VOCABULARY - 6, VOCABULARY - 1]))
    expected = GOLDEN.tensors()["per_layer_token_embd.weight"]
    assert np.array_equal(rows, expected[[0, VOCABULARY - 7, 0, 0]])


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("altup.active_idx", 1, "layers compute with another than the first"),
        ("altup.num_inputs", 1, "not 2 to 16"),
        ("altup.num_inputs", 4, "no expert 2|has the shape"),
        ("activation_sparsity_scale", [0.5] * 3, "makes no model of 4 layers"),
        ("activation_sparsity_scale", [math.nan] * 4, "makes no model of 4 layers"),
        ("activation_sparsity_scale", [math.inf] * 4, "makes no model of 4 layers"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, key: str, value: Any, match: str) -> None:
    source = replace(GOLDEN, keys=GOLDEN.keys | {key: value}).write(tmp_path / "m.gguf")
    with pytest.raises(DataError, match=match):
        pack(source, tmp_path / "m.flash", "int4")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"altup_correct_scale": False}, "altup_correct_scale"),
        ({"attention_bias": True}, "attention_bias"),
        ({"activation_sparsity_pattern": [1.0] * 4}, "activation_sparsity_pattern"),
        ({"altup_active_idx": 2}, "another than the first"),
    ],
)
def test_a_folder_that_is_not_supported_is_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    saved = folders.write(tmp_path / "m", NAME, GOLDEN.write(tmp_path / "m.gguf"))
    config = msgspec.json.decode((saved / "config.json").read_bytes()) | change
    (saved / "config.json").write_bytes(msgspec.json.encode(config))
    with pytest.raises(DataError, match=match):
        pack(saved, tmp_path / "m.flash", "int4")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"bounds": [None] * 3}, DamagedHeader, "has no place for them"),
        ({"bounds": [{"neurons": 100, "deviations": 1.0}] + [None] * 3}, DamagedHeader, "has no place for them"),
        ({"laurel_rank": 33}, DamagedHeader, "has no place for them"),
        ({"laurel_rank": 0}, DamagedHeader, "has no place for them"),
        ({"block": "parallel"}, DamagedHeader, "has no place for them"),
        ({"layer_scales": True}, DamagedHeader, "has no place for them"),
        ({"streams": {"count": 1}}, DamagedHeader, "does not make sense"),
        ({"streams": {"count": 4}}, BadSection, "its model needs"),
        ({"streams": None}, BadSection, "its model needs|is not known"),
        ({"bounds": []}, BadSection, r"layer\.0\.bound' is not known"),
    ],
)
def test_a_forged_header_is_refused(gemma: Path, change: dict[str, Any], error: type[DataError], match: str) -> None:
    with Bundle(gemma) as bundle:
        header: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(bundle.header))
    header["model"] |= change
    body = msgspec.json.encode(header)
    with pytest.raises(error, match=match):
        codec.decode_header(body, digest(body), gemma.stat().st_size)
