"""flashd pack, info, verify, plan and eval."""

from __future__ import annotations

import json
import os
from itertools import takewhile
from pathlib import Path

import pytest

from tests.cli.command import refused, run


def test_info_and_verify_speak_to_machines(tiny_bundle: Path) -> None:
    facts = json.loads(run("info", tiny_bundle, "--json").stdout)
    assert (facts["family"], facts["layers"], facts["neurons"], facts["rows"]) == ("llama", 3, 224, "int4")
    assert json.loads(run("verify", tiny_bundle, "--json").stdout)["whole"] is True
    assert b"tiny llama" in run("info", tiny_bundle).stdout


def test_pack_says_what_fewer_bits_cost(tmp_path: Path, tiny_bundle: Path) -> None:
    source, out = tiny_bundle.with_name("tiny.gguf"), tmp_path / "m.flash"
    done = run("pack", source, "--out", out, "--max-loss", "0.9")
    assert done.returncode == 0 and b"of groups have fewer bits. Perplexity" in done.stdout, done.stderr
    facts = json.loads(run("info", out, "--json").stdout)
    assert len(facts["int3_from_group"]) == facts["layers"] and facts["perplexity_loss"] <= 0.9
    assert facts["ffn_bytes"] < json.loads(run("info", tiny_bundle, "--json").stdout)["ffn_bytes"]
    (tmp_path / "t.txt").write_text("words")
    refused(run("pack", source, "--out", out, "--text", tmp_path / "t.txt"), os.EX_USAGE, "--max-loss")
    refused(run("pack", source, "--out", out, "--max-loss", "2"), os.EX_USAGE, "--max-loss", "between 0 and 1")


def test_info_says_which_families_can_be_packed() -> None:
    from flashd.pack.families.registry import FAMILIES

    rows = json.loads(run("info", "--families", "--json").stdout)
    assert [row["architecture"] for row in rows] == list(FAMILIES)
    text = run("info", "--families").stdout.decode()
    assert len(text.splitlines()) == len(rows) and all(row["models"] in text for row in rows)
    refused(run("info"), os.EX_USAGE, "--families")


def test_the_readme_says_of_every_family_what_its_answers_were_compared_on() -> None:
    from flashd.pack.families.registry import FAMILIES

    lines = (Path(__file__).parent.parent.parent / "README.md").read_text("utf-8").splitlines()
    start = lines.index("| architecture | models | answers compared on |") + 2
    rows = [line.strip("| ").split(" | ") for line in takewhile(lambda line: line.startswith("|"), lines[start:])]
    compared = {name: row[2] for row in rows for name in row[0].split(", ")}
    assert set(compared) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert all(weights in compared[name] for weights in family.checked.split(", ")), name


def test_plan_is_what_ask_does(packed: dict[str, Path]) -> None:
    budget = ["--memory", "215M", "--context", "512"]
    plan = json.loads(run("plan", packed["int4"], *budget, "--json").stdout)
    ask: list[str | Path] = [
        "ask",
        "Hi",
        "--model",
        packed["int4"],
        *budget,
        "--max-tokens",
        "8",
        "--no-drafts",
        "--ignore-eos",
        "--json",
    ]
    facts = json.loads(run(*ask).stdout)
    assert not plan["resident"] and not facts["resident"]
    groups = sum(plan["groups"])
    pinned, lent = sum(plan["pinned"]) / groups, plan["lent_groups"] / groups
    # a short text leaves room of its KV cache to more groups
    assert pinned - 0.02 < facts["window_hit_rate"] < pinned + lent + 0.02
    # what is read ahead may be counted a token early or late
    least = plan["card_bytes"] - plan["lent_groups"] * max(plan["group_bytes"])
    assert 0.75 * least < facts["card_bytes_per_token"] < 1.25 * plan["card_bytes"]


def test_eval_gives_the_perplexity_of_the_reference(packed: dict[str, Path], smollm: Path) -> None:
    import numpy as np

    from tests.conftest import DATA
    from tests.engine.test_paths import tokens_of
    from tests.reference import Reference

    tokens = tokens_of(packed["int8"], (DATA / "chat.txt").read_text("utf-8"))
    logits = Reference(smollm).logits(tokens)[:-1].astype(np.float64)
    log_p = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    expected = np.exp(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean())
    # of so few tokens rounding makes up to 3 % more or less, by the last bits of a processor's sums
    for memory, arithmetic, rel in (("230M", "float32", 0.005), ("2G", "float32", 0.005), ("2G", "int8", 0.04)):
        done = run(
            "eval", packed["int8"], "--text", DATA / "chat.txt", "--memory", memory, "--context", "512",
            "--arithmetic", arithmetic, "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["perplexity"] == pytest.approx(expected, rel=rel)
