"""flashd ask with a model of its own: what it answers, what it keeps, and that it stays under its budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from flashd.cli.commands.ask import daemon_answers
from flashd.cli.options import Ask
from flashd.cli.parser import parse
from tests.cli.command import FLASHD, refused, run


def test_a_daemon_that_is_not_asked_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "socket").touch()
    monkeypatch.setenv("FLASHD_SOCKET", str(tmp_path / "socket"))
    for options, asked, said in (
        ([], True, ""),
        (["--stats", "--json"], True, ""),
        (["--context", "64"], False, "flashd: the daemon is not asked because of --context;"),
        (["--stats", "--no-drafts"], False, "flashd: the daemon is not asked because of --no-drafts;"),
        (["--stats", "--model", "m.flash"], False, ""),
    ):
        ask = parse(["ask", "the", *options])
        assert isinstance(ask, Ask) and daemon_answers(ask) is asked
        err = capsys.readouterr().err
        assert err.startswith(said) and bool(err) is bool(said)


def test_what_cut_an_answer_is_told(tiny_bundle: Path) -> None:
    ask: list[str | Path] = ["ask", "the", "--model", tiny_bundle, "--ignore-eos", "--json", "--context", "40"]
    for most, finish in (("400", "context"), ("3", "length")):
        assert json.loads(run(*ask, "--max-tokens", most).stdout)["finish"] == finish


def test_too_small_a_budget_names_one_that_works(packed: dict[str, Path]) -> None:
    bundle = packed["int4"]
    done = run("ask", "Hi", "--model", bundle, "--context", "256", "--memory", "64M", "--max-tokens", "4")
    refused(done, os.EX_CONFIG, "64M is too small", "--memory ")
    smallest = done.stderr.decode().split("--memory ")[1].strip()
    done = run(
        "ask", "Hi", "--model", bundle, "--context", "256", "--memory", smallest, "--max-tokens", "4", "--json"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["peak_bytes"] <= facts["memory_bytes"] == int(smallest[:-1]) << 20
    assert not facts["resident"] and facts["card_bytes_per_token"] > 0


@pytest.mark.parametrize("memory", ["226M", "300M", "600M"])
def test_the_peak_stays_under_the_budget(packed: dict[str, Path], memory: str) -> None:
    prompt = "Tell me about the sea. " * 100
    done = run("ask", prompt, "--model", packed["int4"], "--memory", memory, "--max-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["prompt_tokens"] > 500
    assert facts["peak_bytes"] <= facts["memory_bytes"]


def test_the_peak_of_a_long_context_stays_under_the_budget(short: Path) -> None:
    """Where the KV cache is larger than what loading takes, attention's scores come on top of all that there was."""
    context = ["--context", "3072", "--memory"]
    plan = json.loads(run("plan", short, *context, "2G", "--json").stdout)
    assert plan["parts"]["opening"] == 0
    ask: list[str | Path] = [
        "ask",
        "The sea is wide. " * 590,
        "--model",
        short,
        "--max-tokens",
        "2",
        "--json",
    ]
    facts = json.loads(run(*ask, *context, str(plan["whole"] + (3 << 20))).stdout)
    assert facts["resident"] and facts["prompt_tokens"] > 2900
    assert facts["peak_bytes"] <= facts["memory_bytes"]


def test_the_peak_of_a_long_answer_stays_under_the_budget(packed: dict[str, Path]) -> None:
    """Each pass opens and drops sessions; what they leave in gaps must not add up."""
    done = run(
        "ask", "Tell me a story.", "--model", packed["int4"], "--memory", "205M", "--context", "512", "--json",
        "--ignore-eos", "--max-tokens", "60",
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert not facts["resident"] and facts["tokens"] == 60
    assert facts["peak_bytes"] <= facts["memory_bytes"]


def test_a_base_model_completes_what_it_is_given(tmp_path: Path) -> None:
    """Without a chat template a prompt is the beginning of a text, in which nothing is a control token."""
    from flashd.bundle.reader import Bundle
    from flashd.engine.decoding.text import Message
    from flashd.engine.engine import Prompts
    from flashd.pack.pack import pack
    from tests.goldens import folders
    from tests.goldens.models import GOLDENS

    folder = folders.write(tmp_path / "base", "llama3", GOLDENS["llama3"].write(tmp_path / "m.gguf"))
    pack(folder, tmp_path / "m.flash", "int8")
    with Bundle(tmp_path / "m.flash") as bundle:
        assert bundle.header.text.chat_template is None
        prompts = Prompts(bundle)
        assert prompts.tokens([Message("user", "the other")]) == prompts.plain("the other")
        assert prompts.plain("<|end|>")[0] not in prompts.tokens([Message("user", "<|end|>")])
    done = run("ask", "the other", "--model", tmp_path / "m.flash", "--memory", "400M", "--max-tokens", "3", "--json")
    assert json.loads(done.stdout)["prompt_tokens"] == len(prompts.plain("the other"))


def test_the_first_command_packs_the_default_model_and_answers(tmp_path: Path) -> None:
    question = ["ask", "Name the capital of France.", "--memory", "200M", "--context", "512", "--temperature", "0"]
    done = run(*question, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"Paris" in done.stdout
    assert {p.suffix for p in (tmp_path / "flashd").iterdir()} == {".flash", ""}
    assert b"Paris" in run(*question, home=tmp_path).stdout


def test_ctrl_c_keeps_what_was_said(packed: dict[str, Path]) -> None:
    # of its own accord it ends after some seconds
    long = ["--ignore-eos", "--max-tokens", "500"]
    ask = [*FLASHD, "ask", "Tell me a story.", "--model", str(packed["int4"]), "--memory", "230M", "--stats", *long]
    with subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        said = process.stdout.read(12)
        process.send_signal(signal.SIGINT)
        rest, word = process.stdout.read(), process.stderr.read().decode()
    assert process.returncode == 130, word
    assert len(said) == 12 and rest.endswith(b"\n")
    assert "ended by interrupted" in word and "Traceback" not in word


def test_nothing_is_reported_and_nothing_is_kept_for_it(tmp_path: Path, tiny_bundle: Path) -> None:
    """onnxruntime's wheels would keep a database of what to report in the cache folder."""
    ask: list[str | Path] = ["ask", "hello", "--model", tiny_bundle, "--memory", "400M", "--max-tokens", "2"]
    done = run(*ask, "--no-snapshots", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_asked_twice_needs_no_pass_the_third_time(tiny_bundle: Path, cache: Path) -> None:
    ask: list[str | Path] = ["ask", "the thesis", "--model", tiny_bundle, "--memory", "400M", "--max-tokens", "4"]
    ask += ["--temperature", "0"]
    once, twice, third = (json.loads(run(*ask, "--json").stdout) for _ in range(3))
    assert once["text"] == twice["text"] == third["text"]
    assert once["prompt_tokens"] == twice["prompt_tokens"] == third["reused_tokens"] > 0
    assert third["prompt_tokens"] == 0 and third["snapshot_bytes"] > 0 == twice["snapshot_bytes"]
    assert f"{third['reused_tokens']} more were kept" in run(*ask, "--stats").stderr.decode()
    assert json.loads(run(*ask, "--json", "--no-snapshots").stdout)["reused_tokens"] == 0
    kept = list((cache / "flashd" / "snapshots").iterdir())
    assert len(kept) == 2 and all(p.stat().st_mode & 0o077 == 0 for p in kept)


def test_what_is_not_asked_for_does_not_loop(packed: dict[str, Path]) -> None:
    """The likeliest tokens make one line again and again: so the default is another."""
    ask: list[str | Path] = ["ask", "Write a poem about the sea.", "--model", packed["int8"], "--max-tokens", "200"]
    for options, loops in ((["--temperature", "0"], True), (["--seed", "1"], False), (["--seed", "2"], False)):
        text = run(*ask, *options).stdout.decode()
        times = max(Counter(filter(None, text.splitlines())).values())
        assert times > 4 if loops else times < 3, text
