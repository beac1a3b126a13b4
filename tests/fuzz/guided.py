"""python -m tests.fuzz.guided KIND SECONDS: inputs that grow towards what has not run yet. No part of the test suite.

Atheris (libFuzzer for Python; `pip install atheris`, x86-64) changes what it starts with and keeps what runs new
lines of flashd's own modules; what is wrong is judged by the functions of the tests beside this. It ends with a
traceback and the input where one is not refused in words, takes more than a minute or 2 GiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("tests.fuzz.guided needs atheris: pip install atheris")

with atheris.instrument_imports(include=["flashd", "device"]):
    from flashd.bundle.prefix import PREFIX
    from flashd.pack.pack import pack
    from tests import tiny
    from tests.fuzz import test_configurations as configurations
    from tests.fuzz import test_files as files
    from tests.fuzz import test_lines_and_bodies as lines

OPTIONS = ("-rss_limit_mb=2048", "-timeout=60", "-len_control=0", "-print_final_stats=1")
GGUF_HEAD = 20_000
"""Bytes before the weights of the tiny model."""


@dataclass(frozen=True)
class Kind:
    """What is done with an input, and inputs to start with."""

    use: Callable[[bytes], object]
    seeds: Iterable[bytes]
    longest: int = 4096


def serial(folder: Path, stack: ExitStack) -> Kind:
    jobs = stack.enter_context(lines.answering(folder))
    known = b'{"id":1,"prompt":"a","system":"b","choose":["c","d"],"max_tokens":3,"seed":1,"priority":4,"deadline":9}'
    more = [b'{"trigger":"greet","id":"x"}\n{"cancel":"x"}', b'{"status":true}', b'{"prompt":"a","json_schema":{}}']
    return Kind(lambda data: lines.serve(jobs, data), [known, *more])


def api(folder: Path, stack: ExitStack) -> Kind:
    jobs = stack.enter_context(lines.answering(folder))
    chat = (
        b'{"messages":[{"role":"user","content":"a"}],"max_tokens":3,"stream":true,"stop":["b"],"choose":["c","d"]}'
    )
    parts = (
        b'{"messages":[{"role":"system","content":[{"type":"text","text":"a"}]}],"response_format":{"type":"text"}}'
    )

    def use(data: bytes) -> None:
        for path in ("/v1/chat/completions", "/v1/completions"):
            lines.call(jobs, "POST", path, data)

    return Kind(use, [chat, parts, b'{"prompt":"a","temperature":0.5,"top_p":0.5,"seed":3,"n":1}'])


def bundle(folder: Path, _: ExitStack) -> Kind:
    """The header's JSON, under a prefix that fits it."""
    source, path = tiny.write(folder / "m.gguf"), folder / "m.flash"
    pack(source, path, "int4")
    whole = path.read_bytes()
    header = whole[PREFIX.size : PREFIX.size + PREFIX.unpack(whole[: PREFIX.size])[2]]

    def use(data: bytes) -> None:
        path.write_bytes(files.signed(bytearray(whole), data))
        files.tried(path, files.use)

    return Kind(use, [header], len(header) + 200)


def model(folder: Path, _: ExitStack) -> Kind:
    """A GGUF's metadata and table of tensors."""
    source = tiny.write(folder / "m.gguf")
    whole = source.read_bytes()

    def use(data: bytes) -> None:
        source.write_bytes(data + whole[GGUF_HEAD:])
        files.tried(source, lambda path: pack(path, folder / "out.flash", "int4"))

    return Kind(use, [whole[:GGUF_HEAD]], GGUF_HEAD)


def configuration(_: Path, __: ExitStack) -> Kind:
    return Kind(
        lambda data: configurations.configured(data.decode("utf-8", "replace")),
        [part.encode() for part in configurations.PARTS],
    )


KINDS = {"serial": serial, "api": api, "bundle": bundle, "gguf": model, "configuration": configuration}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("seconds", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        kind = KINDS[args.kind](folder, stack)
        corpus = folder / "corpus"
        corpus.mkdir()
        for i, seed in enumerate(kind.seeds):
            (corpus / str(i)).write_bytes(seed)
        limits = (f"-max_total_time={args.seconds}", f"-max_len={kind.longest}", f"-artifact_prefix={args.kind}-")
        atheris.Setup([sys.argv[0], *OPTIONS, *limits, str(corpus)], kind.use)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
