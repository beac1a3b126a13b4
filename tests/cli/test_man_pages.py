"""The manual pages: they are current, they say everything, and a page viewer understands them."""

from __future__ import annotations

import shutil
import subprocess
import typing
from pathlib import Path

import msgspec
import pytest

from flashd.cli.man_pages import EXIT_STATUS, pages
from flashd.config.settings import Settings
from flashd.errors import FlashdError
from tests.cli.test_help import arguments, commands

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def test_the_pages_are_current() -> None:
    assert {path.name for path in (DEPLOY / "man").iterdir()} == set(pages())
    for name, text in pages().items():
        assert (DEPLOY / "man" / name).read_text("utf-8") == text, "run python -m flashd.cli.man_pages deploy/man"


def test_the_installer_knows_the_pages() -> None:
    installer = (DEPLOY / "install").read_text("utf-8")
    for name in pages():
        assert f"man/{name}) echo /usr/local/share/man/man{name[-1]}/{name} ;;" in installer
        assert f"man/{name} " in installer.replace('"', " ")


def test_every_command_and_option_is_in_the_page() -> None:
    text = pages()["flashd.1"].replace("\\-", "-")
    assert [name for name in commands() if f"flashd {name}" not in text] == []
    assert [o for _, action in arguments() for o in action.option_strings if f"\\fB{o}\\fR" not in text] == []


def test_every_exit_code_is_in_the_page() -> None:
    kinds = [FlashdError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert len(kinds) > 10 and {str(kind.exit_code) for kind in kinds} <= set(EXIT_STATUS)


def structs(kind: object) -> list[type[msgspec.Struct]]:
    """A struct, and those that it holds."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind, *(s for inner in typing.get_type_hints(kind).values() for s in structs(inner))]
    return [s for inner in typing.get_args(kind) for s in structs(inner)]


def test_every_key_of_every_struct_is_explained() -> None:
    from flashd.cli.man_pages import docs

    found = structs(Settings)
    assert len(found) > 20
    for struct in found:
        missing = set(struct.__struct_fields__) - set(docs(struct))
        assert not missing, f"{struct.__name__}: {missing}"
        assert all(text.endswith(".") for text in docs(struct).values())


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
@pytest.mark.parametrize("name", list(pages()))
def test_groff_finds_nothing_wrong(name: str) -> None:
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", DEPLOY / "man" / name], capture_output=True, check=True)
    assert done.stderr == b"" and len(done.stdout) > 4000
