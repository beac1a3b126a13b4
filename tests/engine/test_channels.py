"""A model that says in which channel it speaks: its thoughts are told apart, and its answer is the end."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from flashd.bundle.reader import Bundle
from flashd.bundle.token_bytes import TokenBytes
from flashd.engine.decoding.reasoning.channels import without_thoughts, words
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Answer, Budget, Engine, Prompts
from flashd.pack.pack import pack
from flashd.pack.vocabulary import HARMONY, HARMONY_ENDS
from tests import tiny

CONTROLS = [*HARMONY, *HARMONY_ENDS]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
)


def add_harmony(w: gguf.GGUFWriter, template: str) -> int:
    """The tiny vocabulary with OpenAI's control tokens in place of its own."""
    texts, merges = tiny._vocabulary()
    texts = [*texts[:-2], *CONTROLS]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-4o")
    w.add_token_list(texts)
    w.add_token_types([1] * (len(texts) - len(CONTROLS)) + [3] * len(CONTROLS))
    w.add_token_merges(merges)
    w.add_eos_token_id(texts.index("<|return|>"))
    w.add_chat_template(template)
    return len(texts)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "add_vocabulary", add_harmony)
        model = tiny.write(folder / "m.gguf", template=TEMPLATE)
    pack(model, folder / "m.flash", "int4")
    return folder / "m.flash"


def test_thoughts_are_told_apart_from_the_answer(bundle: Path) -> None:
    with Bundle(bundle) as opened:
        text, token_bytes = opened.header.text, TokenBytes.from_bytes(opened.read("token_bytes"))
        prompts = Prompts(opened)
    controls = {name: 260 + i for i, name in enumerate(CONTROLS)}
    assert text.channels and text.eos == [controls["<|return|>"], controls["<|call|>"]]

    def tokens(said: str) -> list[int]:
        out: list[int] = []
        for part in said.replace("<|", "\0<|").replace("|>", "|>\0").split("\0"):
            out += [controls[part]] if part in controls else prompts.choices([part])[part]
        return out

    def shown(said: str) -> str:
        speaker = words(token_bytes, text.channels)
        return "".join(map(speaker.push, tokens(said))) + speaker.finish()

    thought = "<|channel|>analysis<|message|>Hm…<|end|><|start|>assistant<|channel|>"
    final = "final<|message|>The end."
    assert shown(thought + final) == "<think>\nHm…\n</think>\n\nThe end."
    assert without_thoughts(shown(thought + final)) == "The end."
    assert shown("<|channel|>" + final) == "The end." and shown("The end.") == "The end."
    call = "commentary to=functions.f <|message|>{}"
    assert shown(thought + call) == "<think>\nHm…\n\n{}"
    assert words(token_bytes, None).push(controls["<|end|>"]) == ""

    asked = [Message("user", "the"), Message("assistant", shown(thought + final)), Message("user", "he")]
    told = [Message("user", "the"), Message("assistant", "The end."), Message("user", "he")]
    assert prompts.tokens(asked) == prompts.tokens(told)
    opens = text.channels.opens
    assert prompts.tokens(told, think=True)[-len(opens) :] == opens
    assert prompts.tokens(told) == prompts.tokens(told, think=True) + text.channels.final


def test_a_choice_is_made_in_the_final_channel(bundle: Path) -> None:
    with Bundle(bundle) as opened, Engine(opened, Budget(context=128)) as engine:
        prompts, channels = Prompts(opened), opened.header.text.channels
        assert channels
        prompt, choices = prompts.tokens([Message("user", "the")], think=True), prompts.choices(["yes", "no"])
        found = [
            engine.choose(some, choices, Sampling(temperature=0), Answer()).probabilities
            for some in (prompt, [*prompt, *channels.final])
        ]
        plain = engine.choose(prompt[:-1], choices, Sampling(temperature=0), Answer()).probabilities
    assert found[0] == found[1] != plain
