"""Models for sherpa-onnx that know two words: LOW, a tone of 300 Hz, and HIGH, one of 4,000 Hz. And speech to hear.

sherpa-onnx gives a model 80 logarithms of energies a frame, from low to high. A word's logit is how much louder the
one half is than the other; silence is louder than neither. So they are made of one product.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashd.config.hearing import RATE, SAMPLE_BYTES

TOKENS = "<blk> 0\n▁LOW 1\n▁HIGH 2\n"

Array = np.ndarray[Any, Any]
Node = tuple[str, Sequence[str], str, dict[str, Any]]
Values = dict[str, tuple[bool, Sequence[int | str]]]
"""Names of inputs or outputs; whether they are whole numbers, and their shapes."""


def recogniser(folder: Path) -> Path:
    """A model of kind zipformer-ctc. It takes each frame by itself."""
    folder.mkdir()
    nodes: list[Node] = [
        ("MatMul", ("x", "weights"), "p", {}), ("Add", ("p", "blank"), "s", {}),
        ("LogSoftmax", ("s",), "log_probs", {}), ("Identity", ("x_lens",), "log_probs_len", {}),
    ]  # fmt: skip
    _save(
        folder / "model.onnx", nodes, {"x": (False, "NTK"), "x_lens": (True, "N")},
        {"log_probs": (False, "NTV"), "log_probs_len": (True, "N")}, _weights(),
    )  # fmt: skip
    (folder / "tokens.txt").write_text(TOKENS)
    return folder


def spotter(folder: Path) -> Path:
    """A streaming transducer as sherpa-onnx's spotter takes it. Its decoder says no word twice without another."""
    folder.mkdir()
    states: Values = dict.fromkeys(("h", "c"), (False, (1, "N", 1)))
    encoder: list[Node] = [
        ("ReduceMean", ("x",), "m", {"axes": [1], "keepdims": 1}), ("MatMul", ("m", "weights"), "p", {}),
        ("Add", ("p", "blank"), "encoder_out", {}), ("Identity", ("h",), "new_h", {}),
        ("Identity", ("c",), "new_c", {}),
    ]  # fmt: skip
    _save(
        folder / "encoder.onnx", encoder, {"x": (False, ("N", 9, 80)), **states},
        {"encoder_out": (False, ("N", 1, 3))} | {f"new_{name}": shape for name, shape in states.items()}, _weights(),
        model_type="lstm", num_encoder_layers=1, T=9, decode_chunk_len=4, rnn_hidden_size=1, d_model=1,
    )  # fmt: skip
    decoder: list[Node] = [
        ("Gather", ("y", "last_place"), "last", {"axis": 1}),
        ("Gather", ("again", "last"), "decoder_out", {"axis": 0}),
    ]  # fmt: skip
    not_again = np.diag(np.array([0, -90, -90], np.float32))
    _save(
        folder / "decoder.onnx", decoder, {"y": (True, ("N", 2))}, {"decoder_out": (False, ("N", 3))},
        {"last_place": np.array(1, np.int64), "again": not_again}, vocab_size=3, context_size=2,
    )  # fmt: skip
    _save(
        folder / "joiner.onnx", [("Add", ("encoder_out", "decoder_out"), "logit", {})],
        dict.fromkeys(("encoder_out", "decoder_out"), (False, ("N", 3))), {"logit": (False, ("N", 3))}, {},
        joiner_dim=3,
    )  # fmt: skip
    (folder / "tokens.txt").write_text(TOKENS)
    return folder


def _weights() -> dict[str, Array]:
    weights = np.zeros((80, 3), np.float32)
    weights[5:25, 1] = weights[50:70, 2] = 3 / 20
    weights[50:70, 1] = weights[5:25, 2] = -3 / 20
    return {"weights": weights, "blank": np.array([12, 0, 0], np.float32)}


def _save(
    file: Path, nodes: list[Node], inputs: Values, outputs: Values, constants: dict[str, Array], **about: object
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def described(values: Values) -> list[Any]:
        kinds = {False: TensorProto.FLOAT, True: TensorProto.INT64}
        return [
            helper.make_tensor_value_info(name, kinds[whole], list(shape)) for name, (whole, shape) in values.items()
        ]

    graph = helper.make_graph(
        [helper.make_node(kind, list(taken), [given], **how) for kind, taken, given, how in nodes], "tones",
        described(inputs), described(outputs), [numpy_helper.from_array(v, name) for name, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {key: str(value) for key, value in about.items()})
    onnx.save(model, file)


def tones(*hertz: int) -> bytes:
    """Samples: tones of 0.3 s that swell and fade, with a pause before and behind each."""
    pause, times = np.zeros(RATE // 5), np.arange(3 * RATE // 10) / RATE
    loud = np.minimum(1, 20 * np.minimum(times, times[::-1])) * 10_000
    parts = [part for each in hertz for part in (np.sin(2 * np.pi * each * times) * loud, pause)]
    return np.concatenate([pause, *parts]).astype("<i2").tobytes()


def spoken(sentence: str) -> bytes:
    """Samples that espeak-ng speaks. It makes 22,050 a second, of which the nearest are taken."""
    made = subprocess.run(
        ["espeak-ng", "-v", "en-us", "-s", "130", "--stdout", sentence], capture_output=True, check=True
    )
    samples = np.frombuffer(made.stdout[44:], "<i2")
    at = np.arange(int(len(samples) * RATE / 22_050)) * 22_050 / RATE
    quiet = np.zeros(RATE // 3)
    all_of_it = np.concatenate([quiet, np.interp(at, np.arange(len(samples)), samples), quiet])
    return all_of_it.astype("<i2").tobytes()


def silence(seconds: float) -> bytes:
    return bytes(round(seconds * RATE) * SAMPLE_BYTES)


def word_errors(said: str, heard: str) -> int:
    """Words that were put in, left out, or taken for others: the least number of changes (Levenshtein)."""
    before = list(range(len(heard.split()) + 1))
    for i, one in enumerate(said.split(), 1):
        row = [i]
        for j, other in enumerate(heard.split(), 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (one != other)))
        before = row
    return before[-1]
