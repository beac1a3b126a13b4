"""Heads that look at one short row of a token: DeepSeek-V2, GLM-4.7-Flash, beside what every family is tested for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flashd.bundle.errors import DamagedHeader
from flashd.bundle.prefix import digest
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.engine.model.branches import Branches, behind
from flashd.engine.model.kv_cache import SPARE, cache_bytes
from flashd.engine.planning.plan import make_plan
from flashd.errors import DataError
from flashd.graphs.rounding import KvFormat
from flashd.pack.original import Original
from flashd.pack.pack import pack
from tests.engine.test_kv import opened as with_kv
from tests.engine.test_prefixes import fresh, process, teach
from tests.goldens.folders import latents
from tests.goldens.models import GOLDENS, HEADS, LAYERS, RANK, TOKENS, TURNED, UNTURNED, VALUES, Golden

CONTEXT = 120
FLASH = GOLDENS["glm4-flash"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    pack(FLASH.write(folder / "m.gguf"), folder / "m.flash", "int4")
    return folder / "m.flash"


def test_a_snapshot_is_as_good_as_the_pass_that_it_saves(bundle: Path, tmp_path: Path) -> None:
    prompt = TOKENS[:30].tolist()
    teach(bundle, tmp_path, prompt, prompt, context=CONTEXT)
    expected = fresh(bundle, prompt, 0.5)
    with process(bundle, tmp_path, 0.5, CONTEXT) as p:
        logits, _ = p.logits(prompt)
        assert p.passes == [] and np.array_equal(logits, expected)


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_texts_side_by_side_say_what_each_says_alone(bundle: Path, kv: KvFormat) -> None:
    """Two texts that go on behind the same beginning, in one pass, and each by itself; and what is taken back."""
    start, texts = TOKENS[:20], [TOKENS[20:25], TOKENS[30:35]]
    alone = []
    with with_kv(bundle, 0.5, kv) as model:
        for text in texts:
            model.cache.truncate(0)
            model.forward(start, np.array([19]))
            alone.append(model.forward(text, np.arange(5)))
        model.cache.truncate(0)
        model.forward(start, np.array([19]))
        parents = [behind(0), 0, 1, 2, 3, behind(0), 5, 6, 7, 8]
        both = model.forward(np.concatenate(texts), np.arange(10), branches=Branches([np.arange(20)], parents))
        assert np.array_equal(both[:5], alone[0])
        assert np.allclose(both[5:], alone[1], atol=1e-4)  # other slots of the cache make another order of sums
        model.cache.truncate(20)
        assert np.array_equal(model.forward(texts[1], np.arange(5)), alone[1])
        # the cache forgets the first text, and the other goes on
        model.cache.truncate(20)
        model.forward(np.concatenate(texts), np.arange(10), branches=Branches([np.arange(20)], parents))
        model.cache.keep(np.array([*range(20), *range(25, 30)]))
        after = model.forward(TOKENS[35:37], np.arange(2))
        model.cache.truncate(0)
        model.forward(np.concatenate([start, texts[1]]), np.array([24]))
        assert np.allclose(after, model.forward(TOKENS[35:37], np.arange(2)), atol=1e-4)


def test_the_cache_keeps_one_row_of_a_token(bundle: Path) -> None:
    with Bundle(bundle) as opened_bundle:
        header = opened_bundle.header
    held = make_plan(header, memory=1 << 40, context=CONTEXT, threads=1, base=0).parts
    assert held["KV cache"] == cache_bytes(header.model, CONTEXT + SPARE)
    assert held["KV cache"] == LAYERS * 4 * (RANK + TURNED) * (CONTEXT + SPARE)


def changed(golden: Golden, **keys: Any) -> Golden:
    return replace(golden, keys=golden.keys | {key.replace("__", "."): value for key, value in keys.items()})


def test_an_older_file_has_one_matrix_for_keys_and_values_and_no_key_for_heads_as_they_are(
    tmp_path: Path, bundle: Path
) -> None:
    def joined(layer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        kept = {n: shape for n, shape in layer.items() if n not in ("attn_k_b.weight", "attn_v_b.weight")}
        return kept | {"attn_kv_b.weight": (HEADS * (UNTURNED + VALUES), RANK)}

    class Older(Golden):
        def tensors(self) -> dict[str, np.ndarray]:
            whole = FLASH.tensors()
            join = latents(lambda name, tensors: tensors[name])
            for i in range(LAYERS):
                both = join(f"model.layers.{i}.self_attn.kv_b_proj.weight", whole)
                whole[f"blk.{i}.attn_kv_b.weight"] = np.ascontiguousarray(both)
                for part in "kv":
                    del whole[f"blk.{i}.attn_{part}_b.weight"]
            return whole

    sizes = {"attention.key_length": UNTURNED + TURNED, "attention.value_length": VALUES}
    keys = {n: value for n, value in FLASH.keys.items() if not n.endswith("_mla")} | sizes
    older = Older(**{**vars(FLASH), "keys": keys, "kv_heads": HEADS})
    pack(older.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as one, Bundle(bundle) as other:
        assert one.header.model == other.header.model
        for section in other.header.sections:
            assert one.read(section.name) == other.read(section.name), section.name


@pytest.mark.parametrize(
    ("golden", "match"),
    [
        (changed(FLASH, attention__key_length_mla=70), "heads of 70 numbers, 16 of them turned, and of 24 values"),
        (
            changed(FLASH, attention__kv_lora_rank=40),
            "with latents of 40 and 96 numbers, which",
        ),
        (changed(FLASH, attention__kv_lora_rank=64), r"'blk.0.attn_kv_a_mqa.weight' has 48 rows and should have 80"),
        (changed(FLASH, attention__value_length_mla=32), r"'blk.0.attn_v_b.weight' has the shape \(96, 32\), but"),
        (changed(FLASH, attention__value_length_mla=20), "4 heads of 20 values are not a multiple of 32"),
        (changed(FLASH, attention__q_lora_rank=None), "tensor 'blk.0.attn_q_a.weight' has no place"),
        (changed(FLASH, rope__dimension_count=None), "'deepseek2.rope.dimension_count' is missing"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, golden: Golden, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        Original.open(golden.write(tmp_path / "m.gguf"), "f16")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"window": 9}, "latents do not fit into attention"),
        ({"rope": None}, "latents do not fit into attention"),
        ({"latent": {"rank": 33}}, "does not make sense"),
        ({"latent": {"values": 23}}, "are not a multiple of 32"),
    ],
)
def test_a_forged_header_is_refused(bundle: Path, change: dict[str, Any], match: str) -> None:
    with Bundle(bundle) as opened_bundle:
        header: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(opened_bundle.header))
        size = opened_bundle.file.size
    kind = header["model"]["attention"][0]
    latent = kind["latent"] | change.get("latent", {})
    kind |= change | {"latent": latent}
    body = msgspec.json.encode(header)
    with pytest.raises(DamagedHeader, match=match):
        codec.decode_header(body, digest(body), size)
