"""A newcomer who has device/README.md alone: its recipes, followed word for word in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.documents import ROOT, Document

README = Document(ROOT / "device" / "README.md")


@dataclass(frozen=True)
class Recipe:
    """What a section of device/README.md tells its reader to write."""

    settings: str
    module: str
    """The module's path."""
    reader: str
    line: str
    """Of the registry."""
    configuration: str
    test: str

    @classmethod
    def of(cls, heading: str) -> Recipe:
        text = README.text[README.text.index(f"## {heading}\n") :]
        text = text[: text.index("\n## ")]
        blocks = [
            (language, textwrap.dedent(code).strip("\n"))
            for language, code in re.findall(r"^ +```(\w+)\n(.*?)^ +```$", text, re.MULTILINE | re.DOTALL)
        ]
        settings, reader, line, test = (code for language, code in blocks if language == "python")
        (configuration,) = (code for language, code in blocks if language == "yaml")
        found = re.search(r"such\s+as\s+`(\S+\.py)`", text)
        assert found is not None
        return cls(settings, found[1], reader, line, configuration, test)

    def follow(self, tree: Path, union: str, tests: str) -> str:
        """Does what it says in a copy of the project; the name of the recipe's test."""
        name, opener = re.findall(r"\w+", self.line)
        (tree / self.module).write_text(self.reader + "\n")
        _change(tree / "flashd/config/devices.py", f"\n{union} = ", f"\n{self.settings}\n\n\n{union} = {name} | ")
        kinds = (tree / self.module).parent / "kinds.py"
        _change(kinds, "import annotations\n", f"import annotations\nfrom flashd.config.devices import {name}\n")
        module = self.module.removesuffix(".py").replace("/", ".")
        _change(kinds, "import annotations\n", f"import annotations\nfrom {module} import {opener}\n")
        _change(kinds, "] = {\n", "] = {\n    " + self.line + "\n")
        (tree / "recipe.yaml").write_text(self.configuration + "\n")
        with (tree / tests).open("a") as file:
            file.write(f"\n\n{self.test}\n")
        found = re.match(r"def (\w+)", self.test)
        assert found is not None
        return found[1]


def _change(path: Path, before: str, after: str) -> None:
    text = path.read_text("utf-8")
    assert text.count(before) == 1, f"{path}: {before!r}"
    path.write_text(text.replace(before, after), "utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    left_out = shutil.ignore_patterns("__pycache__", "goldens", "wheels")
    for folder in ("flashd", "device", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    return tmp_path / "tree"


def run(tree: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("heading", "union", "tests"),
    [
        ("Add a sensor", "AnySensor", "tests/device/test_sensors.py"),
        ("Add an output", "AnyOutput", "tests/device/test_outputs.py"),
    ],
)
def test_a_newcomer_gets_to_the_end_of_a_recipe(tree: Path, heading: str, union: str, tests: str) -> None:
    name = Recipe.of(heading).follow(tree, union, tests)
    run(tree, "-m", "flashd", "check-config", "recipe.yaml")
    run(tree, "-m", "pytest", f"{tests}::{name}", "-p", "no:cacheprovider")
