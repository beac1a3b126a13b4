"""Bundles and model files that were bent: a FlashdError in one line, and no more memory than the file is worth."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.bundle.errors import DamagedHeader
from flashd.bundle.header import Header
from flashd.bundle.prefix import PREFIX, digest
from flashd.bundle.reader import Bundle
from flashd.engine.decoding.sampling import Sampling
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.errors import DataError, FlashdError
from flashd.pack.pack import pack
from tests import tiny
from tests.fuzz.conftest import one_line, tries

pytestmark = pytest.mark.slow

NUMBERS = st.sampled_from([-1, 0, 1, 2, 7, 31, 32, 63, 64, 4096, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 64])
ODD: st.SearchStrategy[Any] = (
    NUMBERS | st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.just([]) | st.just({})
    | st.just("{% for i in range(9) %}{{ messages[i] }}{% endfor %}") | st.just("{{ x")
)  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What a file of some hundred kilobytes has no business with: more than a gibibyte beyond what is there."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def sign(data: bytearray, header: dict[str, Any]) -> bytes:
    """The file with another header, and every checksum right: who forges one can count too."""
    return signed(data, msgspec.json.encode(header))


def signed(data: bytearray, body: bytes) -> bytes:
    """The file with `body` for a header."""
    prefix = PREFIX.pack(*PREFIX.unpack(data[: PREFIX.size])[:2], len(body), digest(body), len(data))
    data[: len(prefix) + len(body)] = prefix + body
    return bytes(data)


def header_of(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(
        data[PREFIX.size : PREFIX.size + PREFIX.unpack(data[: PREFIX.size])[2]]
    )
    return found


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON tree has values."""
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [*([at] if at else []), *(p for key, value in steps for p in places(value, (*at, key)))]


def put(tree: Any, place: tuple[Any, ...], value: Any) -> None:
    for step in place[:-1]:
        tree = tree[step]
    tree[place[-1]] = value


def use(path: Path) -> None:
    """What the daemon does with a bundle."""
    with Bundle(path) as bundle:
        bundle.verify()
        prompts = Prompts(bundle)
        tokens = prompts.tokens([Message("user", "the thesis\x00 <|end|>")])
        with Engine(bundle, Budget(600 << 20, 64, 1)) as engine:
            from flashd.engine.engine import Answer

            list(engine.pieces(engine.begin(tokens[:40], Sampling(), Answer(), limit=3)))


SECONDS = 20
"""Of the processor, that a case may take."""


@contextmanager
def little_time() -> Iterator[None]:
    def over(*_: object) -> None:
        raise TimeoutError(f"a case took more than {SECONDS} seconds of the processor")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tried(path: Path, action: Callable[[Path], object]) -> None:
    try:
        with little_time():
            action(path)
    except FlashdError as error:
        one_line(error)


def test_a_case_that_takes_long_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.test_files.SECONDS", 0.05)

    def endless(_: Path) -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"more than 0\.05 seconds"):
        tried(tmp_path, endless)


class Whole(bytes):
    """A file's bytes, which a failing test need not print."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes"


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path) -> bytes:
    return Whole(tiny_bundle.read_bytes())


@pytest.fixture(scope="module")
def families(whole: bytes, packed_golden: Callable[[str], Path]) -> list[bytes]:
    """Bundles whose headers have most of what one can have."""
    return [whole, *(Whole(packed_golden(name).read_bytes()) for name in ("gemma3n-shared", "gemma4", "gemma4-moe"))]


@tries(150)
@given(st.data())
def test_a_header_with_anything_in_it(families: list[bytes], tmp_path: Path, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(families))
    header = header_of(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        put(header, data.draw(st.sampled_from(places(header))), data.draw(ODD))
        if not isinstance(header, dict):
            break
    (tmp_path / "m.flash").write_bytes(sign(bytearray(whole), header))
    tried(tmp_path / "m.flash", use)


@pytest.mark.parametrize("body", [b'{"model":"\xff"}', b'{"\xffmodel":1}', b"[" * 100_000, b'{"a":' * 100_000])
def test_a_header_that_is_no_json(whole: bytes, tmp_path: Path, body: bytes) -> None:
    (tmp_path / "m.flash").write_bytes(signed(bytearray(whole), body))
    with pytest.raises(DamagedHeader, match="does not make sense"):
        Bundle(tmp_path / "m.flash")


@tries(150)
@given(st.binary(max_size=200), st.integers(0, 1 << 20), st.booleans())
def test_bytes_written_over_anywhere(whole: bytes, tmp_path: Path, data: bytes, at: int, cut: bool) -> None:
    at %= len(whole)
    bent = whole[:at] + data + (b"" if cut else whole[at + len(data) :])
    (tmp_path / "m.flash").write_bytes(bent)
    tried(tmp_path / "m.flash", use)


@tries(60)
@given(st.data())
def test_sections_with_anything_in_them(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Signed by whoever forged it: what a section says is checked before it is believed."""
    header = msgspec.convert(header_of(whole), Header)
    texts = "tokenizer", "token_bytes", "rope", "vectors"
    small = [s for s in header.sections if s.name.rsplit(".", 1)[-1] in texts and s.length]
    section = data.draw(st.sampled_from(small))
    bent = bytearray(whole)
    at = section.offset + data.draw(st.integers(0, section.length - 1))
    new = data.draw(st.binary(min_size=1, max_size=section.end - at))
    bent[at : at + len(new)] = new
    (tmp_path / "m.flash").write_bytes(signed_again(bent, header))
    tried(tmp_path / "m.flash", use)


def signed_again(bent: bytearray, header: Header) -> bytes:
    """With the checksums that the bytes have now."""
    runs = [
        digest(bytes(bent[at : min(at + s.run, s.end)]))
        for s in header.sections
        for at in range(s.offset, s.end, s.run)
    ]
    table = np.array(runs, "<u8").tobytes()
    bent[header.checksums.offset : header.checksums.end] = table
    fresh = msgspec.structs.replace(header, checksums_digest=f"{digest(table):016x}")
    return sign(bent, msgspec.to_builtins(fresh))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Whole(tiny.write(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes())


@tries(150)
@given(st.data())
def test_a_model_file_with_anything_in_it(model_file: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Its metadata and its table of tensors are the first 20 kB."""
    bent = bytearray(model_file)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 20_000))
        new = data.draw(
            st.binary(min_size=1, max_size=8) | NUMBERS.map(lambda n: (n % (1 << 64)).to_bytes(8, "little"))
        )
        bent[at : at + len(new)] = new
    (tmp_path / "m.gguf").write_bytes(bent[: data.draw(st.sampled_from([len(bent), len(bent) // 2, 9000]))])
    tried(tmp_path / "m.gguf", lambda path: pack(path, tmp_path / "out.flash", "int4"))


@pytest.mark.parametrize("entries", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_list_longer_than_its_file(model_file: bytes, tmp_path: Path, entries: int) -> None:
    """What is behind the end of a file is no numbers, however many there should be."""
    name = b"tokenizer.ggml.token_type"
    at = model_file.index(name) + len(name) + 8  # behind the types of the list and of what is in it
    (tmp_path / "m.gguf").write_bytes(model_file[:at] + entries.to_bytes(8, "little") + model_file[at + 8 :])
    with pytest.raises(DataError, match=r"cut short|a list of"):
        pack(tmp_path / "m.gguf", tmp_path / "out.flash", "int4")


def test_lists_of_lists_and_strings_without_end_are_refused(model_file: bytes, tmp_path: Path) -> None:
    """Each of a list's entries would be a list, whose sum nothing bounds. A string would take all memory at once."""
    name = b"tokenizer.ggml.tokens"
    of_entries = model_file.index(name) + len(name) + 4  # behind the type of the list
    lists = model_file[:of_entries] + (9).to_bytes(4, "little") + model_file[of_entries + 4 :]
    first = of_entries + 12  # the length of the first string
    huge = model_file[:first] + (1 << 33).to_bytes(8, "little") + model_file[first + 8 :]
    for bent, what in ((lists, "a list of lists"), (huge, f"a string of {1 << 33} bytes")):
        (tmp_path / "m.gguf").write_bytes(bent)
        with pytest.raises(DataError, match=what):
            pack(tmp_path / "m.gguf", tmp_path / "out.flash", "int4")


@pytest.mark.parametrize(
    "key",
    [
        "block_count", "feed_forward_length", "embedding_length", "context_length", "attention.head_count",
        "attention.head_count_kv",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, 1, 5, 1 << 20, 1 << 30, (1 << 32) - 1])
def test_a_model_file_that_claims_to_be_another_size(model_file: bytes, tmp_path: Path, key: str, value: int) -> None:
    name = f"llama.{key}".encode()
    at = model_file.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4
    bent = model_file[:at] + value.to_bytes(4, "little") + model_file[at + 4 :]
    (tmp_path / "m.gguf").write_bytes(bent)
    if key == "context_length" and value:
        pack(tmp_path / "m.gguf", tmp_path / "out.flash", "int4")
    else:
        with pytest.raises(FlashdError):
            pack(tmp_path / "m.gguf", tmp_path / "out.flash", "int4")
        assert not (tmp_path / "out.flash").exists()


def test_the_whole_file_is_used_as_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    """So that none of the above passes because nothing ever works."""
    path = Path(shutil.copy(tiny_bundle, tmp_path / "m.flash"))
    use(path)
    header = msgspec.convert(header_of(path.read_bytes()), Header)
    path.write_bytes(signed_again(bytearray(path.read_bytes()), header))
    use(path)
