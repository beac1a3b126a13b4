"""What a model thinks before it answers: told apart, closed in the prompt, or left open."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.reader import Bundle
from flashd.engine.decoding.reasoning.thoughts import Said, Thoughts, closed
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.decoding.text import ChatTemplate, Message
from flashd.engine.engine import Answer, Budget, Engine, Prompts
from flashd.pack.pack import pack
from tests import tiny

QWEN3 = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
"""The end of Qwen3's template: thoughts unless it is told otherwise."""

ALWAYS = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}<|start|><think>\n"
"""As templates of models that always think have it."""

NEVER = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}<|start|>"


def told(parts: list[str], closes: str = "") -> tuple[str, str]:
    """(thoughts, answer) of a text that comes in parts."""
    thoughts = Thoughts(closes)
    said = [said for part in parts for said in thoughts.push(part)] + thoughts.finish()
    assert all(each.text for each in said)
    return tuple("".join(each.text for each in said if each.thought is thought) for thought in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("text", "closes", "thoughts", "answer"),
    [
        ("<think>\nHm. 2 < 3.\n\nSo.\n</think>\n\nYes. <b>", "", "Hm. 2 < 3.\n\nSo.", "Yes. <b>"),
        ("\n<think></think>\nYes.", "", "", "Yes."),
        ("[THINK]Hm.[/THINK]Yes.", "", "Hm.", "Yes."),
        ("Hm.\n</think>\n\nYes.", "</think>", "Hm.", "Yes."),
        ("Hm. </thi", "</think>", "Hm. </thi", ""),
        ("  Yes. <think>no</think>", "", "", "  Yes. <think>no</think>"),
        ("<thin", "", "", "<thin"),
        ("", "", "", ""),
    ],
)
@given(data=st.data())
def test_thoughts_are_told_apart_however_they_come(
    text: str, closes: str, thoughts: str, answer: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    assert told([text[a:b] for a, b in pairwise(cuts)], closes) == (thoughts, answer)


def test_what_is_surely_no_tag_is_told_at_once() -> None:
    thoughts = Thoughts()
    assert thoughts.push("<th") == [] and thoughts.push("e>") == [Said("<the>")]
    assert thoughts.push("<think>") == [Said("<think>")]


@pytest.mark.parametrize("template", [QWEN3, ALWAYS, NEVER])
def test_a_prompt_lets_the_model_think_only_if_asked(template: str) -> None:
    rendered = {think: ChatTemplate(template).render([Message("user", "hi")], think=think) for think in (True, False)}
    ends = "<think>\n\n</think>\n\n"
    assert not rendered[True].endswith(ends)
    assert closed(rendered[False]).endswith(ends) is (template is not NEVER)


def test_a_switch_of_another_name_is_turned_too() -> None:
    granite = ChatTemplate("{{ messages[0].content }}{% if thinking %} Think first.{% endif %}")
    assert granite.render([Message("user", "hi")], think=True) == "hi Think first."
    assert granite.render([Message("user", "hi")]) == "hi"


def test_an_engine_s_answer_has_its_thoughts_apart(tmp_path: Path) -> None:
    pack(tiny.write(tmp_path / "m.gguf", template=ALWAYS), tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle, Engine(bundle, Budget(context=128)) as engine:
        prompts, said = Prompts(bundle), {}
        for think in (True, False):
            answer = Answer()
            prompt = prompts.tokens([Message("user", "the")], think=think)
            speech = engine.begin(prompt, Sampling(), answer, limit=12, ignore_eos=True)
            parts = list(engine.pieces(speech))
            assert "".join(part.text for part in parts if part.thought) == answer.thoughts
            assert "".join(part.text for part in parts if not part.thought) == answer.text
            said[think] = answer
        assert said[True].thoughts and not said[True].text
        assert said[False].text and not said[False].thoughts
        # a prompt that is text alone is gone on with as it is
        answer = Answer()
        plain = engine.begin(
            prompts.plain("a <think>\n"), Sampling(), answer, limit=12, ignore_eos=True, thinks=False
        )
        list(engine.pieces(plain))
        assert answer.text and not answer.thoughts
