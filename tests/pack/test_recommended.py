"""What a model's files say of how answers are drawn, and what people call the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from flashd.bundle.header import Drawing
from flashd.bundle.reader import Bundle
from flashd.errors import DataError
from flashd.pack.default_model import model_file
from flashd.pack.names import name_of
from flashd.pack.pack import pack
from flashd.pack.sources.gguf import GgufModel
from flashd.pack.sources.recommended import of_folder
from tests import tiny, tiny_folder

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def test_a_folder_s_recommendation_is_in_its_bundle(tmp_path: Path) -> None:
    folder = tiny_folder.write(tmp_path / "folder", tiny.write(tmp_path / "m.gguf"))
    (folder / "generation_config.json").write_text(json.dumps(QWEN))
    pack(folder, tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle:
        assert bundle.header.text.drawing == Drawing(temperature=0.7, top_p=0.8, top_k=20, repeat_penalty=1.05)


def test_a_gguf_s_recommendation_is_in_its_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add = gguf.GGUFWriter.add_name

    def add_sampling(w: gguf.GGUFWriter, name: str) -> None:
        add(w, name)
        for key, value in (("temp", 0.5), ("top_p", 0.25), ("min_p", 0.125), ("xtc_probability", 0.5)):
            w.add_float32(f"general.sampling.{key}", value)
        w.add_int32("general.sampling.top_k", -1)
        w.add_int32("general.sampling.mirostat", 0)
        w.add_string("general.sampling.sequence", "kpt")

    monkeypatch.setattr(gguf.GGUFWriter, "add_name", add_sampling)
    pack(tiny.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle:
        assert bundle.header.text.drawing == Drawing(temperature=0.5, top_p=0.25, min_p=0.125, top_k=0)
    assert [r.message for r in caplog.records if "recommend" in r.message] == [
        f"{tmp_path / 'm.gguf'}: its makers recommend xtc_probability 0.5, which flashd does not do"
    ]


def test_a_bundle_without_a_recommendation_says_nothing_of_it(tiny_bundle: Path) -> None:
    with Bundle(tiny_bundle) as bundle:
        assert bundle.header.text.drawing is None
    assert b'"drawing"' not in tiny_bundle.read_bytes()[:65536]


@pytest.mark.parametrize(
    ("stated", "drawing"),
    [
        ({}, None),
        ({"bos_token_id": 1, "temperature": None}, None),
        ({"do_sample": True, "top_k": 64}, Drawing(temperature=1.0, top_k=64)),
        ({"temperature": 0.6}, Drawing(temperature=0.6)),
        # with this transformers takes the likeliest token: what else is said has no effect there
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, Drawing(repeat_penalty=1.1)),
    ],
)
def test_what_transformers_would_do(tmp_path: Path, stated: dict[str, Any], drawing: Drawing | None) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert of_folder(tmp_path) == drawing


@pytest.mark.parametrize("stated", [{"temperature": "hot"}, {"top_p": 3.0}, {"top_k": 2.5}, {"min_p": -1.0}])
def test_a_recommendation_that_makes_no_sense_is_refused(tmp_path: Path, stated: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    with pytest.raises(DataError, match=f"generation_config.json: .* makes no sense: .*{next(iter(stated))}"):
        of_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "keys", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", ("smollm2", "135M"), "SmolLM2-135M-Instruct"),
        ("Meta-Llama-3.1-8B-Instruct-Q4_K_M-00001-of-00003.gguf", ("Meta-Llama-3.1", "8B"),
         "Meta-Llama-3.1-8B-Instruct"),
        ("qwen2.5-0.5b-instruct-fp16.gguf", ("Qwen2.5", "0.5B"), "qwen2.5-0.5b-instruct"),
        ("gemma-3-270m-it-IQ4_XS.gguf", ("gemma-3", "270m"), "gemma-3-270m-it"),
        ("model.gguf", ("smollm2", "135M"), "Its Name"),
        ("smollm2.gguf", ("smollm2", "135M"), "Its Name"),
        ("SmolLM2-135M.gguf", None, "Its Name"),
    ],
)  # fmt: skip
def test_a_model_is_called_what_people_call_it(
    tmp_path: Path, file: str, keys: tuple[str, str] | None, name: str
) -> None:
    class Model:
        path = tmp_path / file

        def metadata(self, key: str) -> Any:
            there = {"general.name": "Its Name"}
            if keys:
                there |= {"general.basename": keys[0], "general.size_label": keys[1]}
            return there.get(key)

        def has(self, key: str) -> bool:
            return self.metadata(key) is not None

        def text(self, key: str) -> str:
            return str(self.metadata(key))

    assert name_of(Model()) == name  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_default_model_is_called_by_its_name() -> None:
    assert name_of(GgufModel(model_file())) == "SmolLM2-135M-Instruct"
