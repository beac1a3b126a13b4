"""What PyYAML says of a text that it cannot read, in the words of who wrote it, with the remedy."""

from __future__ import annotations

import re
from typing import Any

import yaml

ENTRY = re.compile(r"( *)(- +)?([^\s#\"'\[\]{},:][^\"'\[\]{},:]*):(?= |$)")
"""A line that begins with a key, and its indentation."""

CANNOT_START = re.compile(r"found character '(.+)' that cannot start any token")
QUOTE = "put it in quotes"
LINE_END = "\r\n|[\r\n\x85\u2028\u2029]"  # YAML's
NO_COLON = "a line that is neither `key: value` nor an entry that begins with `- `"


def explained(text: str, error: yaml.YAMLError) -> tuple[int, str]:
    """The number of the line that is wrong, and what is wrong with it."""
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML")
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that PyYAML does not read; it counts characters, not lines
        position = getattr(error, "position", 0)
        return text.count("\n", 0, position) + 1, _unreadable(error, problem)
    lines = re.split(LINE_END, text)
    number = int(mark.line)
    line = lines[number] if number < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return number + 1, "a tab before the text: use spaces"
    if problem == "mapping values are not allowed here" and number and _is_bare(lines[number - 1], line):
        return number, NO_COLON
    if indented := _indentation(lines, number, int(mark.column), problem):
        return number + 1, indented
    if opened := _not_closed(error, problem, text):
        return opened
    return number + 1, _in_line(problem)


def _unreadable(error: yaml.YAMLError, problem: str) -> str:
    character = getattr(error, "character", None)
    if isinstance(character, int):
        return f"a character that no text has (U+{character:04X}): remove it"
    return " ".join(problem.split())


def _indentation(lines: list[str], number: int, column: int, problem: str) -> str | None:
    """That a line is indented in another way than its neighbours, if that is what is wrong."""
    here = ENTRY.match(lines[number]) if number < len(lines) else None
    stray = problem.endswith(("but found '<block mapping start>'", "but found '<block sequence start>'"))
    # with more spaces than the line before, it goes on with that line's value, and its colon surprises
    goes_on = problem == "mapping values are not allowed here" and here is not None and column == here.end() - 1
    if not (stray or goes_on):
        return None
    spaces = _spaces(lines[number])
    before = next((i for i in range(number - 1, -1, -1) if lines[i].strip() and lines[i].lstrip()[0] != "#"), None)
    if before is None:
        return f"{_many(spaces)} before the first key: remove {'it' if spaces == 1 else 'them'}"
    dash = lines[number].lstrip().startswith("- ")
    same = [i for i in range(before, -1, -1) if ENTRY.match(lines[i]) and lines[i].lstrip().startswith("- ") == dash]
    wanted = _column(lines[same[0] if same else before], dash)
    if wanted == spaces:
        return None
    return f"{_many(spaces)} before {'the -' if dash else 'the key'}, its neighbours have {wanted}"


def _column(line: str, dash: bool) -> int:
    """Where an entry's neighbours begin: at the -, or at the key, which may stand behind one."""
    entry = ENTRY.match(line)
    if entry is None or dash:
        return _spaces(line)
    return entry.start(3)


def _is_bare(line: str, following: str) -> bool:
    """Whether a line has no key, so that PyYAML takes the following one for the rest of its text."""
    bare = line.strip() and not ENTRY.match(line) and line.lstrip()[0] not in "#-[{\"'|>"
    return bool(bare and ENTRY.match(following) and _spaces(line) == _spaces(following))


def _spaces(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _many(spaces: int) -> str:
    return "1 space" if spaces == 1 else f"{spaces or 'no'} spaces"


def _not_closed(error: Any, problem: str, text: str) -> tuple[int, str] | None:
    """That something was opened and not closed, with the line in which it was opened."""
    context, mark = str(error.context or ""), error.context_mark
    if mark is None:
        return None
    opened = text[mark.index : mark.index + 1]
    if "quoted scalar" in context and "unexpected end of stream" in problem:
        return mark.line + 1, f"a quote that is not closed: put {opened} at its end"
    if "flow" in context and problem.endswith("but got '?'"):
        return error.problem_mark.line + 1, f"a text with a ? before a comma or a bracket: {QUOTE}"
    if "flow" in context and ("expected ',' or" in problem or "stream end" in problem):
        closing = {"[": "]", "{": "}"}.get(opened, "]")
        return mark.line + 1, f"a list or mapping that is not closed: put a {closing} behind it, and commas in it"
    return None


def _in_line(problem: str) -> str:
    """What is wrong in one line."""
    if problem == "mapping values are not allowed here":
        return f"a text with a colon: {QUOTE}"
    if problem == "could not find expected ':'":
        return NO_COLON
    if problem == "but found another document":
        return "a second document: remove the line that begins with ---"
    if problem.startswith("found unknown escape character"):
        return "a \\ in double quotes: put the text in single quotes"
    if problem == "found character '\\t' that cannot start any token":
        return "a tab: use spaces"
    if character := CANNOT_START.match(problem):
        return f"a text that begins with {character[1]}: {QUOTE}"
    if problem.startswith("expected <block end>, but found '?'"):
        return "a key behind a finished value: begin a new line, with as many spaces as its neighbours have"
    if "expected <block end>" in problem or "expected <document start>" in problem or "single document" in problem:
        return f"more than one value: if it is one text, {QUOTE}"
    return " ".join(problem.split())
