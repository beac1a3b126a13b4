"""Graphs are made on the board: without the onnx package, as valid ONNX, in sessions that take what the plan says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from flashd.bundle.header import Header
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import ROW_KINDS, RowKind
from flashd.engine.forward import attention_weights, constants, unpacked
from flashd.engine.planning import parts
from flashd.graphs import in_place
from flashd.graphs.constant import Arithmetic
from flashd.graphs.onnx_bytes import MICROSOFT
from flashd.graphs.products import linear
from flashd.graphs.stages import stages
from flashd.pack.pack import pack
from flashd.system.onnx_session import open_session
from tests.engine.test_paths import opened
from tests.goldens.models import GOLDENS, TOKENS

ANSWER = """
import sys
from importlib.abc import MetaPathFinder

class NoOnnx(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("onnx", "ml_dtypes"):
            raise ImportError(f"{name} is not on a board")

sys.meta_path.insert(0, NoOnnx())
from flashd.cli.main import main
code = main(sys.argv[1:])
assert "onnx" not in sys.modules and "flashd.pack" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize("memory", ["600M", None])
def test_a_board_needs_no_onnx_package(packed: dict[str, Path], memory: str | None) -> None:
    ask = ["ask", "hi", "--model", str(packed["int4"]), "--max-tokens", "2", "--context", "64"]
    ask += ["--memory", memory or smallest(packed["int4"])]
    done = subprocess.run([sys.executable, "-c", ANSWER, *ask], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_arm_does_not_round_a_whole_row_in_one_range(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KleidiAI does, and crashes if a row's last block is not whole. Other processors have none."""
    seen: list[str] = []

    class Session(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, graph: bytes, options: ort.SessionOptions, **more: Any) -> None:
            seen.append(options.get_session_config_entry("mlas.disable_kleidiai"))
            super().__init__(graph, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    with opened(tiny_bundle, None, 64):
        assert set(seen) == {"1"}


def smallest(path: Path) -> str:
    with Bundle(path) as bundle:
        return f"{parts_of_the_smallest(bundle.header)}M"


def parts_of_the_smallest(header: Header) -> int:
    """MiB, with what the interpreter and the libraries hold, and what a child holds beside it."""
    from flashd.engine.planning.plan import smallest

    return (smallest(header, 64, 64 << 20) >> 20) + 8


# --- what is written is ONNX ------------------------------------------------------------------------------


OF_ONNXRUNTIME = {"SimplifiedLayerNormalization"}
"""Operators in onnx's own domain that onnx itself does not know."""


def check(graph: bytes) -> onnx.ModelProto:
    """The graph as onnx reads it, checked by it. Operators of Microsoft's are not known to it."""
    model = onnx.load_model_from_string(graph)
    assert model.SerializeToString() and len(model.graph.node) > 0
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, MICROSOFT: 1}
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = model.ir_version, {"": 21, MICROSOFT: 1}
    known = {*(i.name for i in model.graph.input), *(i.name for i in model.graph.initializer), ""}
    for node in model.graph.node:
        assert set(node.input) <= known, f"{node.op_type} of what comes later"
        if node.domain != MICROSOFT and node.op_type not in OF_ONNXRUNTIME:
            onnx.checker.check_node(node, context)
        assert not known & (set(node.output) - {""}), f"{node.op_type} gives what is there already"
        known |= set(node.output)
    for value in (*model.graph.input, *model.graph.output):
        onnx.checker.check_value_info(value, context)
    assert {value.name for value in model.graph.output} <= known
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            onnx.checker.check_tensor(tensor, context)
            assert onnx.numpy_helper.to_array(tensor).size == np.prod(tensor.dims)
    return model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bytes, dict[str, Any]]]]:
    """The graphs that weights are multiplied in, with their constants."""
    graphs: list[tuple[bytes, dict[str, Any]]] = []
    real = open_session

    def opening(graph: bytes, initialisers: dict[str, Any] | None = None, **more: Any) -> Any:
        graphs.append((graph, initialisers or {}))
        # what onnxruntime does not copy may be thrown away: never a vector, which it reads in every pass
        assert all(graphs[-1][1][name].ndim > 1 for name in more.get("in_place", ()))
        return real(graph, initialisers, **more)

    for room in (constants, unpacked, attention_weights):
        monkeypatch.setattr(room, "open_session", opening)
    yield graphs


@pytest.mark.parametrize(
    "name", ["llama3", "gemma2", "gemma3n-shared", "opt", "phi2", "glm4-flash", "bitnet", "gemma4-moe", "falcon"]
)
@pytest.mark.parametrize("kind", ["int4", "f16"])
def test_every_graph_is_onnx(
    tmp_path: Path, name: str, kind: RowKind, made: list[tuple[bytes, dict[str, Any]]]
) -> None:
    header = pack(GOLDENS[name].write(tmp_path / "m.gguf"), tmp_path / "m.flash", kind)
    small = stages(header.model)
    for graph in small.values():
        check(graph)
    for pinned in (0.0, 1.0, None):
        with opened(tmp_path / "m.flash", pinned, 64) as model:
            model.forward(TOKENS[:5], np.array([4]))
    with_constants = {bool(constants) for _, constants in made}
    assert False in with_constants and (True in with_constants or kind == "f16")
    for graph, initialisers in made:
        given = {t.name: t for t in check(graph).graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        assert given.keys() == initialisers.keys()
        for key, tensor in given.items():
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) == initialisers[key].dtype, key
            assert tuple(tensor.dims) == initialisers[key].shape, key


def test_products_in_place_are_onnx(tiny_bundle: Path) -> None:
    for kind in ROW_KINDS:
        check(linear(kind))
    with Bundle(tiny_bundle) as bundle:
        for name in ("neurons", "gate", "enter", "middle", "leave", "finish"):
            check(in_place.graph(bundle.header, name))
        with pytest.raises(KeyError):
            in_place.graph(bundle.header, "route")


def test_negative_and_large_numbers_are_as_protobuf_has_them() -> None:
    from flashd.graphs.nodes import Graph
    from flashd.graphs.onnx_bytes import T

    g = Graph()
    x = g.input("x", T.FLOAT, ["T", 1 << 40])
    g.output("y", T.FLOAT, ["T", 1], g.node("ReduceSum", x, g.shape(-1, 300, 1 << 62), keepdims=-7, axes=[-1, 128]))
    model = onnx.load_model_from_string(g.serialise("numbers"))
    (node,) = [node for node in model.graph.node if node.op_type == "ReduceSum"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"keepdims": -7, "axes": [-1, 128]}
    assert onnx.numpy_helper.to_array(model.graph.initializer[0]).tolist() == [-1, 300, 1 << 62]
    assert [d.dim_value or d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["T", 1 << 40]


# --- what a session takes ---------------------------------------------------------------------------------

ROWS, WIDTH, SESSIONS = 2048, 2048, 6

HOLD = """
import sys, gc
from pathlib import Path
import numpy as np
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.reader import Bundle
from flashd.engine.forward.constants import Constants
from flashd.engine.forward.products import use_threads
from flashd.pack.rounding.rows import encode_rows
from flashd.system.freed_memory import give_back_freed_memory
from flashd.system.memory import resident_now

path, kind, arithmetic, rows, width, sessions = sys.argv[1:4] + [int(a) for a in sys.argv[4:]]
use_threads(1)
form = RowFormat(kind, width)
some = np.random.default_rng(0).standard_normal((256, width)).astype(np.float32)
raw = np.tile(encode_rows(some, form), (rows // 256, 1))
with Bundle(Path(path)) as bundle:
    constants = Constants(bundle.header, arithmetic)
    held = []
    for i in range(sessions + 1):
        held.append(constants.rows(form.views(raw), width))
        gc.collect()
        give_back_freed_memory()
        if i == 0:
            before = resident_now()
print(resident_now() - before)
"""


@pytest.mark.parametrize("arithmetic", ["int8", "float32"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_session_takes_what_the_plan_counts(tiny_bundle: Path, kind: RowKind, arithmetic: Arithmetic) -> None:
    asked = [str(tiny_bundle), kind, arithmetic, str(ROWS), str(WIDTH), str(SESSIONS)]
    done = subprocess.run([sys.executable, "-c", HOLD, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = SESSIONS * (parts.held(RowFormat(kind, WIDTH), ROWS, arithmetic) + parts.SESSION)
    assert 0.97 * counted <= int(done.stdout) <= 1.02 * counted
