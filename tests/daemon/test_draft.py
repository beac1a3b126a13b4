"""The daemon with a draft, as a process: several answers at once, a kill -9 in their midst, its budget."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Kind

from flashd.bundle.header import Drawing
from flashd.bundle.reader import Bundle
from flashd.engine.decoding.sampling import sampling_of
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Answer, Budget, Engine, Prompts
from flashd.pack.pack import pack
from tests import tiny
from tests.daemon.running import Running
from tests.waiting import wait

pytestmark = pytest.mark.slow

DRAFTING = """
import sys
from pathlib import Path
from flashd.engine.decoding.drafting.pace import Pace
from flashd.engine.planning.draft import Pair
from tests.daemon.appliance_process import main
Pair.taken = property(lambda self: self.beside or self.alone)
Pace.goes_on = lambda self, draft, steps, nodes, ahead: steps < 4
Pace.count = lambda self, draft, least, most, steps, ahead: min(most, len(draft))
sys.exit(main(Path(sys.argv[1])))
"""
"""The daemon, with a draft however little it is worth: the model is small, and its file may be read fast."""

PROMPTS = ("the thesis", "the other", "the end")
TOKENS, TEMPERATURE = 120, 0.8
MORE = "draft: {}\nthreads: 1\ntriggers:\n" + "".join(
    f"  - {{{{kind: manual, name: ask{i}, prompt: {prompt}}}}}\n" for i, prompt in enumerate(PROMPTS)
)


def test_answers_with_a_draft_outlive_a_kill_and_say_what_each_says_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.flash"
    pack(tiny.write(tmp_path / "large.gguf", kind=Kind.F16), large, "f16")  # f16 rows always page
    with Running(tmp_path, large, MORE.format(tiny_bundle)) as daemon:
        wanted = f"max_tokens: {TOKENS}, temperature: {TEMPERATURE}"
        daemon.config.write_text(daemon.config.read_text().replace("max_tokens: 8, temperature: 0", wanted))
        daemon.program = [sys.executable, "-c", DRAFTING]
        daemon.start()
        with daemon.http() as http:
            numbers = [http.post(f"/api/triggers/ask{i}").json()["job"] for i in range(len(PROMPTS))]
            wait(lambda: daemon.job(http, numbers[0])["state"] != "queued")
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        daemon.start()
        with daemon.http() as http:
            jobs = [daemon.ended(http, number) for number in numbers]
        assert any(job["attempts"] == 2 for job in jobs)
        daemon.told_until(", job ")  # several at once
        assert daemon.stop() == 0
    with Bundle(large) as bundle, Engine(bundle, Budget(None, 512, 1)) as engine:
        for prompt, job in zip(PROMPTS, jobs, strict=True):
            seed, alone = int(job["created"] * 1e6) + job["id"], Answer()
            drawn = sampling_of(Drawing(temperature=TEMPERATURE), bundle.header.text.drawing, seed)
            tokens = Prompts(bundle).tokens([Message("user", prompt)])
            list(engine.pieces(engine.begin(tokens, drawn, alone, limit=TOKENS, drafts=False)))
            figures = job["result"]["figures"]
            assert (job["state"], job["result"]["text"]) == ("done", alone.text)
            assert 0 < figures["accepted"] < figures["drafted"]
            assert figures["peak_bytes"] <= figures["memory_bytes"]
