"""Files as they are found: flashd makes of the variants of one tiny model what other programs make of them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Prompts
from flashd.engine.evaluate import perplexity
from flashd.errors import DataError, InputMissing, UsageError
from flashd.pack.pack import pack
from tests.engine.test_paths import opened, tokens_of
from tests.goldens.models import GOLDENS, long_factors
from tests.pack import variants
from tests.pack.variants import DATA, FOLDERS, GGUF, TEXT, YARN, Arrays, Keys

PERPLEXITIES: dict[str, dict[str, float]] = json.loads((DATA / "perplexities.json").read_text())
CLOSE = 2e-4
"""Of a perplexity: float16 rows of the float32 weights."""


def measured(model: Path, pre: str | None = None) -> float:
    """The perplexity of the text, of a model packed with f16 rows."""
    out = model.with_suffix(".flash")
    pack(model, out, "f16", pre=pre)
    with opened(out, None, 400) as engine:
        return perplexity(engine, tokens_of(out, TEXT.read_text())).perplexity


def refused(model: Path, match: str, error: type[Exception] = DataError, **how: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        pack(model, model.with_suffix(".flash"), "f16", **how)
    assert "\n" not in str(caught.value)
    assert not model.with_suffix(".flash").exists()


@pytest.mark.parametrize("name", PERPLEXITIES["llama.cpp"])
def test_a_file_is_what_llama_cpp_makes_of_it(tmp_path: Path, name: str) -> None:
    model = variants.write(tmp_path / "m.gguf", GGUF[name])
    assert measured(model) == pytest.approx(PERPLEXITIES["llama.cpp"][name], rel=CLOSE)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_what_transformers_makes_of_it(tmp_path: Path, name: str) -> None:
    model = variants.write_folder(tmp_path / "m", FOLDERS[name])
    assert measured(model) == pytest.approx(PERPLEXITIES["transformers"][name], rel=CLOSE)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("linear", "linear"), ("factor_without_a_type", "linear"), ("none", "plain"), ("heads_array", "plain"),
        ("no_pre", "plain"), ("yarn_betas", "yarn_betas"),
    ],
)  # fmt: skip
def test_a_file_is_what_a_folder_is_that_says_the_same(tmp_path: Path, name: str, folder: str) -> None:
    model = variants.write(tmp_path / "m.gguf", GGUF[name])
    assert measured(model) == pytest.approx(PERPLEXITIES["transformers"][folder], rel=CLOSE)


# --- what is understood ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 20])
def test_the_first_part_of_a_split_file_packs_all(tmp_path: Path, parts: int) -> None:
    whole = variants.write(tmp_path / "whole.gguf", {})
    first = variants.write(tmp_path / "m.gguf", {}, parts=parts)
    pack(whole, tmp_path / "whole.flash", "int8")
    header = pack(first, tmp_path / "split.flash", "int8")
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert len(files) == parts and header.source.nbytes == sum(file.stat().st_size for file in files)
    with Bundle(tmp_path / "whole.flash") as a, Bundle(tmp_path / "split.flash") as b:
        assert all(a.read(s.name) == b.read(s.name) for s in a.header.sections)


def test_rows_that_only_fill_the_table_of_embeddings_say_nothing(tmp_path: Path) -> None:
    def pad(tensors: Arrays) -> None:
        tensors["token_embd.weight"] = np.pad(tensors["token_embd.weight"], ((0, 26), (0, 0)))

    model = variants.write(tmp_path / "m.gguf", {}, variants.arrays(pad))
    header = pack(model, tmp_path / "m.flash", "f16")
    assert header.model.vocabulary == 262 + 26
    with opened(tmp_path / "m.flash", None, 400) as engine:
        # a row of zeros has the logit 0: they are counted, and the text's own tokens are as they were
        found = perplexity(engine, tokens_of(tmp_path / "m.flash", TEXT.read_text())).perplexity
    assert found > PERPLEXITIES["llama.cpp"]["base"]


def test_a_pre_tokenizer_can_be_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = variants.write(tmp_path / "m.gguf", GGUF["no_pre"])
    assert measured(model, "gpt-2") == pytest.approx(PERPLEXITIES["llama.cpp"]["base"], rel=CLOSE)
    assert not caplog.records
    pack(model, tmp_path / "n.flash", "f16")
    assert "tokenizer.ggml.pre" in caplog.text and "--pre NAME" in caplog.text
    new = variants.write(tmp_path / "new.gguf", {"tokenizer.ggml.pre": "new"})
    refused(new, "pre-tokenizer 'new' is not supported; --pre NAME")
    assert measured(new, "gpt-2") == pytest.approx(PERPLEXITIES["llama.cpp"]["base"], rel=CLOSE)
    other = variants.write(tmp_path / "other.gguf", {})
    refused(other, "--pre new: not known; known are .*gpt-2", UsageError, pre="new")
    refused(variants.write_folder(tmp_path / "f", {}), "is a folder", UsageError, pre="gpt-2")


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_big_endian_file_is_refused_in_words(tmp_path: Path) -> None:
    refused(variants.write(tmp_path / "m.gguf", {}, order=gguf.GGUFEndian.BIG), "big-endian .* gguf-convert-endian")


def test_parts_that_are_not_there_or_not_the_first_are_named(tmp_path: Path) -> None:
    first = variants.write(tmp_path / "m.gguf", {}, parts=3)
    second, third = (first.with_name(f"m-0000{i}-of-00003.gguf") for i in (2, 3))
    refused(second, "part 2 of 3; name the first one, m-00001-of-00003.gguf")
    moved = first.rename(tmp_path / "renamed.gguf")
    refused(moved, "one of 3 parts, whose names end in -00001-of-00003.gguf")
    moved.rename(first)
    data = second.read_bytes()
    second.unlink()
    refused(first, r"m-00002-of-00003.gguf: no such file; it is part 2 of the 3", InputMissing)
    second.write_bytes(third.read_bytes())
    refused(first, "m-00002-of-00003.gguf: not part 2 of the 3")
    second.write_bytes(data[: len(data) // 2])
    refused(first, "m-00002-of-00003.gguf: .*download it again")
    second.write_bytes(data)
    there, here = b"blk.1.attn_k.weight", b"blk.0.attn_k.weight"  # which is in the first
    third.write_bytes(third.read_bytes().replace(there, here))
    refused(first, "m-00003-of-00003.gguf: another part has tensor 'blk.0.attn_k.weight' too")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"llama.attention.head_count_kv": [2, 4]}, "'llama.attention.head_count_kv' differs from layer to layer"),
        ({"llama.rope.dimension_sections": [2, 3, 3, 0]}, "what llama.rope.dimension_sections means"),
        ({"llama.logit_scale": 0.5}, "what llama.logit_scale means"),
        ({"llama.attention.relative_buckets_count": 8}, "what llama.attention.relative_buckets_count means"),
        ({"llama.rope.scaling.type": "longrope"}, "rotary scaling of kind 'longrope' .*rope_factors_short.weight"),
        ({"llama.rope.scaling.type": "yarn"}, "a rotary scaling of kind 'yarn' by a factor of 0.0"),
        (
            {**YARN, "llama.rope.scaling.yarn_log_multiplier": 0.1},
            "what llama.rope.scaling.yarn_log_multiplier means",
        ),
        ({**YARN, "llama.rope.scaling.original_context_length": 0}, "a first training on texts of 0 tokens"),
        ({**YARN, "llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
    ],
)
def test_a_key_that_is_not_understood_is_refused_by_name(tmp_path: Path, keys: Keys, match: str) -> None:
    refused(variants.write(tmp_path / "m.gguf", keys), match)


def test_a_refusal_names_all_that_flashd_lacks(tmp_path: Path) -> None:
    def add(tensors: Arrays) -> None:
        for i in range(2):
            tensors[f"blk.{i}.ffn_up_shexp.weight"] = np.ones((32, 64), np.float32)
        tensors["other.weight"] = np.ones(32, np.float32)

    keys = {
        "llama.expert_shared_count": 1, "llama.logit_scale": 0.5, "llama.attention.clamp_kqv": 8.0,
        "llama.rope.scaling.type": "spiral", "llama.rope.turns": 3.0,
    }  # fmt: skip
    model = variants.write(tmp_path / "m.gguf", keys, variants.arrays(add))
    with pytest.raises(DataError) as caught:
        pack(model, tmp_path / "m.flash", "f16")
    said = str(caught.value).removeprefix(f"{model}: ").split("; ")
    assert said == [
        "an expert that every token uses (llama.expert_shared_count) is not supported for 'llama' yet",
        "a bound on queries, keys and values (llama.attention.clamp_kqv) is not supported for 'llama' yet",
        "rotary scaling of kind 'spiral' is not supported",
        "known are linear, longrope, yarn",
        "flashd does not know what llama.logit_scale means (its value: 0.5)",
        "flashd does not know what llama.rope.turns means (its value: 3.0)",
        "tensor 'blk.0.ffn_up_shexp.weight' has no place in 'llama' as flashd knows it (and 1 more like it)",
        "tensor 'other.weight' has no place in 'llama' as flashd knows it",
    ]


@pytest.mark.parametrize("breaks", ["\n", "\r", "\x1b[2J", "\x85", "\u2028"])
def test_a_refusal_is_one_line_whatever_a_key_is_called(tmp_path: Path, breaks: str) -> None:
    model = variants.write(tmp_path / "m.gguf", {f"llama.odd{breaks}key": 3.0})
    with pytest.raises(DataError) as caught:
        pack(model, tmp_path / "m.flash", "f16")
    spelt = breaks.encode("unicode_escape").decode()
    assert str(caught.value) == f"{model}: flashd does not know what llama.odd{spelt}key means (its value: 3.0)"


def test_a_refusal_of_a_folder_names_all_too(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0, "turns": 9, "alpha": 3}
    model = variants.write_folder(tmp_path / "m", {"rope_parameters": rope, "logits_scaling": 8.0, "clip_qkv": 2.0})
    save_file({"model.layers.0.mlp.other.weight": np.ones((2, 2), np.float32)}, model / "more.safetensors")
    names = dict.fromkeys(safe_open(model / "model.safetensors", "numpy").keys(), "model.safetensors")
    index = {"weight_map": names | {"model.layers.0.mlp.other.weight": "more.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        pack(model, tmp_path / "m.flash", "f16")
    assert str(caught.value).removeprefix(f"{model}: ").split("; ") == [
        "a bound on queries, keys and values (llama.attention.clamp_kqv) is not supported for 'llama' yet",
        "flashd does not know what 'logits_scaling' means (its value: 8.0)",
        "flashd does not know the rotary parameter 'alpha' of kind 'linear'",
        "flashd does not know the rotary parameter 'turns' of kind 'linear'",
        "tensor 'model.layers.0.mlp.other.weight' has no place in 'llama' as flashd knows it",
    ]


def test_of_an_unknown_architecture_it_names_what_a_llama_does_not_have(tmp_path: Path) -> None:
    known = GOLDENS["llama3"]
    other = replace(
        known,
        architecture="other",
        keys={**known.keys, "conv.cache": 3},
        layer={**known.layer, "conv.weight": (64, 3)},
    )
    refused(
        other.write(tmp_path / "m.gguf"),
        "architecture 'other' is not supported; known are .*qwen3.* What a Llama does not have:"
        " the keys other.conv.cache; the tensors blk.0.conv.weight$",
    )


def test_keys_that_change_nothing_are_no_hindrance(tmp_path: Path) -> None:
    keys = {"llama.vocab_size": 262, "llama.logit_scale": 1.0, "llama.expert_shared_count": 0, "llama.vision.x": 3}
    pack(variants.write(tmp_path / "m.gguf", keys), tmp_path / "m.flash", "f16")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "makes no sense: .*long_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}, "1 divisors for 8"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [0] * 8, "short_factor": [0] * 8}}, "positive"),
        ({"rope_scaling": {"type": "su"}, "rope_parameters": None}, "rotary scaling of kind 'su'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2]}}, "rotary parameter 'mrope_section'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "alpha": 9}}, "rotary parameter 'alpha'"),
        ({"logits_scaling": 8.0}, "what 'logits_scaling' means"),
        ({"residual_multiplier": 0.2}, "what 'residual_multiplier' means"),
        ({"num_key_value_heads": [2, 4]}, "differs from layer to layer|makes no sense"),
    ],
)
def test_a_property_that_is_not_understood_is_refused_by_name(tmp_path: Path, config: Keys, match: str) -> None:
    refused(variants.write_folder(tmp_path / "m", config), match)


def test_long_texts_are_asked_for_if_they_are_turned_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = GOLDENS["phi4-mini"].write(tmp_path / "m.gguf")
    ropes = {}
    for context, packed in ((None, 256), (20, 20), (256, 256), (257, 257), (1024, 1024)):
        header = pack(model, tmp_path / "m.flash", "f16", context=context)
        assert header.model.context == packed
        assert ("up to 256 tokens" in caplog.text and "--context" in caplog.text) == (context is None)
        caplog.clear()
        with Bundle(tmp_path / "m.flash") as bundle:
            ropes[packed] = bundle.floats("rope").reshape(2, 8)
    assert (ropes[20] == ropes[256]).all() and (ropes[257] == ropes[1024]).all()
    factors = long_factors()
    ratio = factors["rope_factors_long"] / factors["rope_factors_short"]
    assert ropes[256][0, :6] / ropes[257][0, :6] == pytest.approx(ratio, rel=1e-6)
    (tmp_path / "m.flash").unlink()
    refused(model, r"texts of 1025 tokens \(--context\); the model was trained for 1 to 1024", context=1025)


def test_texts_whose_queries_have_a_temperature_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = GOLDENS["ministral3"].write(tmp_path / "m.gguf")
    assert pack(model, tmp_path / "m.flash", "f16").model.context == 64
    assert "up to 64 tokens" in caplog.text
    (tmp_path / "m.flash").unlink()
    refused(model, "texts of 65 tokens .*mistral3.attention.temperature_scale", context=65)


def test_one_of_two_tables_of_divisors_is_refused(tmp_path: Path) -> None:
    def add(tensors: Arrays) -> None:
        tensors["rope_factors_long.weight"] = np.ones(8, np.float32)

    refused(
        variants.write(tmp_path / "m.gguf", {}, variants.arrays(add)), "of rope_factors_long.weight and .* one is"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_down.weight", "blk.0.attn_norm.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    def spoil(tensors: Arrays) -> None:
        tensors[name].reshape(-1)[17] = value

    refused(
        variants.write(tmp_path / "m.gguf", {}, variants.arrays(spoil)), f"{name}' has weights that are not finite"
    )


def test_a_weight_that_f16_rows_cannot_hold_is_refused(tmp_path: Path) -> None:
    def spoil(tensors: Arrays) -> None:
        tensors["blk.1.attn_v.weight"][3, 5] = 1e5

    refused(
        variants.write(tmp_path / "m.gguf", {}, variants.arrays(spoil)), r"blk.1.attn_v.weight' has weights above"
    )


# --- chat templates ----------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]


def folder_with(path: Path, files: dict[str, Any]) -> Header:
    """What is packed of a folder with more files, texts or objects."""
    folder = variants.write_folder(path, {})
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return pack(folder, path.with_suffix(".flash"), "f16")


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": TEMPLATE},
        {"chat_template.json": {"chat_template": TEMPLATE}},
        {"chat_template.json": {"chat_template": NAMED}},
        {"tokenizer_config.json": {"chat_template": NAMED}},
        {"tokenizer_config.json": {"chat_template": TEMPLATE}, "chat_template.json": {"chat_template": "older"}},
        {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "older"}},
        {"chat_template.jinja": TEMPLATE, "additional_chat_templates/rag.jinja": "other"},
        {"additional_chat_templates/default.jinja": TEMPLATE},
    ],
)
def test_a_template_is_found_wherever_it_is_kept(
    tmp_path: Path, files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert folder_with(tmp_path / "m", files).text.chat_template == TEMPLATE
    assert not caplog.records


def test_templates_none_of_which_is_taken_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = {"additional_chat_templates/rag.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"}
    assert folder_with(tmp_path / "m", others).text.chat_template is None
    assert "none of its chat templates (rag, tool_use) is called default" in caplog.text
    caplog.clear()
    keys = {"tokenizer.chat_template": None, "tokenizer.chat_template.tool_use": "b"}
    pack(variants.write(tmp_path / "n.gguf", keys), tmp_path / "n.flash", "f16")
    assert "tokenizer.chat_template.tool_use none is taken" in caplog.text
    with pytest.raises(DataError, match="neither a text nor a list"):
        folder_with(tmp_path / "o", {"tokenizer_config.json": {"chat_template": [1]}})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}", "[hi]"),
        ("{% for m in messages %}<{%- generation -%} {{ m.content }} {%- endgeneration %}>{% endfor %}", "<hi>"),
        ("{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}", "hi"),
        ("{{ messages[0].content }}{% if documents is not none %}{{ documents[0].title }}{% endif %}", "hi"),
    ],
)  # fmt: skip
def test_a_template_of_transformers_is_packed_and_rendered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, said: str
) -> None:
    model = variants.write(tmp_path / "m.gguf", {"tokenizer.chat_template": template})
    pack(model, tmp_path / "m.flash", "f16")
    assert not caplog.records
    with Bundle(tmp_path / "m.flash") as bundle:
        prompts = Prompts(bundle)
        assert prompts.tokens([Message("user", "hi")]) == prompts.plain(said)


def test_a_folder_that_leaves_out_what_its_family_has_anyway(tmp_path: Path) -> None:
    for kind, context, epsilon in (("llama", 2048, 1e-6), ("mistral", 131072, 1e-6)):
        left_out = {"model_type": kind, "rms_norm_eps": None, "max_position_embeddings": None}
        header = pack(variants.write_folder(tmp_path / kind, left_out), tmp_path / "m.flash", "f16")
        assert header.model.context == context and header.model.norm_epsilon == pytest.approx(epsilon)
    # null is no window, and not the default
    path = tmp_path / "mistral"
    stated = json.loads((path / "config.json").read_text())
    windows = []
    for config in (stated, {**stated, "sliding_window": None}, {**stated, "sliding_window": 7}):
        (path / "config.json").write_text(json.dumps(config))
        windows.append(pack(path, tmp_path / "m.flash", "f16").model.attention[0].window)
    assert windows == [4096, 0, 7]


def test_pack_says_what_a_template_cannot_render(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    caplog.set_level(logging.WARNING)
    pack(variants.write(tmp_path / "m.gguf", {"tokenizer.chat_template": refuses}), tmp_path / "m.flash", "f16")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "fails for a system prompt and a question: System role not supported" in said
    caplog.clear()
    broken = variants.write(tmp_path / "b.gguf", {"tokenizer.chat_template": "{% for m in %}"})
    pack(broken, tmp_path / "b.flash", "f16")
    assert len(caplog.records) == 3
