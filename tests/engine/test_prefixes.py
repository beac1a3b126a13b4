"""What prompts begin with is kept on the card: what it saves, when it is written, and that nothing bad is trusted."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from flashd.bundle.prefix import PREFIX
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.cache import prefixes as bounds
from flashd.engine.cache import snapshot
from flashd.engine.cache.prefixes import MOST_BYTES_OF_NOTES, MOST_NOTED, MOST_NOTED_TOKENS, Noted, Notes, Prefixes
from flashd.engine.cache.snapshot import RUN
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.line import Figures
from flashd.engine.decoding.sampling import Sampler, Sampling
from flashd.engine.forward.ffn.streamed import StreamedFfn
from flashd.engine.forward.paged import PagedModel
from flashd.engine.forward.resident import ResidentModel
from flashd.engine.model.contract import Model
from flashd.engine.paging.card import READ_BYTES
from flashd.engine.planning.parts import BUFFERS, PREFILL_TOKENS
from flashd.pack.pack import pack
from tests import tiny
from tests.engine.one_text import generate
from tests.engine.test_paths import plan
from tests.faults.test_newfile import killed_at
from tests.reference import relative

COMMON = list(range(60, 100))
A, B, C = ([*COMMON, *range(n, n + 12)] for n in (1, 20, 120))


@dataclass
class Process:
    """What a process of its own would have: an engine that has answered nothing yet."""

    model: Model
    talk: Conversation
    passes: list[int]

    def say(self, prompt: list[int], limit: int = 4) -> tuple[list[int], Figures]:
        figures = Figures()
        said = list(generate(self.talk, prompt, Sampler(Sampling()), limit=limit, eos=(), figures=figures))
        return said, figures

    def ask(self, prompt: list[int]) -> Figures:
        """Says something and then keeps what is worth it."""
        _, figures = self.say(prompt)
        self.talk.remember()
        return figures

    def logits(self, prompt: list[int]) -> tuple[Floats, Figures]:
        figures = Figures()
        return self.talk.logits(prompt, figures), figures


@contextmanager
def process(path: Path, folder: Path | None, pinned: float | None = 0.5, context: int = 512) -> Iterator[Process]:
    with Bundle(path) as bundle:
        made = plan(bundle, pinned, context, "float32")
        model: Model = ResidentModel(bundle, made) if made.resident else PagedModel(bundle, made)
        passes: list[int] = []
        forward = model.forward

        def counted(tokens: np.ndarray[tuple[int], np.dtype[np.int64]], *more: object, **named: object) -> Floats:
            passes.append(len(tokens))
            return forward(tokens, *more, **named)  # type: ignore[arg-type]

        model.forward = counted  # type: ignore[method-assign]
        try:
            yield Process(model, Conversation(model, Prefixes(folder, bundle, made) if folder else None), passes)
        finally:
            model.close()


def fresh(path: Path, prompt: list[int], pinned: float | None = 0.5) -> Floats:
    with process(path, None, pinned) as p:
        return p.logits(prompt)[0]


def teach(path: Path, folder: Path, *prompts: list[int], context: int = 512) -> list[Path]:
    """Asks in a process of its own; what is kept then."""
    with process(path, folder, context=context) as p:
        for prompt in prompts:
            p.ask(prompt)
    return kept(folder)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def test_the_card_takes_a_snapshot_in_parts(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watchdog hears of each: a slow card takes a minute for the whole."""
    monkeypatch.setattr(snapshot, "SETTLED_BYTES", 4096)
    waited: list[int] = []
    parts: list[int] = []  # how often the card had been waited for at each
    flush = os.fdatasync

    def counted(fd: int) -> None:
        flush(fd)
        waited.append(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    with process(tiny_bundle, None, None) as p, Bundle(tiny_bundle) as bundle:
        p.talk.prefixes = Prefixes(tmp_path, bundle, plan(bundle, None), lambda: parts.append(len(waited)))
        p.ask(A)
        p.ask(A)
    (path,) = kept(tmp_path)
    assert path.stat().st_size // 8192 <= len(parts) <= path.stat().st_size // 4096
    assert parts == list(range(1, len(waited) + 1))


@pytest.mark.parametrize("pinned", [0.0, 0.5, None])
def test_a_whole_prompt_needs_no_pass(tiny_bundle: Path, tmp_path: Path, pinned: float | None) -> None:
    with process(tiny_bundle, tmp_path, pinned) as p:
        said, _ = p.say(A)
        p.talk.remember()
        assert kept(tmp_path) == []  # it came once
    with process(tiny_bundle, tmp_path, pinned) as p:
        p.ask(A)
        assert p.passes[0] == len(A)
    (path,) = kept(tmp_path)
    expected = fresh(tiny_bundle, A, pinned)
    with process(tiny_bundle, tmp_path, pinned) as p:
        logits, figures = p.logits(A)
        assert p.passes == [] and np.array_equal(logits, expected)
        assert (figures.prompt_tokens, figures.reused_tokens) == (0, len(A))
        assert figures.snapshot_bytes == len(A) * p.model.cache.token_bytes + logits.nbytes <= path.stat().st_size
    with process(tiny_bundle, tmp_path, pinned) as p:
        again, figures = p.say(A)
        assert again == said and figures.reused_tokens == len(A)
        # and neither does the same prompt again, from RAM
        count = len(p.passes)
        assert p.say(A, limit=1)[0] == said[:1] and len(p.passes) == count


@pytest.mark.parametrize("pinned", [0.5, None])
def test_what_two_prompts_begin_with_is_paid_for_no_more(
    tiny_bundle: Path, tmp_path: Path, pinned: float | None
) -> None:
    assert len(teach(tiny_bundle, tmp_path, A, B)) == 1
    with process(tiny_bundle, tmp_path, pinned, context=64) as p:
        logits, figures = p.logits(C)
        assert p.passes == [len(C) - len(COMMON)] and figures.reused_tokens == len(COMMON)
        restored = [np.array(part, np.float32) for part in p.model.cache.parts(0, len(COMMON))]
        p.logits([99, *C[1:]])  # nothing of it is kept, so that all is computed
        p.talk.prefixes = None
        again, _ = p.logits(C)
        assert relative(again, logits) < (1e-6 if pinned is None else 1e-3)
        computed = [np.array(part, np.float32) for part in p.model.cache.parts(0, len(COMMON))]
        assert all(relative(a, b) < 1e-3 for a, b in zip(computed, restored, strict=True))
    assert relative(fresh(tiny_bundle, C, pinned), logits) < 1e-3


def test_restored_keys_and_values_are_those_that_were_written(tiny_bundle: Path, tmp_path: Path) -> None:
    with process(tiny_bundle, tmp_path) as p:
        p.ask(A)
        p.ask(B)
        written = [np.array(part) for part in p.model.cache.parts(0, len(COMMON))]
        goes_on, _ = p.logits(C)
    with process(tiny_bundle, tmp_path, context=96) as p:
        logits, _ = p.logits(C)
        for a, b in zip(written, p.model.cache.parts(0, len(COMMON)), strict=True):
            assert np.array_equal(a, b)
    assert np.array_equal(goes_on, logits)


def test_a_long_prompt_takes_fewer_passes_over_the_card(tiny_bundle: Path, tmp_path: Path) -> None:
    long = [1 + i % 250 for i in range(PREFILL_TOKENS + 20)]
    teach(tiny_bundle, tmp_path, [*long, 251, 252], [*long, 253, 254])
    asked = [*long, 255, 256]
    with process(tiny_bundle, None, 0.0) as p:
        p.logits(asked)
        assert p.passes == [PREFILL_TOKENS, 22]
    with process(tiny_bundle, tmp_path, 0.0) as p:
        _, figures = p.logits(asked)
        assert p.passes == [2]
    assert figures.snapshot_bytes == len(long) * p.model.cache.token_bytes


def test_the_card_s_bytes_of_a_first_token(packed: dict[str, Path], tmp_path: Path) -> None:
    """One pass reads every FFN: with the whole prompt kept there is none, with its beginning there is still one."""
    ahead = BUFFERS * READ_BYTES
    with Bundle(packed["int4"]) as bundle:
        ffn = sum(s.length for s in bundle.header.sections if s.name.endswith(".ffn"))
    spent: dict[str, Figures] = {}
    for name, prompt in {"first": A, "known": A, "whole": A, "begun": B}.items():
        with process(packed["int4"], tmp_path, 0.0) as p:
            _, spent[name] = p.say(prompt, limit=1)
            p.talk.remember()
    for name in ("first", "known", "begun"):
        assert abs(spent[name].prefill_card_bytes - ffn) <= ahead
    assert spent["whole"].prefill_card_bytes <= ahead < ffn / 4
    assert spent["begun"].reused_tokens == len(COMMON) // RUN * RUN
    (path,) = kept(tmp_path)
    assert path.stat().st_size < ffn / 10


def test_nothing_is_written_twice_nor_for_a_little_more(tiny_bundle: Path, tmp_path: Path) -> None:
    teach(tiny_bundle, tmp_path, A, B)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    # a sensor's digit more or less: the prompts are noted, their beginning is there already
    teach(tiny_bundle, tmp_path, [*COMMON, 1, 2, 200, 201], [*COMMON[:-3], *range(200, 215)])
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert after.keys() == before.keys() and {n for n in after if after[n] != before[n]} == {"asked.json"}
    teach(tiny_bundle, tmp_path, [*COMMON, 1, 2, 200, 201], A)
    assert len(kept(tmp_path)) == 3  # two whole prompts came again
    last = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    teach(tiny_bundle, tmp_path, A, A, A)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == last


def test_a_chat_that_goes_on_is_kept_when_all_ends(tiny_bundle: Path, tmp_path: Path) -> None:
    with process(tiny_bundle, tmp_path) as p:
        talk = A
        for turn in range(3):
            said, figures = p.say(talk)
            p.talk.remember()
            assert kept(tmp_path) == [] and (turn == 0 or figures.reused_tokens >= len(talk) - 21)
            last, talk = talk, [*talk, *said, *range(30 * turn, 30 * turn + 20)]
        p.talk.remember(leaving=True)
        p.talk.remember(leaving=True)
    (path,) = kept(tmp_path)
    with process(tiny_bundle, tmp_path) as p:
        _, figures = p.logits(talk)
        assert figures.reused_tokens == len(last) + 3 and figures.prompt_tokens == 21
    path.unlink()
    with process(tiny_bundle, tmp_path) as p:
        p.ask(list(range(200, 240)))
        p.talk.remember(leaving=True)  # no chat
    assert kept(tmp_path) == []


def header_bytes(path: Path) -> int:
    return PREFIX.size + int(PREFIX.unpack(path.read_bytes()[: PREFIX.size])[2])


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def become(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "magic": lambda path, other: flip(path, 0),
    "version": lambda path, other: flip(path, 8),
    "length of the header": lambda path, other: flip(path, 15),
    "header": lambda path, other: flip(path, 40),
    "file length": lambda path, other: flip(path, 24),
    "first run": lambda path, other: flip(path, header_bytes(path) + 5),
    "last run": lambda path, other: flip(path, path.stat().st_size - 4 * 262 - 5),
    "logits": lambda path, other: flip(path, path.stat().st_size - 1),
    "empty": lambda path, other: path.write_bytes(b""),
    "cut header": lambda path, other: os.truncate(path, 50),
    "cut": lambda path, other: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "another bundle's": lambda path, other: shutil.copy(other, path),
    "a pipe": lambda path, other: become(path, os.mkfifo),  # which is not waited for
    "a link": lambda path, other: become(path, lambda it: it.symlink_to(other)),
}


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    pack(tiny.write(folder / "o.gguf", seed=1), folder / "o.flash", "int4")
    return folder / "o.flash"


def test_what_is_wrong_is_removed_and_never_trusted(
    tiny_bundle: Path, other_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (good,) = teach(tiny_bundle, tmp_path / "good", A, A)
    (other,) = teach(other_bundle, tmp_path / "other", A, A)
    expected = fresh(tiny_bundle, A)
    with process(tiny_bundle, tmp_path / "bad") as p:
        for name, damage in DAMAGES.items():
            (tmp_path / "bad").mkdir(exist_ok=True)
            path = Path(shutil.copy(good, tmp_path / "bad"))
            damage(path, other)
            caplog.clear()
            # each as in a process that has answered nothing yet
            p.model.cache.truncate(0)
            p.passes.clear()
            p.talk = Conversation(p.model, p.talk.prefixes)
            logits, figures = p.logits(A)
            assert relative(expected, logits) < 1e-3, name
            assert len(p.passes) == 1 and not path.exists(), name
            assert [r.levelno for r in caplog.records] == [logging.WARNING] and str(path) in caplog.text, name
            # what was read before the bad run was whole, and is used
            assert figures.reused_tokens == {"last run": 48, "logits": len(A) - 1}.get(name, 0), name


@pytest.mark.parametrize("rot", [b"", b"[[", b'{"day":"\xff"}', b'{"prompts":' * 100_000])
def test_notes_that_rotted_are_begun_again(tiny_bundle: Path, tmp_path: Path, rot: bytes) -> None:
    teach(tiny_bundle, tmp_path, A)
    (notes,) = tmp_path.glob("*.json")
    notes.write_bytes(rot)
    assert not teach(tiny_bundle, tmp_path, A)  # it came once, as far as is known
    assert teach(tiny_bundle, tmp_path, A)


def test_another_bundle_in_the_same_folder_is_left_alone(
    tiny_bundle: Path, other_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teach(tiny_bundle, tmp_path, A, A)
    assert len(teach(other_bundle, tmp_path, A)) == 1
    assert len(teach(other_bundle, tmp_path, A)) == 2 and not caplog.records
    for bundle in (tiny_bundle, other_bundle):
        with process(bundle, tmp_path) as p:
            assert p.logits(A)[1].prompt_tokens == 0


def test_the_bounds(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = teach(tiny_bundle, tmp_path, A, A)[0].stat().st_size
    monkeypatch.setattr(bounds, "MOST_BYTES", int(2.5 * one))
    monkeypatch.setattr(bounds, "MOST_BYTES_OF_ONE", int(1.5 * one))
    with process(tiny_bundle, tmp_path) as p:
        first = kept(tmp_path)[0]
        others = [[n, *A[1:]] for n in (101, 102)]
        for n, prompt in enumerate(others):
            p.ask(prompt)
            p.ask(prompt)
            for path in kept(tmp_path):  # an hour passes between two uses
                t = path.stat().st_mtime - 4000
                os.utime(path, (t, t))
            if n == 0:
                p.ask(A)  # used, while the second was not
        assert first in kept(tmp_path) and len(kept(tmp_path)) == 2
        # no more than that of a longer one
        p.ask([103] * 400)
        p.ask([103] * 400)
        newest = max(kept(tmp_path), key=lambda path: path.stat().st_mtime)
        assert newest.stat().st_size <= 1.6 * one
    monkeypatch.setattr(bounds, "MOST_BYTES_A_DAY", one)
    before = kept(tmp_path)
    caplog.clear()
    teach(tiny_bundle, tmp_path, B, B, B)
    assert kept(tmp_path) == before and caplog.text.count("written today") == 1


@pytest.mark.slow
def test_what_prompts_were_asked_counts_as_written_too(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bounds, "MOST_BYTES_A_DAY", 20_000)
    real, written = os.pwrite, list[int]()

    def counted(fd: int, data: memoryview, offset: int) -> int:
        written.append(len(data))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    prompts = [[n, *range(100, 200)] for n in range(60)]
    teach(tiny_bundle, tmp_path, *prompts)
    assert 15_000 < sum(written) <= 20_000 and kept(tmp_path) == []
    assert caplog.text.count("written today") == 1
    tomorrow = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    written.clear()
    teach(tiny_bundle, tmp_path, [70, 71])
    assert len(written) == 1


def test_the_notes_are_within_what_is_left_for_them() -> None:
    prompt = Noted("f" * 16, [999_999] * MOST_NOTED_TOKENS)
    notes = Notes(prompts=[prompt] * MOST_NOTED, day=1 << 20, written=1 << 40)
    assert len(msgspec.json.encode(notes)) <= MOST_BYTES_OF_NOTES


@pytest.mark.parametrize("how", ["full", "nearly full", "read-only"])
def test_where_nothing_can_be_written_that_is_said_once(
    how: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "snapshots"
    teach(tiny_bundle, folder, A)
    if how == "full":
        monkeypatch.setattr(os, "pwrite", _full)
    elif how == "nearly full":
        monkeypatch.setattr(bounds, "FREE_BYTES", 1 << 60)
    else:
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    with process(tiny_bundle, folder) as p:
        said = [p.say(A)[0] for _ in range(3)]
        for _ in range(3):
            p.ask(A)
    assert said[0] == said[1] == said[2]
    assert not folder.is_dir() or kept(folder) == []
    assert len({r.message for r in caplog.records}) == len(caplog.records) <= 2 and caplog.records


def _full(*args: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_kill_at_each_write_leaves_nothing_bad(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teach(tiny_bundle, tmp_path, A)
    before = (tmp_path / "asked.json").read_bytes()
    with process(tiny_bundle, tmp_path) as p:
        logits, _ = p.logits(A)
        whole = False
        for number in [*range(1, 8), *range(50, 1000, 40)]:
            killed = killed_at(p.talk.remember, number)
            found = kept(tmp_path)
            assert p.talk.prefixes is not None
            p.model.cache.truncate(0)
            known, _ = p.talk.prefixes.restore(A, p.model.cache)
            whole = known is not None
            assert whole == bool(found) and (known is None or np.array_equal(known, logits))
            assert all(path.suffix in (".kv", ".json", ".partial") for path in tmp_path.iterdir())
            if not killed:
                break
            for path in found:
                path.unlink()
            (tmp_path / "asked.json").write_bytes(before)
            if p.model.cache.length < len(A):
                p.model.cache.truncate(0)
                p.talk = Conversation(p.model, p.talk.prefixes)
                p.logits(A)
    assert whole and not caplog.records


def test_what_was_cut_while_it_was_written_goes_with_the_next(tiny_bundle: Path, tmp_path: Path) -> None:
    names = [f".0123-{pid}.kv.{pid}.partial" for pid in (1 << 30, os.getpid(), os.getppid())]
    for name in names:
        (tmp_path / name).write_bytes(bytes(100))
    teach(tiny_bundle, tmp_path, A)
    assert {path.name for path in tmp_path.glob(".*")} == set(names)
    teach(tiny_bundle, tmp_path, A)
    # who still runs may still be writing
    assert [path.name for path in tmp_path.glob(".*")] == names[2:] and len(kept(tmp_path)) == 1


def test_several_processes_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    """Each writes, uses and removes what the others do."""
    with process(tiny_bundle, tmp_path) as p:
        assert p.talk.prefixes is not None
        logits, _ = p.logits(A)
        shelf, cache = p.talk.prefixes, p.model.cache

        def run() -> None:
            logging.getLogger("flashd.engine.cache.prefixes").addHandler(Failing())
            for n in range(40):
                shelf.learn(A, cache, logits)
                known, _ = shelf.restore(A, cache)
                assert known is None or np.array_equal(known, logits)
                assert cache.length == len(A)
                if n % 5 == 4:
                    for path in kept(tmp_path):
                        path.unlink(missing_ok=True)

        children = [multiprocessing.get_context("fork").Process(target=run) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        shelf.learn(A, cache, logits)
    assert [path.suffix for path in kept(tmp_path)] == [".kv"]
    assert not list(tmp_path.glob(".*"))


class Failing(logging.Handler):
    """Nothing is to be said."""

    def emit(self, _: logging.LogRecord) -> None:
        os._exit(3)


def test_a_restore_holds_nothing_twice(tiny_bundle: Path, tmp_path: Path) -> None:
    long = [1 + i % 250 for i in range(400)]
    teach(tiny_bundle, tmp_path, long, long)
    with process(tiny_bundle, tmp_path) as p:
        assert p.talk.prefixes is not None and isinstance(p.model, PagedModel)
        assert isinstance(p.model._ffn, StreamedFfn)
        for read in p.model._ffn.stream._reads:  # which is ahead, and has memory too
            read.made.result()
        tracemalloc.start()
        try:
            _, nbytes = p.talk.prefixes.restore(long, p.model.cache)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert p.model.cache.length == 400 and nbytes > 300_000
        assert peak < nbytes // 3
    assert RUN * p.model.cache.token_bytes < peak
