"""The command as a person meets it: one clear line for each mistake, the right exit code, no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise, takewhile
from pathlib import Path

import pexpect
import pytest

from flashd.cli.appliance import daemon_serves
from flashd.cli.main import _parser
from flashd.cli.progress import for_terminal
from flashd.cli.talk import MOST_TURNS, Turns, talk
from tests import tiny

FLASHD = [sys.executable, "-m", "flashd"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test: what is kept of prompts would change what the next costs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*args: str | Path, stdin: bytes = b"", home: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | ({"XDG_CACHE_HOME": str(home)} if home else {})
    return subprocess.run([*FLASHD, *map(str, args)], input=stdin, capture_output=True, check=False, env=env)


def refused(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    """One line on standard error, naming what is wrong, and nothing on standard output."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert done.stdout == b""
    assert text.startswith("flashd: ") and text.count("\n") == 1 and "Traceback" not in text
    assert all(word in text for word in words), text


def test_what_is_right_and_would_not_work_is_said(tmp_path: Path) -> None:
    config = tmp_path / "flashd.yaml"
    for text, doubt in (
        ("model: /none.flash", "model: /none.flash is not there"),
        (f"model: {tiny.write(tmp_path / 'm.gguf')}", "is no bundle; flashd pack makes one of it"),
        ("memory: 900G", "memory: 900G is more than the "),
        (
            "serial: [{name: a, port: /dev/ttyUSB99}, {name: b, port: /dev/null}]",
            "serial: /dev/ttyUSB99 is not there",
        ),
        (f"serial: [{{name: a, port: {tmp_path}}}]", "is no line"),
        ("outputs: [{kind: speech, command: [no-such-voice]}]", "outputs: no-such-voice is not installed"),
    ):
        config.write_text(text)
        done = run("check-config", config)
        assert done.returncode == 0 and b": right; " in done.stdout
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("warning: ") and doubt in line


def test_a_daemon_that_is_not_asked_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "socket").touch()
    monkeypatch.setenv("FLASHD_SOCKET", str(tmp_path / "socket"))
    for options, asked, said in (
        ([], True, ""),
        (["--stats", "--json"], True, ""),
        (["--context", "64"], False, "flashd: the daemon is not asked, because of --context;"),
        (["--stats", "--no-drafts"], False, "flashd: the daemon is not asked, because of --no-drafts;"),
        (["--stats", "--model", "m.flash"], False, ""),
    ):
        assert daemon_serves(_parser().parse_args(["ask", "the", *options])) is asked
        err = capsys.readouterr().err
        assert err.startswith(said) and bool(err) is bool(said)


def test_sizes_and_threads_that_nobody_means_are_refused(tiny_bundle: Path) -> None:
    ask: list[str | Path] = ["ask", "the", "--model", tiny_bundle]
    refused(run(*ask, "--memory", "512"), os.EX_USAGE, "'512' is no amount of memory to work with; write for example")
    for threads in ("0", "257"):
        refused(run(*ask, "--threads", threads), os.EX_USAGE, f"--threads {threads} is out of range")


def test_a_mistyped_command_is_a_line(tmp_path: Path) -> None:
    for command, words in (
        (["ask", "hi", "--context", "x"], "argument --context: invalid int value: 'x'; see flashd ask --help"),
        (["pack", "m.gguf"], "the following arguments are required: --out"), (["sing"], "invalid choice: 'sing'"),
        ([], "COMMAND"), (["bench", tmp_path, "--repeat", "0"], "--repeat 1 and --tokens 2 are the least"),
        (["bench", tmp_path, "--wrap", "'a"], "--wrap 'a: No closing quotation"),
        (["bench", tmp_path, "--wrap", "no-such-command x"], "no-such-command is no command here"),
    ):  # fmt: skip
        refused(run(*command), os.EX_USAGE, words)


def test_pack_takes_the_place_of_bundles_alone(tmp_path: Path, tiny_bundle: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(tiny_bundle.with_name("tiny.gguf"), model)
    before = model.read_bytes()
    refused(run("pack", model, "--out", model), os.EX_USAGE, f"--out {model}: is there and is no bundle")
    refused(run("pack", model, "--out", tmp_path), os.EX_USAGE, f"--out {tmp_path}: is a folder")
    assert model.read_bytes() == before
    refused(run("pack", model, "--out", tmp_path / "no" / "m.flash"), os.EX_CANTCREAT, "No such file or directory")
    out = tmp_path / "m.flash"
    for _ in range(2):
        assert run("pack", model, "--out", out).returncode == 0


def test_where_the_default_model_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(run("ask", "hi"), os.EX_CANTCREAT, "Not a directory")


def test_what_cut_an_answer_is_told(tiny_bundle: Path) -> None:
    ask: list[str | Path] = ["ask", "the", "--model", tiny_bundle, "--ignore-eos", "--json", "--context", "40"]
    for most, finish in (("400", "context"), ("3", "length")):
        assert json.loads(run(*ask, "--max-tokens", most).stdout)["finish"] == finish


def test_of_a_long_talk_much_is_forgotten_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that questions begin alike for some time, and their KV cache is kept."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n" * 80))
    asked: list[int] = []

    def answer(turns: Turns) -> str:
        asked.append(len(turns))
        return "yes"

    talk("Be brief.", answer)
    assert max(asked) == MOST_TURNS + 2  # with the system's words and the question
    assert sum(later < earlier for earlier, later in pairwise(asked)) <= 3


def test_a_talk_says_what_it_does_not_know(tiny_bundle: Path) -> None:
    done = run("chat", "--model", tiny_bundle, "--max-tokens", "2", stdin=b"/help\n/quit\n")
    assert done.returncode == 0 and b"/help is not known; there are /reset and /quit" in done.stderr


def test_a_terminal_is_shown_nothing_that_it_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b]52;c;eA==\x07\x9b2J\rb\n\tgrün 👩\u200d🌾"
    assert for_terminal(text) == text  # piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert for_terminal(text) == "a]52;c;eA==2Jb\n\tgrün 👩\u200d🌾"


def test_bad_model_files(tmp_path: Path, tiny_bundle: Path) -> None:
    source = tiny_bundle.with_name("tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:5000])
    refused(run("pack", tmp_path / "cut.gguf", "--out", tmp_path / "o.flash"), os.EX_DATAERR, "cut.gguf")
    mamba = tiny.write(tmp_path / "mamba.gguf", "mamba")
    refused(run("pack", mamba, "--out", tmp_path / "o.flash"), os.EX_DATAERR, "'mamba'", "llama, ", "qwen2")
    refused(run("pack", tmp_path / "none", "--out", tmp_path / "o.flash"), os.EX_NOINPUT, "no such file")
    refused(run("pack", source, "--out", "/proc/none/o.flash"), os.EX_CANTCREAT, "/proc/none/o.flash")
    assert not (tmp_path / "o.flash").exists()


def test_bad_bundles(tmp_path: Path, tiny_bundle: Path) -> None:
    path = Path(shutil.copy(tiny_bundle, tmp_path / "m.flash"))
    raw = bytearray(path.read_bytes())
    raw[-20000] ^= 1
    path.write_bytes(raw)
    refused(run("verify", path), os.EX_DATAERR, "damaged at byte")
    raw[8] = 99
    path.write_bytes(raw)
    refused(run("info", path), os.EX_DATAERR, "update flashd")
    refused(run("info", tmp_path / "none.flash"), os.EX_NOINPUT, "none.flash")
    refused(run("ask", "hi", "--model", tiny_bundle.with_name("tiny.gguf")), os.EX_DATAERR, "not a flashd bundle")


def test_bad_prompts(tiny_bundle: Path) -> None:
    ask: list[str | Path] = ["ask", "--model", tiny_bundle, "--memory", "400M"]
    refused(run(*ask, ""), os.EX_USAGE, "the prompt is empty")
    refused(run(*ask, "-", stdin=b" \n"), os.EX_USAGE, "the prompt is empty")
    refused(run(*ask, "-", stdin=b"caf\xe9"), os.EX_DATAERR, "not UTF-8 (byte 3)")
    done = subprocess.run(
        [*(os.fsencode(a) for a in FLASHD), b"ask", b"--model", os.fsencode(tiny_bundle), b"caf\xe9"],
        capture_output=True, check=False,
    )  # fmt: skip
    refused(done, os.EX_DATAERR, "not UTF-8")
    refused(run(*ask, "word " * 300, "--context", "64"), os.EX_USAGE, "context room for 63")
    refused(run(*ask, "hi", "--temperature", "-1"), os.EX_USAGE, "--temperature", "0 to 10")
    refused(run(*ask, "hi", "--memory", "lots"), os.EX_USAGE, "'lots'", "512M")


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


@pytest.mark.parametrize("memory", ["220M", "300M", "600M"])
def test_the_peak_stays_under_the_budget(packed: dict[str, Path], memory: str) -> None:
    prompt = "Tell me about the sea. " * 100
    done = run("ask", prompt, "--model", packed["int4"], "--memory", memory, "--max-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["prompt_tokens"] > 500
    assert facts["peak_bytes"] <= facts["memory_bytes"]


def test_the_peak_of_a_long_context_stays_under_the_budget(packed: dict[str, Path]) -> None:
    """Where the KV cache is larger than what loading takes, attention's scores come on top of all that there was."""
    context = ["--context", "6144", "--memory"]
    plan = json.loads(run("plan", packed["int4"], *context, "2G", "--json").stdout)
    assert plan["parts"]["weights while loading"] == 0
    ask: list[str | Path] = [
        "ask",
        "The sea is wide. " * 1190,
        "--model",
        packed["int4"],
        "--max-tokens",
        "2",
        "--json",
    ]
    facts = json.loads(run(*ask, *context, str(plan["whole"] + (3 << 20))).stdout)
    assert facts["resident"] and facts["prompt_tokens"] > 5900
    assert facts["peak_bytes"] <= facts["memory_bytes"]


def test_plan_is_what_ask_does(packed: dict[str, Path]) -> None:
    budget = ["--memory", "230M", "--context", "512"]
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
    assert abs(facts["window_hit_rate"] - plan["pinned_groups"] / plan["groups"]) < 0.1
    # what is read ahead may be counted a token early or late
    assert facts["card_bytes_per_token"] == pytest.approx(plan["card_bytes"], rel=0.25)


def test_info_and_verify_speak_to_machines(tiny_bundle: Path) -> None:
    facts = json.loads(run("info", tiny_bundle, "--json").stdout)
    assert (facts["family"], facts["layers"], facts["neurons"], facts["rows"]) == ("llama", 3, 224, "int4")
    assert json.loads(run("verify", tiny_bundle, "--json").stdout)["whole"] is True
    assert b"tiny llama" in run("info", tiny_bundle).stdout


def test_pack_says_what_fewer_bits_cost(tmp_path: Path, tiny_bundle: Path) -> None:
    source, out = tiny_bundle.with_name("tiny.gguf"), tmp_path / "m.flash"
    done = run("pack", source, "--out", out, "--max-loss", "0.9")
    assert done.returncode == 0 and b"of groups have fewer bits; perplexity" in done.stdout, done.stderr
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

    lines = (Path(__file__).parent.parent / "README.md").read_text("utf-8").splitlines()
    start = lines.index("| architecture | models | answers compared on |") + 2
    rows = [line.strip("| ").split(" | ") for line in takewhile(lambda line: line.startswith("|"), lines[start:])]
    compared = {name: row[2] for row in rows for name in row[0].split(", ")}
    assert set(compared) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert all(weights in compared[name] for weights in family.checked.split(", ")), name


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
    for memory in ("230M", "2G"):
        done = run(
            "eval", packed["int8"], "--text", DATA / "chat.txt", "--memory", memory, "--context", "512", "--json"
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["perplexity"] == pytest.approx(expected, rel=0.005)


def test_the_first_command_packs_the_default_model_and_answers(tmp_path: Path) -> None:
    question = ["ask", "What is the capital of France?", "--memory", "200M", "--context", "512"]
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


def test_chat_remembers_and_ends(packed: dict[str, Path]) -> None:
    args = [*FLASHD[1:], "chat", "--model", str(packed["int4"]), "--max-tokens", "12"]
    child = pexpect.spawn(FLASHD[0], args, encoding="utf-8", timeout=120)
    child.expect("> ")
    child.sendline("My name is Ada. Say hello.")
    child.expect("> ")
    child.sendline("/reset")
    child.expect("> ")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_nothing_is_reported_and_nothing_is_kept_for_it(tmp_path: Path, tiny_bundle: Path) -> None:
    """onnxruntime's wheels would keep a database of what to report in the cache folder."""
    ask: list[str | Path] = ["ask", "hello", "--model", tiny_bundle, "--memory", "400M", "--max-tokens", "2"]
    done = run(*ask, "--no-snapshots", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_asked_twice_needs_no_pass_the_third_time(tiny_bundle: Path, cache: Path) -> None:
    ask: list[str | Path] = ["ask", "the thesis", "--model", tiny_bundle, "--memory", "400M", "--max-tokens", "4"]
    once, twice, third = (json.loads(run(*ask, "--json").stdout) for _ in range(3))
    assert once["text"] == twice["text"] == third["text"]
    assert once["prompt_tokens"] == twice["prompt_tokens"] == third["reused_tokens"] > 0
    assert third["prompt_tokens"] == 0 and third["snapshot_bytes"] > 0 == twice["snapshot_bytes"]
    assert f"{third['reused_tokens']} more were kept" in run(*ask, "--stats").stderr.decode()
    assert json.loads(run(*ask, "--json", "--no-snapshots").stdout)["reused_tokens"] == 0
    kept = list((cache / "flashd" / "snapshots").iterdir())
    assert len(kept) == 2 and all(p.stat().st_mode & 0o077 == 0 for p in kept)
