"""flashd bench --grid: which runs are made, under which commands, and what is said of them. Nothing is timed."""

from __future__ import annotations

import json
import sys
from itertools import product
from os import EX_USAGE
from pathlib import Path

import pytest

from flashd.bench import compare, grid
from flashd.bench.compare import DRAFTS, PEER
from flashd.bench.grid import Point
from flashd.cli.main import main
from flashd.pack.pack import pack
from tests import tiny

BUDGETS = ("300M", "400M")

CARD = """
import json, os, sys
log, name, memory, *command = sys.argv[1:]
peer = "flashd.bench.llama_cpp" in command
with open(log, "a") as file:
    print(name, memory, "peer" if peer else command[command.index("--memory") + 1], file=file)
if peer and (name, memory) == ("slow", "300M"):
    sys.exit("killed")
if peer:
    print(json.dumps({"load_seconds": 1, "first_token_seconds": 2, "decode_tokens_per_second": 4}))
else:
    os.execv(command[0], command)
"""
"""A card's command: it notes what it is asked to run, and answers for llama.cpp, which the tests do not need."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    pack(tiny.write(folder / "m.gguf"), folder / "m.flash", "int4")
    return folder / "m.flash"


@pytest.fixture
def asked(bundle: Path, tmp_path: Path) -> list[str]:
    """A command line of two cards and two budgets. The cards' runs are noted in `log`."""
    (tmp_path / "card.py").write_text(CARD)
    limit = f"{sys.executable} {tmp_path / 'card.py'} {tmp_path / 'log'}"
    cards = [f"{name}={limit} {name} {{memory}}" for name in ("slow", "fast")]
    model = bundle.with_name("m.gguf")
    return [
        "bench", str(bundle), "--gguf", str(model), "--prompt", "the", "--tokens", "3", "--repeat", "2",
        "--memory", *BUDGETS, *(word for card in cards for word in ("--grid", card)),
    ]  # fmt: skip


def test_every_budget_is_measured_on_every_card_in_turns(
    asked: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, "--json", "--plot", str(tmp_path / "grid.svg")]) == 0
    points = json.loads(capfd.readouterr().out)
    places = list(product(("slow", "fast"), BUDGETS))
    assert [(p["card"], p["memory"], p["name"]) for p in points] == [
        (*place, name) for place in places for name in (PEER, DRAFTS)
    ]
    of_a_round = [f"{card} {memory} {who}" for card, memory in places for who in ("peer", memory)]
    again = [run for run in of_a_round if run != "slow 300M peer"]  # it failed
    assert (tmp_path / "log").read_text().splitlines() == of_a_round + again
    failed, *rest = points
    assert failed["figures"] == {} and "killed" in failed["error"]
    assert not any(point["error"] for point in rest)
    assert all(point["figures"]["decode_tokens_per_second"] for point in rest)
    drawn = (tmp_path / "grid.svg").read_text()
    assert f">{DRAFTS}, slow<" in drawn and f">{PEER}, fast<" in drawn and "<dc:date>" not in drawn


def test_a_grid_on_which_nothing_works_is_an_error(
    asked: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked[: asked.index("--grid")], "--grid", "none=false {memory}"]) != 0
    assert "nothing could be measured: llama.cpp mmap ended with 1" in capfd.readouterr().err


def test_the_table_has_a_line_a_point() -> None:
    theirs = {"decode_tokens_per_second": 1.0, "first_token_seconds": 4.0}
    ours = {
        "decode_tokens_per_second": 4.0, "first_token_seconds": 2.0, "tokens_per_pass": 3.1,
        "card_bytes_per_token": 3 << 20, "peak_bytes": 7 << 20,
    }  # fmt: skip
    points = [
        Point("usb", "400M", PEER, theirs), Point("usb", "400M", DRAFTS, ours),
        Point("usb", "1G", PEER, {}, "it was killed"), Point("usb", "1G", DRAFTS, ours),
    ]  # fmt: skip
    _, _, first, second, why = grid.table(points).splitlines()
    assert first == "|usb|400M|1|4|4 (4.00x)|2 (2.00x)|3.1|3|7|"
    assert second == "|usb|1G|failed|failed|4|2|3.1|3|7|"
    assert why == "llama.cpp mmap on usb with 1G: it was killed"
    head, _, alone = grid.table([points[1]]).splitlines()
    assert "llama.cpp" not in head and alone == "|usb|400M|4|2|3.1|3|7|"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--grid", "usb=true"], "give the budgets with --memory"),
        (["--memory", "400M", "--grid", "usb=true", "--wrap", "true"], "leave out --wrap"),
        (["--memory", "400M", "--grid", "true"], "write CARD=COMMAND"),
        (["--memory", "400M", "--grid", "usb="], "write CARD=COMMAND"),
        (["--memory", "400M", "--grid", "usb=no-such-command"], "no-such-command is not a command on this machine"),
        (["--memory", "400M", "--grid", "usb=true", "usb=true"], "names a card twice"),
    ],
)
def test_what_is_no_grid_is_said_before_anything_is_measured(
    bundle: Path, more: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.Bench, "measured", lambda *_: pytest.fail("measured"))
    assert main(["bench", str(bundle), *more]) == EX_USAGE
    assert said in capfd.readouterr().err
