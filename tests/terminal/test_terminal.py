"""Wrapping, folding to ASCII and line editing."""

from __future__ import annotations

import textwrap

import pytest
import wcwidth
from hypothesis import example, given
from hypothesis import strategies as st

from flashd.terminal.characters import INVISIBLE, width
from flashd.terminal.line_editor import MAX_LINE, Key, LineEditor
from flashd.terminal.wrapping import Wrap, to_ascii

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
    assert all(0 <= wcwidth.wcswidth(row) <= columns for row in shown.split("\r\n"))


EMOJI = [
    "👩\u200d👩\u200d👧",
    "🇩🇪",
    "❤\ufe0f",
    "👍🏽",
    "漢",
    "e\u0301",
    "क्षि",
    "می\u200cخواهم",
    "ᄀ",
    "각",
    "a",
    " ",
    "\u200d",
]


@given(st.lists(st.sampled_from(EMOJI), max_size=60).map("".join), st.integers(20, 24), st.integers(1, 5))
def test_no_row_of_wide_characters_is_too_long_however_the_text_is_cut(text: str, columns: int, size: int) -> None:
    wrap = Wrap(columns)
    shown = "".join(wrap.push(text[i : i + size]) for i in range(0, len(text), size)) + wrap.finish()
    assert all(wcwidth.wcswidth(row) <= columns for row in shown.split("\r\n"))
    assert shown.replace("\r\n", "").replace(" ", "") == text.replace(" ", "")  # and nothing is lost


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("漢" * 11, ["漢" * 10, "漢"]),  # twenty columns of twenty-one
        ("👩\u200d👩\u200d👧" * 11, ["👩\u200d👩\u200d👧" * 10, "👩\u200d👩\u200d👧"]),
        ("e\u0301" * 22, ["e\u0301" * 21, "e\u0301"]),
        ("a\u3000b\xa0c\td", ["a b c    d"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("one\r\ntwo\rthree\u2028four", ["one", "two", "three", "four"]),
        ("\x1b[31mred\x07\u202e", ["\ufffd[31mred\ufffd\ufffd"]),
    ],
)
def test_rows_of_21_columns(text: str, rows: list[str]) -> None:
    wrap = Wrap(21)
    assert (wrap.push(text) + wrap.finish()).split("\r\n") == rows


def test_what_ascii_makes_of_joined_characters() -> None:
    assert to_ascii("می\u200cشود ❤\ufe0f a\u3000b\xa0c é") == "????? ? a b c e"


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
        (("a👩\u200d👩\u200d👧b", left, "\x7f", "c\r"), "acb"),
        (("e\u0301🇩🇪漢", left, left, "x\r"), "e\u0301x🇩🇪漢"),
        (("👍🏽b", home, "\x1b[3~", "\r"), "b"),
        (("👍🏽b", home, right, "c\r"), "👍🏽cb"),
    ):
        assert edit(*keys)[0] == [line], keys
    assert edit("first\r", "second\r", up, up, "\r")[0] == ["first", "second", "first"]
    assert edit("dr", up, "\x1b[B", "aft\r")[0] == ["draft"]
    assert edit("a\r\nb\n")[0] == ["a", "b"]
    assert edit("abc\x03", "\x04")[0] == [Key.INTERRUPT, Key.END]


def test_characters_are_never_dropped() -> None:
    """A tab and the wide and the unbroken space are spaces; what joins or keeps apart stays; the rest is seen."""
    for typed, line in (
        ("a\tb\u3000c\xa0d", "a b c d"), ("می\u200cخواهم", "می\u200cخواهم"), ("👩\u200d👧", "👩\u200d👧"),
        ("a\u2028b", "a b"), ("a\u202eb", "a\ufffdb"), ("a\ue000", "a\ufffd"),
    ):  # fmt: skip
        assert edit(typed + "\r")[0] == [line], typed


@pytest.mark.parametrize(
    "sequence",
    [
        "\x1b[[A", "\x1b[[E",  # F1 and F5 of the Linux console
        "\x1bOP", "\x1b[15~", "\x1b[1;5P",  # F1 and F5 of an xterm, and with Ctrl
        "\x1b]0;a title\x07", "\x1b]11;rgb:0000/0000/0000\x1b\\",  # OSC, ended in both ways
        "\x1b[?62;1;2;4c", "\x1b[>41;354;0c", "\x1b[24;80R", "\x1bP1+r544e=787465\x1b\\",  # answers to what was asked
        "\x1b[M !!", "\x1b[<0;10;20M", "\x1b[<0;10;20m", "\x1b[32;10;20M",  # mice
        "\x1b(B", "\x1bb", "\x1bö", "\x1b[200~", "\x1b_payload\x1b\\", "\x1b\x1b[15~", "\x1b[I",
    ],
)  # fmt: skip
def test_a_whole_escape_sequence_is_swallowed(sequence: str) -> None:
    assert edit("a", sequence, "b\r")[0] == ["ab"]
    assert edit("a", *sequence, "b\r")[0] == ["ab"]  # a slow line brings it character by character


@pytest.mark.parametrize("cut", ["\x1b", "\x1b[", "\x1b[1;", "\x1b]0;never ended", "\x1bP", "\x1b[M", "\x1b]x\x1b"])
def test_enter_ends_a_sequence_that_was_cut(cut: str) -> None:
    assert edit("a", cut, "\r", "b\r")[0] == ["a", "b"]
    assert edit("a", cut, "\x03", "b\r")[0] == [Key.INTERRUPT, "b"]


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
        if isinstance(entry, str):
            assert len(entry) <= MAX_LINE and "".join(c for c in entry if c not in INVISIBLE).isprintable()


@given(st.lists(st.sampled_from([*EMOJI, "\x7f", "\x1b[D", "\x1b[C", "\x01", "\x1b[3~"]), max_size=80))
@example([EMOJI[0]] * 9 + ["\x1b[D"])  # one column is left, and the emoji behind the cursor is two wide
def test_the_row_of_a_prompt_is_never_too_long(keys: list[str]) -> None:
    written: list[str] = []
    editor = LineEditor(written.append, 20)
    editor.start()
    for key in keys:
        editor.feed(key.encode())
        editor._stale = True
        editor.feed(b"")
        row = written[-1].removeprefix("\r").partition("\x1b")[0]
        assert wcwidth.wcswidth(row) < 20
