"""Wrapping, folding to ASCII and line editing."""

from __future__ import annotations

import textwrap

from hypothesis import given
from hypothesis import strategies as st

from device.consoles.line_editor import MAX_LINE, Key, LineEditor, width
from device.consoles.terminal_text import Wrap, to_ascii

WORDS = st.lists(st.text("abcdefghij", min_size=1, max_size=12), max_size=30)


@given(WORDS, st.integers(20, 60), st.integers(1, 7))
def test_wrapping_is_that_of_textwrap_however_the_text_is_cut(words: list[str], columns: int, size: int) -> None:
    text, wrap = " ".join(words), Wrap(columns)
    shown = "".join(wrap.push(text[i : i + size]) for i in range(0, len(text), size)) + wrap.finish()
    assert shown.split("\r\n") == (textwrap.wrap(text, columns) or [""])


@given(st.text(), st.integers(20, 40))
def test_no_row_is_too_long_and_nothing_controls_the_terminal(text: str, columns: int) -> None:
    wrap = Wrap(columns)
    shown = wrap.push(text) + wrap.finish()
    assert all(width(row) <= 2 * columns for row in shown.split("\r\n"))
    assert "\x1b" not in shown and "\x07" not in shown


@given(st.text())
def test_ascii_is_ascii(text: str) -> None:
    assert to_ascii(text).isascii()


def edit(*keys: str) -> tuple[list[str | Key], str]:
    written: list[str] = []
    editor = LineEditor(written.append, 80)
    editor.start()
    done = [entry for key in keys for entry in editor.feed(key.encode())]
    return done, "".join(written)


def test_editing() -> None:
    left, right, home, end, up = "\x1b[D", "\x1b[C", "\x1b[H", "\x1b[F", "\x1b[A"
    for keys, line in (
        (("abc", "\x7f", "\r"), "ab"),
        (("ac", left, "b", "\r"), "abc"),
        (("bc", home, "a", end, "d", "\r"), "abcd"),
        (("one two", "\x17", "x", "\r"), "one x"),
        (("one", "\x01", right, "\x0b", "\r"), "o"),
        (("one", left, "\x15", "\r"), "e"),
        (("abc", "\x01", "\x1b[3~", "\r"), "bc"),
        (("naïve", "\x7f" * 3, "\r"), "na"),
    ):
        assert edit(*keys)[0] == [line], keys
    assert edit("first\r", "second\r", up, up, "\r")[0] == ["first", "second", "first"]
    assert edit("dr", up, "\x1b[B", "aft\r")[0] == ["draft"]
    assert edit("a\r\nb\n")[0] == ["a", "b"]
    assert edit("abc\x03", "\x04")[0] == [Key.INTERRUPT, Key.END]


def test_a_line_longer_than_the_row_scrolls_in_it() -> None:
    written: list[str] = []
    editor = LineEditor(written.append, 30)
    editor.start()
    editor.feed(b"0123456789" * 5)
    last = written[-1]
    assert last.startswith("\r> ") and last.endswith("\x1b[K") and width(last[1:-3]) <= 29
    assert editor.feed(b"\r") == ["0123456789" * 5]


def test_a_long_line_that_comes_at_once_is_drawn_once() -> None:
    """Drawn for each byte it would be eighty times as long as what came, more than a slow line carries."""
    written: list[str] = []
    editor = LineEditor(written.append, 80)
    editor.start()
    editor.feed(b"y" * MAX_LINE)
    assert sum(map(len, written)) < 400


@given(st.binary(max_size=300))
def test_any_bytes_make_only_bounded_printable_lines(data: bytes) -> None:
    written: list[str] = []
    editor = LineEditor(written.append, 40)
    editor.start()
    for entry in editor.feed(data):
        assert isinstance(entry, Key) or (len(entry) <= MAX_LINE and (entry.isprintable() or not entry))
