"""A model that says in which channel it speaks: its thoughts are told apart, and its answer is the end."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from msgspec.structs import replace

from flashd.bundle.reader import Bundle
from flashd.bundle.token_bytes import TokenBytes
from flashd.engine.decoding.reasoning.channels import without_thoughts, words
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.decoding.schemas import Schemas
from flashd.engine.decoding.text import Message
from flashd.engine.decoding.tools.calls import Calling, CallPart, Tool
from flashd.engine.decoding.tools.formats import HARMONY as CALLED
from flashd.engine.decoding.tools.listener import Listener
from flashd.engine.engine import Answer, Budget, Engine, Prompts
from flashd.pack.pack import pack
from flashd.pack.vocabulary import HARMONY, HARMONY_ENDS
from tests import tiny

CONTROLS = [*HARMONY, *HARMONY_ENDS, "<|constrain|>"]
TEMPLATE = (
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}"
    "<|call|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|start|>assistant"
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


def test_a_call_is_made_in_the_commentary_channel(bundle: Path) -> None:
    """Whatever is drawn, an answer is a valid call or words; of the board's own calls the last answer is words."""
    pytest.importorskip("llguidance")
    tool = Tool(name="look", parameters={"properties": {"at": {"enum": ["air", "soil"]}}, "required": ["at"]})
    both = Calling(tools=(tool, Tool(name="time")))
    with Bundle(bundle) as opened:
        prompts, schemas, random = Prompts(opened), Schemas(opened), np.random.default_rng(1)
        token_bytes, channels = TokenBytes.from_bytes(opened.read("token_bytes")), opened.header.text.channels
        ends, size = opened.header.text.eos, opened.header.model.vocabulary
    assert channels and prompts.calls_format == CALLED
    assert prompts.tokens([Message("user", "the")], calling=both)[-len(channels.opens) :] == channels.opens

    def heard(calling: Calling, seed: int = 1) -> tuple[str, list[CallPart]]:
        how = prompts.speaking(calling)
        sampler = Sampler(Sampling(temperature=1.5, seed=seed), schemas.compile_calls(calling.callable, how.grammar))
        listener, speaker = Listener(how.calls_format, how.blocks), words(token_bytes, channels, how.shown)
        said: list[str | CallPart] = []
        soon = np.isin(np.arange(size), ends) * np.float32(4)
        while (token := sampler.pick(random.standard_normal(size, np.float32) + soon, ())) not in ends:
            said += listener.push(speaker.push(token))
        said += [*listener.push(speaker.finish()), listener.finish()]
        assert listener.whole
        return "".join(x for x in said if isinstance(x, str)), [x for x in said if isinstance(x, CallPart)]

    for _ in range(3):
        text, parts = heard(replace(both, required=True))
        arguments = json.loads("".join(part.arguments for part in parts))
        assert not text and arguments in ([{}] if parts[0].name == "time" else [{"at": "air"}, {"at": "soil"}])
    answers = [heard(both, seed) for seed in range(6)]
    assert any(text and not parts for text, parts in answers) and any(parts and not text for text, parts in answers)
    text, parts = heard(replace(both, in_words=True))
    assert text.strip() and not parts and "\ue002" not in text + "".join(text for text, _ in answers)
