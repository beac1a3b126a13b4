"""The bundles on this machine: where they are, what they are called, and those that are packed at their first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flashd.bundle.reader import Bundle
from flashd.cli.needs import need_pack
from flashd.errors import CannotWrite, CardError, DataError, InputMissing
from flashd.system.paths import SERVICE, cache_folder, make_folder

FOLDERS = (Path("/var/lib/flashd"), Path("/media/flashd"), SERVICE / "flashd")
"""The folders in which the service's bundles are."""


def all_bundles() -> Iterator[Path]:
    """Every bundle in the service's folders and in this user's cache."""
    for folder in dict.fromkeys([*FOLDERS, cache_folder()]):
        if folder.is_dir():
            yield from sorted(folder.glob("*.flash"))


LOOKING = 120, 1 << 30
"""Limits of a child that opens bundles: seconds of processor time, and bytes."""

SMALL = 0.5
"""The largest share of a model's file that its draft has: to run a larger one takes longer than its guesses save."""


@dataclass(frozen=True)
class Guesser:
    """Two bundles of the same tokenizer, of which the small one can make guesses for the large one."""

    large: Path
    small: Path


def guessers(bundle: Path) -> Iterator[Guesser]:
    """The pairs that a bundle makes with those beside it and with all_bundles.

    What cannot be read makes none. The files may be anybody's: call this in a child, within LOOKING.
    """
    here = bundle.resolve()
    others = dict.fromkeys(path.resolve() for path in [*sorted(here.parent.glob("*.flash")), *all_bundles()])
    for other in others:
        if other != here:
            with suppress(OSError, DataError, CardError, InputMissing):
                yield from _guesser(here, other)


def _guesser(*pair: Path) -> Iterator[Guesser]:
    """Raises OSError, DataError, CardError, InputMissing if one cannot be read or guess for the other."""
    from flashd.engine.planning.draft import check_draft

    small, large = sorted(pair, key=lambda path: path.stat().st_size)
    if small.stat().st_size <= SMALL * large.stat().st_size:
        with Bundle(large) as model, Bundle(small) as draft:
            check_draft(model, draft)
        yield Guesser(large, small)


def find(name: str) -> Path:
    """The bundle of a name that `flashd models` lists, or of a path. Raises InputMissing."""
    known = {path.stem: path for path in reversed(list(all_bundles()))}
    if name in known:
        return known[name]
    if Path(name).exists():
        return Path(name).resolve()
    there = ", ".join(sorted(known)) or "none"
    raise InputMissing(f"no bundle is called {name!r}; those on this machine: {there}")


def is_model(path: Path) -> bool:
    """Whether a path is a model that can be packed: a GGUF file, or a folder with weights."""
    if path.is_dir():
        return (path / "config.json").exists()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def packed_path(model: Path) -> Path:
    """The place in the cache for the bundle of a model."""
    name = model.resolve().name if model.is_dir() else model.stem
    return cache_folder() / f"{name}.flash"


def is_current(bundle: Path, model: Path) -> bool:
    """Whether a bundle in the cache was made of this model, by its name, its size and its time."""
    if not bundle.exists():
        return False
    try:
        with Bundle(bundle) as opened:
            source = opened.header.source
    except DataError:  # damaged, or of an older flashd
        return False
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    stats = [file.stat() for file in files]
    fits = (source.name, source.nbytes) == (model.resolve().name, sum(s.st_size for s in stats))
    return fits and max((s.st_mtime for s in stats), default=0.0) <= bundle.stat().st_mtime


def make_room(path: Path) -> None:
    """Makes the folder of a bundle. Raises CannotWrite."""
    try:
        make_folder(path.parent)
    except OSError as error:
        raise CannotWrite(f"{path.parent}: {error.strerror}") from error


def pack_into_cache(model: Path, on_progress: Callable[[int, int], None]) -> Path:
    """Packs a model for its use from now on. Raises DataError, CannotWrite, InputMissing."""
    try:
        from flashd.pack.pack import pack
    except ImportError as error:
        raise need_pack(error) from error
    path = packed_path(model)
    make_room(path)
    pack(model, path, None, on_progress)
    return path
