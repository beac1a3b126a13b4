"""What every document says can be followed: links, commands, configurations, paths; the README is short and plain."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from device.appliance import check
from flashd.cli.parser import build as _parser
from flashd.config import typed_yaml
from flashd.config.settings import parse
from flashd.errors import UsageError
from flashd.update.manifest import Manifest
from tests.documents import ROOT, Block, Document, commands, documents
from tests.pictures import speed

DOCUMENTS = documents()
README = Document(ROOT / "README.md")
MOST_LINES, FIRST_LINES, FIRST_CONFIGURATION = 220, 40, 15
WORDS = 16
"""Of a sentence, on average."""

OWN_PATH = re.compile(r"(?<![\w./~<>-])[\w@.-]+(?:/[\w@.-]+)+(?![\w/*<>-])")
"""A path in running text or in a diagram, such as device/drives.py."""

MADE = ("deploy/wheels", "device/sensors/processor.py", "device/outputs/lamp.py")
"""Paths that the reader makes."""

MISSING = "the following arguments are required"
each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def parses(words: list[str]) -> None:
    """Raises UsageError."""
    try:
        _parser().parse_args(words)
    except SystemExit as end:  # --help, --version
        assert not end.code


def blocks(language: str) -> list[tuple[Document, Block]]:
    return [(d, block) for d in DOCUMENTS for block in d.blocks if block.language == language]


@each
def test_links_lead_somewhere(document: Document) -> None:
    for link in document.links:
        if re.match(r"https?://", link):
            continue
        address, _, anchor = link.partition("#")
        target = (document.path.parent / address).resolve() if address else document.path
        assert target.is_relative_to(ROOT), f"{document.name}: {link} leads out of the project"
        assert target.exists(), f"{document.name}: {link} leads nowhere"
        if anchor:
            assert anchor in Document(target).anchors, f"{document.name}: {link} names no heading"


@each
def test_commands_are_such(document: Document) -> None:
    for block in document.blocks:
        if block.language not in ("sh", "console"):
            continue
        for words in commands(block):
            _check_command(words, f"{document.name}, line {block.line}")


def _check_command(words: list[str], where: str) -> None:
    program = words[0]
    if Path(program).name == "flashd":
        try:
            parses(words[1:])
        except UsageError as error:
            pytest.fail(f"{where}: {' '.join(words)}: {error}")
    elif Path(program).name == "python" and words[1:2] == ["-m"] and words[2].startswith("tests."):
        assert importlib.util.find_spec(words[2]), f"{where}: there is no {words[2]}"
    elif "/" in program and not program.startswith(("/", "~")):
        assert (ROOT / program).is_file(), f"{where}: there is no {program}"


@each
def test_commands_in_the_text_have_the_options_that_they_name(document: Document) -> None:
    for span in document.spans("code_inline"):
        words = span.content.split()
        if words[0] != "flashd" or len(words) == 1:
            continue
        try:
            parses(words[1:])
        except UsageError as error:
            assert MISSING in str(error), f"{document.name}: {span.content}: {error}"


@each
def test_modules_that_the_text_names_are_there(document: Document) -> None:
    for span in document.spans("code_inline"):
        for module in re.findall(r"python -m (tests(?:\.\w+)+)", span.content):
            assert importlib.util.find_spec(module), f"{document.name}: there is no {module}"


@each
def test_paths_that_it_names_are_there(document: Document) -> None:
    texts = [span.content for span in document.spans("code_inline")]
    texts += [block.text for block in document.blocks if not block.language]
    for path in [path for text in texts for path in OWN_PATH.findall(text)]:
        bases = [document.path.parent, ROOT, ROOT / "flashd"]
        if not any((base / path.split("/")[0]).exists() for base in bases):
            continue  # not one of ours
        assert path in MADE or any((base / path).exists() for base in bases), f"{document.name}: there is no {path}"


@pytest.mark.parametrize(("document", "block"), blocks("yaml"), ids=str)
def test_configurations_are_right(document: Document, block: Block) -> None:
    name = f"{document.name}, line {block.line}"
    if block.marker == "flashd-update.yaml":
        typed_yaml.parse(block.text, Manifest)
    elif not block.marker.startswith("recipe"):
        parse(block.text, name, check)


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= MOST_LINES


@each
def test_sentences_are_short(document: Document) -> None:
    sentences = document.sentences
    longest = sorted(sentences, key=lambda sentence: len(sentence.split()))[-3:]
    assert sum(len(s.split()) for s in sentences) / len(sentences) <= WORDS, longest


def test_the_readme_gives_a_first_answer_at_once_and_shows_what_it_is() -> None:
    first = next(block for block in README.blocks if block.marker == "first-command")
    answer = next(block for block in README.blocks if block.line > first.line)
    assert answer.language == "console" and "Paris" in answer.text
    assert answer.line + answer.text.count("\n") <= FIRST_LINES
    images = [str(image.attrGet("src")) for image in README.spans("image")]
    assert {Path(image).suffix for image in images[:2]} <= {".png", ".svg"} and len(images) > 1
    assert README.text.index(images[0]) < README.text.index("## ")


def test_the_readmes_first_button_is_short() -> None:
    button = next(block for block in README.blocks if block.language == "yaml" and "kind: button" in block.text)
    assert len(button.text.splitlines()) <= FIRST_CONFIGURATION


def test_both_commands_of_the_readme_are_marked_for_ci() -> None:
    assert [block.marker for block in README.blocks if block.marker] == ["first-command", "test-command"]


def test_the_plot_is_of_the_figures_in_the_table() -> None:
    drawn = (ROOT / "tests" / "pictures" / "speed.svg").read_text("utf-8")
    rows = speed.rows((ROOT / "tests" / "lab" / "RESULTS.md").read_text("utf-8"))
    assert len(rows) == len(speed.NAMES)
    for row in rows:
        assert all(f">{figure:g}<" in drawn for figure in (row.rate, row.first)), "python -m tests.pictures speed"


def test_the_readme_repeats_what_was_measured() -> None:
    """A figure of the README stands in RESULTS.md too."""
    measured = (ROOT / "tests" / "lab" / "RESULTS.md").read_text("utf-8")
    table = README.text[README.text.index("## Results") : README.text.index("## Model families")]
    figures = re.findall(r"\d+\.\d+", table)
    assert figures and [figure for figure in figures if figure not in measured] == []


def test_what_is_checked_can_be_wrong(tmp_path: Path) -> None:
    (tmp_path / "d.md").write_text(
        "# A b, c!\n\n[x](nowhere.md)\n\n```console\n$ flashd plan --memry 1G && ls\nout\n```\n"
    )
    document = Document(tmp_path / "d.md")
    assert document.links == ["nowhere.md"] and document.anchors == {"a-b-c"}
    (block,) = document.blocks
    assert list(commands(block)) == [["flashd", "plan", "--memry", "1G"], ["ls"]]
    with pytest.raises(UsageError):
        parses(["plan", "--memry", "1G"])
