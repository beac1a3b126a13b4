"""Mixtures as they are found: groups of experts, layers that guess, what a file may lack, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashd.bundle.errors import DamagedHeader
from flashd.bundle.prefix import digest
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import codec
from flashd.engine.forward.stages import Stage
from flashd.errors import DataError
from flashd.graphs.in_place import graph
from flashd.graphs.stages import stages
from flashd.pack.original import Original
from flashd.pack.pack import pack
from flashd.pack.sources.folder_config import folder_model, model_keys
from flashd.system.onnx_session import start_pool
from tests.engine.test_paths import THREADS
from tests.goldens import folders
from tests.goldens.models import GOLDENS, HERE, HIDDEN, LAYERS, Floats, Golden

GLM = GOLDENS["glm4moe"]
GUESSING = "what guesses further tokens (MTP) is left out: flashd packs what speaks"


def keys(golden: Golden, **changed: Any) -> Golden:
    return replace(golden, keys=golden.keys | {key.replace("__", "."): value for key, value in changed.items()})


@pytest.mark.parametrize(
    ("golden", "match"),
    [
        (keys(GLM, expert_group_count=4), "2 experts of 1 of 4 groups that 6 make, which is no mixture"),
        (keys(GLM, expert_group_used_count=3), "2 experts of 3 of 2 groups"),
        (keys(GLM, expert_group_count=6), "2 experts of 1 of 6 groups"),
        (keys(GLM, expert_group_count=6, expert_group_used_count=2), "2 experts of 2 of 6 groups"),
        (keys(GLM, expert_gating_func=9), r"scores of kind 9 \(glm4moe.expert_gating_func\) are not supported"),
        (keys(GOLDENS["qwen3moe"], expert_group_used_count=2), "experts chosen by groups"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, golden: Golden, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        pack(golden.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "f16")
    assert "\n" not in str(caught.value)


def test_glm_may_lack_norms_and_biases_and_say_nothing_of_groups(tmp_path: Path) -> None:
    bare = {n: shape for n, shape in GLM.layer.items() if n not in ("attn_q.bias", "attn_k.bias", "attn_v.bias")}
    bare = {n: shape for n, shape in bare.items() if n not in ("attn_q_norm.weight", "attn_k_norm.weight")}
    first = {n: shape for n, shape in GLM.others[0].items() if n in bare or n.startswith("ffn_")}
    said = {"expert_group_count": 1, "expert_group_used_count": 1, "expert_gating_func": 0}
    golden = replace(keys(GLM, **said), layer=bare, others={0: first})
    model = Original.open(golden.write(tmp_path / "m.gguf"), "f16").model
    assert model.experts and model.experts.groups is None and model.experts.scores == "sigmoid"
    assert model.norms == ["attention", "ffn", "final"] and model.biases == []


def test_layers_that_guess_are_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = GLM.write(tmp_path / "m.gguf")
    saved = folders.write(tmp_path / "f", "glm4moe", plain)
    stated = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(stated | {"num_nextn_predict_layers": 1}))
    more = {"mlp.experts.0.up_proj.weight": (32, HIDDEN), "eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
    tensors = load_file(saved / "model.safetensors")
    tensors |= {f"model.layers.{LAYERS}.{n}": np.zeros(shape, np.float32) for n, shape in more.items()}
    save_file(tensors, saved / "model.safetensors")
    behind = GLM.layer | {"nextn.eh_proj.weight": (HIDDEN, 2 * HIDDEN), "nextn.enorm.weight": (HIDDEN,)}
    guessing = replace(
        keys(GLM, nextn_predict_layers=1, block_count=LAYERS + 1),
        model=GLM.model | {f"blk.{LAYERS}.{name}": shape for name, shape in behind.items()},
    )
    with caplog.at_level(logging.WARNING):
        sources = [plain, saved, guessing.write(tmp_path / "g.gguf")]
        (model, *others) = [Original.open(source, "f16").model for source in sources]
    said = [record.getMessage().split(": ", 1) for record in caplog.records]
    assert said == [[str(saved), GUESSING], [str(tmp_path / "g.gguf"), GUESSING]]
    assert [(m.layers, m.experts, m.layer_kinds) for m in others] == [(LAYERS, model.experts, model.layer_kinds)] * 2
    # and without the word in config.json they are tensors that nobody knows
    (saved / "config.json").write_text(json.dumps(stated | {"num_nextn_predict_layers": 0}))
    with pytest.raises(DataError, match=r"tensor 'model.layers.4.eh_proj.weight' has no place"):
        Original.open(saved, "f16")


def test_deepseek_v3_chooses_experts_as_transformers_takes_for_granted() -> None:
    stated, path = json.loads((HERE / "deepseek3.json").read_text())["config"], Path("config.json")
    keys_of = model_keys(folder_model(stated | {"q_lora_rank": None}, path))
    assert keys_of["expert_gating_func"] == 2 and "attention.q_lora_rank" not in keys_of
    for key in ("scoring_func", "topk_method"):
        with pytest.raises(DataError, match=key):
            folder_model(stated | {key: "softmax"}, path)


def test_phi_weighs_an_expert_among_those_that_are_nearly_as_good(tmp_path: Path) -> None:
    """The second expert is near the first, and the third near the second; the others are too far below."""
    golden = GOLDENS["phimoe"]
    saved = folders.write(tmp_path / "f", "phimoe", golden.write(tmp_path / "m.gguf"))
    experts = [Original.open(source, "f16").model.experts for source in (saved, tmp_path / "m.gguf")]
    assert experts[0] == experts[1] and experts[0] and experts[0].margin == 0.5
    usual = replace(golden, keys={k: v for k, v in golden.keys.items() if k != "router_jitter_noise"})
    model = Original.open(usual.write(tmp_path / "u.gguf"), "f16").model
    assert model.experts and model.experts.margin == 0.02
    # its files have a window of as many tokens as a text may have
    wide = Original.open(keys(golden, attention__sliding_window=1024).write(tmp_path / "w.gguf"), "f16").model
    assert [kind.window for kind in wide.attention] == [0]
    start_pool(THREADS)
    route = Stage(stages(model)["route"])
    scores = np.array([[4.94, 5, 1, 4.92, -5, -9], [-2, -9, -9, -9, -9, -1]], np.float32)
    used, weights = route({}, scores=scores)
    near = np.exp([4.94, 5, 4.92])
    assert used.tolist() == [[1, 0], [5, 0]]
    assert np.allclose(weights, [[near[1] / near.sum(), near[0] / (near[0] + near[2])], [1, 1]], rtol=1e-5)
    stated = json.loads((saved / "config.json").read_text())
    stated["rope_parameters"]["long_mscale"] = 1.5
    (saved / "config.json").write_text(json.dumps(stated))
    with pytest.raises(DataError, match=r"another length in long texts \(long_mscale\)"):
        Original.open(saved, "f16")


def test_experts_are_chosen_among_the_best_groups_wherever_they_are_on_the_card(tmp_path: Path) -> None:
    """The first group has the best expert, the second the two best together."""
    pack(GLM.write(tmp_path / "m.gguf"), tmp_path / "m.flash", "int4")
    with Bundle(tmp_path / "m.flash") as bundle:
        header = bundle.header
        said: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(header))
        size = bundle.file.size
    route, places = Stage(graph(header, "route")), np.array([4, 2, 0, 5, 1, 3])
    scores, bias = np.array([3, -4, -3, 1, -2, 1], np.float32), np.array([0, 0, 0, 0.4, 0.2, 0], np.float32)
    on_card, leaned = np.empty((1, 6), np.float32), np.empty(6, np.float32)
    on_card[0, places], leaned[places] = scores, bias
    used, weights = route({"choice.bias": leaned, "places": places.astype(np.float32)}, scores=on_card)
    assert used.tolist() == [[places[3], places[5]]] and np.allclose(weights, 1.5 / 2)
    for change in ({"count": 4}, {"used": 3}, {"count": 6}):
        forged = msgspec.json.decode(msgspec.json.encode(said))
        forged["model"]["experts"]["groups"] |= change
        body = msgspec.json.encode(forged)
        with pytest.raises(DamagedHeader, match="groups of experts do not fit the experts"):
            codec.decode_header(body, digest(body), size)


def test_gate_and_up_of_experts_may_be_one_stack_beside_first_layers_where_they_are_not(tmp_path: Path) -> None:
    apart = GOLDENS["deepseek2"]

    class Joined(Golden):
        def tensors(self) -> dict[str, Floats]:
            whole = super().tensors()
            for i in range(1, LAYERS):
                parts = [whole.pop(f"blk.{i}.ffn_{part}_exps.weight") for part in ("gate", "up")]
                whole[f"blk.{i}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
            return whole

    models = [apart.write(tmp_path / "a.gguf"), Joined(**vars(apart)).write(tmp_path / "j.gguf")]
    one, other = (Original.open(path, "f16") for path in models)
    assert msgspec.structs.replace(one.model, name=other.model.name) == other.model
    for i in range(2):
        for a, b in zip(one.weights.every_ffn(i), other.weights.every_ffn(i), strict=True):
            pairs = zip(a.inputs, b.inputs, strict=True)
            assert all(np.array_equal(x.rows(slice(None)), y.rows(slice(None))) for x, y in pairs)
