"""flashd bench: what the contenders read is counted, not what they take."""

from __future__ import annotations

import json
from os import EX_NOINPUT, EX_USAGE
from pathlib import Path

import pytest

from flashd.bench import compare
from flashd.bench.compare import DRAFTS, HYBRID, NAIVE, PEER, Row
from flashd.bundle.reader import Bundle
from flashd.cli.main import main
from flashd.engine.paging.card import READ_BYTES
from flashd.engine.planning.parts import BUFFERS
from flashd.pack import default_model
from flashd.pack.pack import pack
from tests.board.shorten import shorten

TOKENS = 9


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose f16 rows are always paged, however few they are: 42 MB of FFN."""
    folder = tmp_path_factory.mktemp("bench")
    source = shorten(default_model.model_file(), folder / "m.gguf", 4)
    pack(source, folder / "m.flash", "f16")
    return folder / "m.flash"


def test_the_baselines_read_what_the_paper_says(
    paged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "bench.svg"
    asked = ["bench", str(paged), "--prompt", "the fox", "--tokens", str(TOKENS), "--repeat", "1", "--memory", "400M"]
    assert main([*asked, "--json", "--plot", str(picture)]) == 0
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert list(rows) == [NAIVE, HYBRID, DRAFTS]
    with Bundle(paged) as bundle:
        ffn = sum(s.length for s in bundle.header.sections if s.name.endswith(".ffn"))
        head = bundle.section("head")
    naive = rows[NAIVE]["figures"]
    # what a budget is larger than the smallest pins a little, and up to six reads ahead are early or late
    assert 0.8 * ffn < naive["card_bytes_per_token"] < ffn + head.length + 2 * BUFFERS * READ_BYTES / TOKENS
    assert naive["window_hit_rate"] < 0.25 and naive["peak_bytes"] <= int(rows[NAIVE]["memory"])
    for name in (HYBRID, DRAFTS):
        assert rows[name]["figures"]["card_bytes_per_token"] == 0 and rows[name]["memory"] == "400M"
    assert picture.read_text().startswith("<?xml")


def test_a_contender_that_fails_is_named(paged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(paged), "--repeat", "1", "--wrap", "false"]) != 0
    assert "naive" in capfd.readouterr().err


def test_what_cannot_be_drawn_is_said_before_anything_is_measured(
    paged: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.Bench, "run", lambda self: pytest.fail("measured"))
    assert main(["bench", str(paged), "--plot", "no/b.svg"]) == EX_USAGE
    assert "--plot no/b.svg: there is no such folder" in capfd.readouterr().err
    assert main(["bench", str(paged), "--plot", "b.txt"]) == EX_USAGE
    assert "--plot b.txt: the name of a picture must end in .svg, .png, .pdf" in capfd.readouterr().err
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    assert main(["bench", str(paged), "--plot", "b.svg"]) == EX_NOINPUT
    assert "pip install 'flashd[bench]'" in capfd.readouterr().err


def test_the_table_has_ratios_to_the_peer() -> None:
    figures = {"first_token_seconds": 2.0, "decode_tokens_per_second": 4.0, "card_bytes_per_token": 3 << 20}
    rows = [
        Row(PEER, "", {"first_token_seconds": 4.0, "decode_tokens_per_second": 1.0}),
        Row(DRAFTS, "505M", {**figures, "window_hit_rate": 0.25, "peak_bytes": 7 << 20}),
    ]
    head, _, peer, ours = compare.table(rows).splitlines()
    cells = dict(zip(head.split("|")[3:], ours.split("|")[3:], strict=True))
    assert cells["first token s"] == "2 (2.00x)" and cells["decode tok/s"] == "4 (4.00x)"
    assert cells["card MiB/token"] == "3" and cells["found in RAM"] == "25 %" and cells["peak MiB"] == "7"
    assert peer.startswith("|llama.cpp mmap||") and ours.startswith("|flashd|505M|")
