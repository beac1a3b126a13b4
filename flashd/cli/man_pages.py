"""The manual pages flashd(1) and flashd.yaml(5), made of the parser and of the settings' types and docstrings.

python -m flashd.cli.man_pages deploy/man
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as types

import flashd
from flashd.cli.arguments import Parser
from flashd.cli.parser import build
from flashd.config import arguments, devices, hearing, settings, tools
from flashd.config.fields import Strict
from flashd.config.settings import Settings

WIDTH = 78
EXIT_STATUS = {
    "0": "The command did what it was asked to do.",
    "64": "The command was typed wrongly, or an option is out of range.",
    "65": "A file is damaged, or is of a kind that flashd does not read.",
    "66": "A file that was named is missing or may not be read, or a part of flashd is not installed.",
    "69": "The daemon does not run.",
    "70": "flashd itself failed.",
    "73": "A file could not be written.",
    "74": "The card failed while a bundle was in use.",
    "75": "Something is busy or memory is taken at the moment; try again later.",
    "78": "The configuration is wrong, the memory budget is too small, or flashd doctor found a failure.",
    "130": "Ctrl-C ended the command.",
}
ENVIRONMENT = {
    "FLASHD_SOCKET": "The daemon's socket, if it is not /run/flashd/flashd.sock.",
    "XDG_CACHE_HOME": "The folder in which the default model and the beginnings of prompts are kept.",
}
FILES = {
    "/etc/flashd/flashd.yaml": "The daemon's configuration, see flashd.yaml(5).",
    "/etc/flashd/flashd.example.yaml": "A configuration with every key, to copy from.",
    "/run/flashd/flashd.sock": "The daemon's socket. Members of group flashd may use it.",
    "/var/lib/flashd": "Bundles, and the jobs with their answers.",
    "/var/cache/flashd": "The default model's bundle, and the beginnings of prompts.",
    "/opt/flashd": "The program.",
}
EXAMPLES = {
    'flashd ask "Why is the sky blue?"': "Ask one question.",
    "flashd plan model.flash --memory 512M": "See what stays in RAM and what is read from the card.",
    "flashd pack model.gguf --out model.flash": "Make a bundle of a model.",
    "flashd check-config": "Check the daemon's configuration.",
    "sudo flashd doctor": "Find what stands in the way.",
}


SPELLED_OUT = "drive", "recogniser", "listener", "arguments", "presets"
"""Keys whose own keys stand below them."""


def main(folder: Path) -> None:
    """Writes both pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, "utf-8")


def pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    return {"flashd.1": "\n".join(_command_page()) + "\n", "flashd.yaml.5": "\n".join(_settings_page()) + "\n"}


# --- flashd(1) --------------------------------------------------------------------------------------------


def _command_page() -> Iterator[str]:
    parser = build()
    yield from _head("flashd", "1", "ask a language model that is larger than RAM", "User Commands")
    yield from (".SH SYNOPSIS", ".B flashd", ".I command", ".RI [ option \\~.\\|.\\|.]")
    yield from (".SH DESCRIPTION", _text(parser.description or ""))
    yield _text("The model's feed-forward weights stay on an SD card, a USB drive or an SSD, and are read as needed.")
    yield from (".SH OPTIONS", *_arguments(parser))
    yield ".SH COMMANDS"
    for name, command in _commands(parser).items():
        yield from (f".SS {_text(_usage(name, command))}", _text(command.description or ""), *_arguments(command))
    yield from _table("EXIT STATUS", EXIT_STATUS)
    yield from _table("ENVIRONMENT", ENVIRONMENT)
    yield from _table("FILES", FILES)
    yield from _table("EXAMPLES", EXAMPLES)
    yield from (".SH SEE ALSO", ".BR flashd.yaml (5),", ".BR systemctl (1),", ".BR journalctl (1)")


def _commands(parser: Parser) -> dict[str, Parser]:
    return next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _usage(name: str, command: Parser) -> str:
    places = [_place(a) for a in command._actions if not a.option_strings]
    return " ".join(["flashd", name, "[option ...]", *places])


def _place(action: argparse.Action) -> str:
    return f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar)


def _arguments(parser: Parser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            continue
        yield ".TP"
        names = "\\fR, \\fB".join(map(_text, action.option_strings)) or _text(str(action.metavar))
        value = f" \\fI{_text(str(action.metavar))}\\fR" if action.option_strings and action.metavar else ""
        yield f"\\fB{names}\\fR{value}"
        yield _text((action.help or "") % {"default": action.default})


# --- flashd.yaml(5) ---------------------------------------------------------------------------------------


def _settings_page() -> Iterator[str]:
    yield from _head("flashd.yaml", "5", "the configuration of the flashd daemon", "File Formats")
    yield ".SH DESCRIPTION"
    yield _text(
        "The daemon reads /etc/flashd/flashd.yaml when it starts. The file is YAML. Every key may be left out unless"
        " it is marked as required. A key that is not known is an error. flashd check-config says what is wrong, and"
        " in which line."
    )
    yield ".PP"
    yield _text(
        "systemctl reload flashd takes new triggers, sensors, outputs, tools, prompts and answer settings. A change"
        " of model, draft, memory, context, threads, card, schemas, snapshots, api, spool or serial needs"
        " systemctl restart flashd."
    )
    yield ".PP"
    yield _text(
        "Pins are the numbers of GPIO lines (BCM numbers), not places on the header: GPIO17 is pin 17, at place 11."
    )
    root = _struct(types.type_info(Settings))
    yield from (".SH KEYS", *_keys(root.cls, root.fields))
    for field in root.fields:
        yield from _section(field)
    yield from _table("FILES", {k: v for k, v in FILES.items() if k.startswith("/etc")})
    yield from (".SH SEE ALSO", ".BR flashd (1)")


def _section(field: types.Field) -> Iterator[str]:
    """The keys of what a key of the file holds, if it holds keys."""
    structs = _structs(field.type)
    if not structs:
        return
    yield f".SH {_text(field.encode_name.upper())}"
    if len(structs) == 1:
        yield from (_text(inspect.getdoc(structs[0].cls) or ""), *_keys(structs[0].cls, structs[0].fields))
        return
    base = structs[0].cls.__mro__[1]
    shared = _struct(types.type_info(base)).fields if base is not Strict else ()
    if shared:
        yield _text(f"{inspect.getdoc(base)} Each has these keys:")
        yield from _keys(base, shared)
    for struct in structs:
        yield from (f".SS kind: {_text(str(struct.tag))}", _text(inspect.getdoc(struct.cls) or ""))
        yield from _keys(struct.cls, [f for f in struct.fields if f not in shared])


def _keys(cls: type, fields: Iterable[types.Field]) -> Iterator[str]:
    texts = docs(cls)
    for field in fields:
        yield from (".TP", f"\\fB{_text(field.encode_name)}\\fR", _text(texts[field.name]))
        yield from (".br", _text(f"Value: {_words(field.type)}. {_default(field)}"))
        for struct in _structs(field.type) if field.name in SPELLED_OUT else ():
            kind = [_text(f"kind: {struct.tag}. {inspect.getdoc(struct.cls)}")] if struct.tag else []
            yield from (".RS", *kind, *_keys(struct.cls, struct.fields), ".RE")


def docs(cls: type) -> dict[str, str]:
    """The text under each key of a struct, those of the structs that it extends included."""
    found: dict[str, str] = {}
    ours = [module.__name__ for module in (settings, devices, hearing, tools, arguments)]
    for kind in reversed(cls.__mro__):
        if kind.__module__ not in ours:
            continue
        (tree,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(tree, ast.ClassDef)
        for key, text in zip(tree.body, tree.body[1:], strict=False):
            match key, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    found[name] = inspect.cleandoc(doc)
    return found


def _words(kind: types.Type) -> str:
    """What a key may be, in words."""
    match kind:
        case types.Metadata(type=inner, extra_json_schema=more):
            return str((more or {}).get("description") or _words(inner))
        case types.UnionType(types=inner):
            structs = any(isinstance(k, types.StructType) for k in inner)
            return "keys" if structs else " or ".join(_words(k) for k in inner if not isinstance(k, types.NoneType))
        case types.IntType() | types.FloatType():
            return ("a whole number" if isinstance(kind, types.IntType) else "a number") + _range(kind)
        case types.LiteralType(values=values):
            return " or ".join(map(str, values))
        case types.ListType(item_type=item):
            return "a list of texts" if isinstance(item, types.StrType) else "a list"
        case types.BoolType():
            return "true or false"
        case types.StrType():
            return "a text"
        case types.StructType() | types.DictType():
            return "keys"
    raise TypeError(f"no words for {kind}")


def _range(kind: types.IntType | types.FloatType) -> str:
    low = f" from {kind.ge:g}" if kind.ge is not None else f" above {kind.gt:g}" if kind.gt is not None else ""
    high = f" to {kind.le:.10g}" if kind.le is not None else f" to below {kind.lt:g}" if kind.lt is not None else ""
    return low + high


def _default(field: types.Field) -> str:
    if field.required:
        return "Required."
    value: Any = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None or value == [] or isinstance(value, msgspec.Struct):
        return ""
    return f"Default: {_plain(value)}."


def _plain(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_plain(each)}' for key, each in value.items())}}}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value) or "none"


def _structs(kind: types.Type) -> list[types.StructType]:
    match kind:
        case types.StructType():
            return [kind]
        case types.ListType(item_type=item):
            return _structs(item)
        case types.UnionType(types=inner):
            return [s for k in inner for s in _structs(k)]
    return []


def _struct(kind: types.Type) -> types.StructType:
    assert isinstance(kind, types.StructType)
    return kind


# --- roff -------------------------------------------------------------------------------------------------


def _head(name: str, section: str, what: str, volume: str) -> Iterator[str]:
    yield '.\\" Made by: python -m flashd.cli.man_pages deploy/man'
    yield f'.TH {name.upper()} {section} "" "flashd {flashd.__version__}" "{volume}"'
    yield from (".SH NAME", f"{_text(name)} \\- {_text(what)}")


def _table(title: str, rows: dict[str, str]) -> Iterator[str]:
    yield f".SH {title}"
    for name, text in rows.items():
        yield from (".TP", f"\\fB{_text(name)}\\fR", _text(text))


def _text(text: str) -> str:
    """Plain text as roff: nothing in it is a command, and - is the character that options begin with."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"\\&{line}" if line[0] in ".'" else line for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
