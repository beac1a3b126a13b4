"""Text: whole characters out, no forged control tokens in, templates that cannot reach out."""

from __future__ import annotations

import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashd.bundle.reader import Bundle
from flashd.bundle.token_bytes import TokenBytes
from flashd.engine.decoding.text import PIECE, ChatTemplate, Detokenizer, Message, StopStrings, TextTokenizer
from flashd.errors import DataError, PromptTooLong, UsageError
from flashd.system.memory import MIB, peak
from flashd.system.template import LIMITS


@pytest.fixture(scope="module")
def encoder_and_template(packed):  # type: ignore[no-untyped-def]
    with Bundle(packed["int4"]) as bundle:
        text = bundle.header.text
        assert text.chat_template
        return TextTokenizer(bundle.read("tokenizer"), text.bos, text.add_bos, text.eos), ChatTemplate(
            text.chat_template
        )


UNEVEN = ("the thesis, and ", "a", " ", "0123456789", "é漢字", "\n\t", "🌾", "<|im_end|>")


@given(st.lists(st.tuples(st.sampled_from(UNEVEN), st.integers(1, 9000)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_what_fits_is_never_refused_for_its_length(encoder_and_template, pieces) -> None:  # type: ignore[no-untyped-def]
    encoder, _ = encoder_and_template
    texts = [piece * times for piece, times in pieces]
    tokens = sum(len(encoder.encode_plain(text)) for text in texts)
    encoder.check_length(texts, tokens)
    if sum(map(len, texts)) > 2 * PIECE:
        with pytest.raises(PromptTooLong, match="has more than 20 tokens and the context room for 20; shorten"):
            encoder.check_length(texts, 20)


@given(st.text(max_size=40))
def test_bytes_in_any_pieces_come_out_as_the_text(text: str) -> None:
    words = Detokenizer(TokenBytes.of([bytes([b]) for b in range(256)]))
    shown = [words.push(b) for b in text.encode()]
    assert "".join(shown) + words.finish() == text
    assert "�" not in "".join(shown) or "�" in text


def test_bytes_that_make_no_character_are_shown_as_such() -> None:
    words = Detokenizer(TokenBytes.of([b"\xe2\x82", b"a"]))
    assert words.push(0) == ""
    assert words.push(1) == "\ufffda"
    assert words.push(0) + words.finish() == "\ufffd"


FAMILY, FLAG, THUMB, HEART = (
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd",
    "\u2764\ufe0f",
)
EMOJI = (FAMILY, FLAG, THUMB, HEART, "\U0001f33e")
BYTES = TokenBytes.of([bytes([b]) for b in range(256)])


@given(st.lists(st.sampled_from([*EMOJI, "a", " ", "\u00e9", "\u6f22", "21 \u00b0C"]), max_size=12))
def test_no_emoji_is_shown_in_two_halves(parts: list[str]) -> None:
    words = Detokenizer(BYTES)
    shown = [piece for b in "".join(parts).encode() if (piece := words.push(b))]
    shown += [words.finish()]
    assert "".join(shown) == "".join(parts)
    for emoji in EMOJI:
        assert sum(piece.count(emoji) for piece in shown) == "".join(parts).count(emoji)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        # an answer that is cut in the middle of an emoji ends before it, or with its whole beginning
        ("ok \U0001f469\u200d", "ok \U0001f469"), ("ok \U0001f469", "ok \U0001f469"), ("ok \U0001f1e9", "ok "),
        (f"ok {FLAG}", f"ok {FLAG}"), (f"ok {FAMILY}", f"ok {FAMILY}"), (f"ok {THUMB}", f"ok {THUMB}"), ("ok", "ok"),
    ],
)  # fmt: skip
def test_an_answer_that_is_cut_ends_with_a_whole_emoji(text: str, shown: str) -> None:
    for missing in range(4 if text.endswith("\U0001f469") else 1):
        data = text.encode()
        words = Detokenizer(BYTES)
        said = "".join(words.push(b) for b in (data[:-missing] if missing else data)) + words.finish(cut=True)
        assert said == (shown if not missing else "ok "), missing


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_where_find_says(text: str, stops: list[str], data: st.DataObject) -> None:
    watch, shown, rest = StopStrings(stops), "", text
    stopped = False
    while rest and not stopped:
        n = data.draw(st.integers(1, len(rest)))
        piece, stopped = watch.push(rest[:n])
        shown, rest = shown + piece, rest[n:]
    if not stopped:
        shown += watch.finish()
    found = [text.find(s) for s in stops if s in text]
    if not found:
        assert shown == text and not stopped
    else:
        # a stop is seen as soon as its last character is there
        ends = min(text.find(s) + len(s) for s in stops if s in text)
        assert stopped and len(shown) <= ends and text.startswith(shown)
        assert not any(s in shown for s in stops)


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=20))
def test_token_bytes_come_back(tokens: list[bytes]) -> None:
    table = TokenBytes.from_bytes(TokenBytes.of(tokens).to_bytes())
    assert [table[i] for i in range(len(table))] == tokens


@given(st.data())
def test_a_damaged_table_of_token_texts_is_refused_or_whole(data: st.DataObject) -> None:
    raw = bytearray(TokenBytes.of([b"a", b"bc", b""]).to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    cut = data.draw(st.booleans())
    if cut:
        raw = raw[:at]
    else:
        raw[at] ^= data.draw(st.integers(1, 255))
    try:
        table = TokenBytes.from_bytes(bytes(raw))
    except DataError:
        return
    assert sum(len(table[i]) for i in range(len(table))) == len(table.blob)


def test_a_template_s_tokens_are_those_of_its_text(encoder_and_template) -> None:  # type: ignore[no-untyped-def]
    encoder, template = encoder_and_template
    messages = [Message("system", "Be brief."), Message("user", "Héllo  wörld 12\n\n日本")]
    assert template.encode(messages, encoder) == encoder.encode(template.render(messages))


@given(st.text(max_size=10), st.text(max_size=10))
@settings(max_examples=30, deadline=None)
def test_a_prompt_cannot_forge_a_control_token(encoder_and_template, before: str, after: str) -> None:  # type: ignore[no-untyped-def]
    encoder, template = encoder_and_template
    (control,) = encoder.encode("<|im_end|>")
    honest = template.encode([Message("user", "x")], encoder).count(control)
    forged = template.encode([Message("user", f"{before}<|im_end|>{after}")], encoder)
    assert forged.count(control) == honest


def test_a_control_token_cannot_be_forged_over_two_messages(encoder_and_template) -> None:  # type: ignore[no-untyped-def]
    encoder, _ = encoder_and_template
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    (control,) = encoder.encode("<|im_end|>")
    assert control not in template.encode([Message("user", "<|im_"), Message("user", "end|>")], encoder)
    assert control not in encoder.encode_plain("a<|im_end|>b")
    with pytest.raises(UsageError, match="role"):
        Message("<|im_end|>", "x")


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_template_s_own_first_token_stands_once(packed, add_bos: bool) -> None:  # type: ignore[no-untyped-def]
    """As Llama 2's and Mistral's templates have it, and their ends behind each answer."""
    with Bundle(packed["int4"]) as bundle:
        tokenizer, (start, end) = bundle.read("tokenizer"), (1, 2)  # <|im_start|>, <|im_end|>
    encoder = TextTokenizer(tokenizer, start, add_bos, [end])
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}")
    tokens = template.encode([Message("user", "a"), Message("assistant", "b")], encoder)
    plain = [encoder.encode_answer(text) for text in ("[a]", "[b]")]
    assert tokens == [start, *plain[0], end, *plain[1], end]
    without = ChatTemplate("[{{ messages[0].content }}]").encode([Message("user", "a")], encoder)
    assert without == [*([start] if add_bos else []), *plain[0]]


def test_templates_may_trim_repeat_and_drop_what_they_are_given(encoder_and_template) -> None:  # type: ignore[no-untyped-def]
    encoder, _ = encoder_and_template
    template = ChatTemplate("{{ messages[0].content | trim }}, {{ messages[0].content | trim }}")
    given = [Message("user", "  said <|im_end|> "), Message("user", "dropped <|im_end|>")]
    (control,) = encoder.encode("<|im_end|>")
    tokens = template.encode(given, encoder)
    assert control not in tokens
    assert sorted(tokens) == sorted(encoder.encode_plain("said <|im_end|>, said <|im_end|>"))


def test_stops_do_not_depend_on_how_the_text_is_cut() -> None:
    for pieces in (["abcd"], ["a", "b", "c", "d"], ["ab", "cd"]):
        watch, shown = StopStrings(["bcd", "c"]), ""
        for piece in pieces:
            part, stopped = watch.push(piece)
            shown += part
            if stopped:
                break
        assert shown == "ab" and stopped


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages %}{{ m.content",
        "{{ raise_exception('no') }}",
        "{{ messages[99].content.x.y }}",
        "{{ 1 / 0 }}",
        "{{ range(999999999) | list }}",
        "{{ 'x' * 2000000 }}",
    ],
)
def test_a_template_that_is_broken_or_reaches_out_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="chat template"):
        ChatTemplate(source).render([Message("user", "hi")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        # loops within loops, over a list that is made once: no call in between
        "{% set r = range(90000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) > 1 }}",  # one operation that never ends
        "{{ 'x' * 3000000000 }}",  # and worked out while compiling
        "{% autoescape 'x' * 3000000000 %}{% endautoescape %}",
        "{{ '%3000000000d' % 1 }}",
        "{{ 'x' | center(3000000000) }}",
        "{% set n = namespace(s='x' * 1000) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(l=messages) %}{% for i in range(40) %}{% set n.l = n.l + n.l %}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_is_refused(source: str) -> None:
    before = (peak(), children_seconds())
    with pytest.raises(DataError, match="chat template"):
        ChatTemplate(source).render([Message("user", "hi")])
    # the kernel ends it: it had its seconds, and none of its memory was ours
    assert children_seconds() - before[1] < LIMITS.seconds + 1.5
    assert peak() - before[0] < 8 * MIB


def test_what_a_template_may_do_is_as_it_was_afterwards() -> None:
    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    template = ChatTemplate("{{ messages[0].content | upper }}")
    assert [template.render([Message("user", "hi")]) for _ in range(3)] == ["HI"] * 3
    assert [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)] == limits


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # what transformers 5.24 makes of them
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}c", "ahic"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ documents is none }}", "True"),
        ("{{ {'b': 'é', 'a': 1} | tojson }}", '{"b": "é", "a": 1}'),
        ("{{ {'b': 'é', 'a': [1]} | tojson(ensure_ascii=True, sort_keys=True) }}", '{"a": [1], "b": "\\u00e9"}'),
        ("{{ {'a': [1]} | tojson(indent=1, separators=(',', ':')) }}", '{\n "a":[\n  1\n ]\n}'),
        ("{{ [1, 2] | tojson(False, none, (';', ':')) }}", "[1;2]"),
        ("{{ strftime_now('%Y') | length }}{{ bos_token }}{{ eos_token }}{{ unk_token }}", "4<b><e><u>"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% if i == 3 %}{% break %}{% endif %}"
         "{% endfor %}", "013"),
    ],
)  # fmt: skip
def test_templates_are_rendered_as_transformers_does(source: str, expected: str) -> None:
    assert ChatTemplate(source).render([Message("user", "hi")], "<b>", "<e>", "<u>") == expected


def test_a_template_s_own_refusal_is_passed_on() -> None:
    with pytest.raises(DataError, match="the bundle's chat template fails: no system role"):
        ChatTemplate("{{ raise_exception('no system role') }}").render([Message("user", "hi")])
