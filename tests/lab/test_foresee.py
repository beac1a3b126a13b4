"""What is foreseen from a config.json is what the engine reads, counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashd.bundle.reader import Bundle
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.decoding.line import Figures
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.engine import Prompts
from flashd.engine.forward.ffn import experts
from flashd.engine.forward.paged import PagedModel
from flashd.engine.model.sizes import TREE_NODES
from flashd.engine.paging.eviction import LeastRecentlyUsed, Numbers
from flashd.engine.planning import unpacked
from flashd.engine.planning.parts import BUFFERS, section_bytes
from flashd.engine.planning.plan import make_plan, smallest
from flashd.errors import DataError
from flashd.pack.pack import pack
from flashd.system.memory import MIB, parse_size
from tests.engine.one_text import generate
from tests.goldens.models import EXPERTS, GOLDENS, LAYERS, TOKENS, USED
from tests.lab.foresee import drawn, foresee, header_of

SMOLLM: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS_OUT, CONTEXT = 25, 512


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """SmolLM2-135M's."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM))
    return tmp_path / "config.json"


def test_sections_are_as_long_as_those_of_the_bundle(config: Path, packed: dict[str, Path]) -> None:
    for kind in ("int4", "int8"):
        with Bundle(packed[kind]) as bundle:
            theirs = {s.name: (s.length, s.run) for s in bundle.header.sections}
        foreseen = header_of(config, "int4" if kind == "int4" else "int8").sections
        assert len(foreseen) > 4 * SMOLLM["num_hidden_layers"]
        assert {s.name: (s.length, s.run) for s in foreseen}.items() <= theirs.items()


@pytest.mark.parametrize("memory", ["190M", "191M"])
@pytest.mark.parametrize("drafts", [True, False])
def test_card_bytes_a_token_are_those_that_the_engine_counts(
    config: Path, packed: dict[str, Path], memory: str, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as many passes on a fast machine as on a slow one, and enough of them
    monkeypatch.setattr(Pace, "goes_on", lambda _pace, _draft, steps, _nodes, _ahead: steps < 1)
    figures = Figures()
    with Bundle(packed["int4"]) as bundle:
        prompt = Prompts(bundle).plain("Name some seas.")
        # the middle of the answer; a pass that checks drafts needs the KV cache for a tree of them
        text = len(prompt) + TOKENS_OUT // 2 + TREE_NODES * drafts
        found = foresee(header_of(config), parse_size(memory), CONTEXT, text)
        model = PagedModel(bundle, found.plan)
        try:
            said = generate(
                Conversation(model), prompt, Sampler(Sampling()), limit=TOKENS_OUT, eos=(), figures=figures,
                drafts=drafts,
            )  # fmt: skip
            assert len(list(said)) == TOKENS_OUT
        finally:
            model.close()
    # with drafts what one token costs is told how many a pass gives; up to six reads ahead are early or late
    assert (figures.passes < TOKENS_OUT - 1) == drafts
    assert found.bytes_read * figures.passes == pytest.approx(figures.decode_card_bytes, rel=0.05)
    # and where a growing text or a draft takes room back, what is read ahead is read anew
    leeway = 0.05 * figures.decode_card_reads + 2 * BUFFERS
    assert found.reads * figures.passes == pytest.approx(figures.decode_card_reads, abs=leeway)


def test_ask_reads_what_is_foreseen_within_a_twentieth(config: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    ask = [
        sys.executable, "-m", "flashd", "ask", "Name some seas.", "--model", str(packed["int4"]), "--memory", "200M",
        "--context", str(CONTEXT), "--max-tokens", str(TOKENS_OUT), "--ignore-eos", "--no-drafts", "--json",
        "--threads", "2",
    ]  # fmt: skip
    done = subprocess.run(ask, capture_output=True, check=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    facts = json.loads(done.stdout)
    # libraries take some MiB more on one machine than on another: 200M is above the least budget on each
    text, base = facts["prompt_tokens"] + TOKENS_OUT // 2, facts["libraries_bytes"]
    with Bundle(packed["int4"]) as bundle:
        base += section_bytes(bundle.header, "token_bytes")  # which a config.json does not tell
    found = foresee(header_of(config), parse_size("200M"), CONTEXT, text, base)
    assert facts["card_bytes_per_token"] == pytest.approx(found.bytes_read, rel=0.05)
    passes = TOKENS_OUT - 1
    assert facts["prompt_tokens"] > TREE_NODES  # else groups came to stay while it was read
    reads = (found.first_reads + (passes - 1) * found.reads) / passes
    leeway = 0.05 * reads + 2 * BUFFERS / passes  # as above
    assert facts["card_reads_per_token"] == pytest.approx(reads, abs=leeway)


def test_a_mixture_reads_what_its_trace_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(GOLDENS["qwen3moe"].write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    asked: list[Numbers] = []
    real = LeastRecentlyUsed.use

    def use(self: LeastRecentlyUsed, units: Numbers) -> None:
        asked.append(units)
        real(self, units)

    monkeypatch.setattr(experts, "TRUSTED", 2.0)  # a guess that is wrong would be read too
    with Bundle(tmp_path / "m.flash") as bundle:
        header = bundle.header
        of_all = LAYERS * header.model.expert_groups * unpacked.group_kept(header.group)
        counts = set()
        for capacity in (0, 2, 4, EXPERTS):
            memory = smallest(header, 64, 0, threads=2) + capacity * of_all
            plan = make_plan(header, memory=memory, context=64, threads=2, base=0)
            with monkeypatch.context() as patch:
                patch.setattr(LeastRecentlyUsed, "use", use)
                asked.clear()
                model = PagedModel(bundle, plan)
                try:
                    for i, token in enumerate(TOKENS[:40]):
                        if i == 20:
                            at_half = model.card.bytes_read, model.card.reads
                        model.forward(token[None], np.array([0]))
                    read = model.card.bytes_read - at_half[0], model.card.reads - at_half[1]
                finally:
                    model.close()
            routing = np.concatenate(asked).reshape(40, LAYERS, USED)
            found = foresee(header, memory, 64, 64, 0, routing)
            assert (20 * found.bytes_read, 20 * found.reads) == read
            counts.add(read[0])
    assert len(counts) == 4 and min(counts) == 0


def test_where_experts_are_used_unevenly_less_is_read(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 0, "moe_intermediate_size": 256, "num_experts": 32,
        "num_experts_per_tok": 4, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = header_of(tmp_path / "config.json")
    m, expert = header.model, header.model.expert_groups * header.group.nbytes
    held = m.expert_groups * unpacked.group_kept(header.group)
    memory = smallest(header, CONTEXT, 0, threads=2) + 16 * m.layers * held
    even, uneven = (foresee(header, memory, CONTEXT, CONTEXT, 0, drawn(header, 200, skew)) for skew in (0.0, 1.5))
    assert even.bytes_read == pytest.approx(m.layers * 4 * expert / 2, rel=0.1)  # half of the experts are in RAM
    assert even.plan.card_bytes == pytest.approx(even.bytes_read, rel=0.1)
    assert uneven.bytes_read < 0.5 * even.bytes_read


def test_a_seven_billion_model_at_two_and_four_gigabytes(tmp_path: Path) -> None:
    """Llama 2 7B's shape: what RESULTS.md says of it."""
    config = SMOLLM | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "vocab_size": 32000,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = header_of(tmp_path / "config.json")
    ffn = sum(s.length for s in header.sections if s.name.endswith(".ffn"))
    two, four = (foresee(header, parse_size(memory), 256, 256) for memory in ("2G", "4G"))
    assert foresee(header, parse_size("2G"), 256, 64).bytes_read < two.bytes_read
    assert 0.5 * ffn < two.bytes_read < 0.99 * ffn and two.plan.total <= 2048 * MIB
    assert four.bytes_read < 0.3 * ffn
    assert two.seconds(45e6, 2500) == pytest.approx(two.bytes_read / 45e6)


def test_what_cannot_be_foreseen_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMOLLM, "model_type": "mamba"}))
    with pytest.raises(DataError, match="'mamba' is not supported"):
        header_of(tmp_path / "config.json")
