"""flashd bench: flashd and llama.cpp side by side, each in a process of its own, turn and turn about."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flashd.bundle.reader import Bundle
from flashd.child import in_child
from flashd.engine.engine import Prompts
from flashd.engine.text import Message
from flashd.errors import FlashdError

COLUMNS = {
    "load_seconds": "load s",
    "first_token_seconds": "first token s",
    "to_first_token_seconds": "load + first s",
    "prefill_tokens_per_second": "prefill tok/s",
    "decode_tokens_per_second": "decode tok/s",
    "card_bytes_per_token": "card B/token",
    "peak_bytes": "peak B",
}


@dataclass(frozen=True)
class Bench:
    """What to measure. `wrap` is a command that every contender is run under, such as one that caps its memory."""

    bundle: Path
    model: Path | None
    prompt: str
    tokens: int
    repeat: int
    memory: str | None
    threads: int
    wrap: str

    def run(self) -> dict[str, dict[str, Any]]:
        """Medians by contender: the peer if a model file is given, flashd without drafts and with them."""
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(self.repeat):
            # turn and turn about, so that a slow minute of the machine is shared
            for name, command in self._contenders().items():
                runs.setdefault(name, []).append(self._one(name, command))
        return {name: _medians(results) for name, results in runs.items()}

    def _contenders(self) -> dict[str, list[str]]:
        ask = [
            sys.executable, "-m", "flashd", "ask", self.prompt, "--model", str(self.bundle), "--json", "--ignore-eos",
            "--no-snapshots", "--max-tokens", str(self.tokens), "--threads", str(self.threads),
        ]  # fmt: skip
        if self.memory:
            ask += ["--memory", self.memory]
        out = {"flashd, no drafts": [*ask, "--no-drafts"], "flashd": ask}
        if self.model:
            # the very tokens that flashd is given
            ids = json.dumps(in_child(self._prompt_tokens))
            peer = ["-m", "flashd.peer", str(self.model), ids, str(self.tokens), str(self.threads)]
            return {"llama.cpp mmap": [sys.executable, *peer], **out}
        return out

    def _prompt_tokens(self) -> list[int]:
        with Bundle(self.bundle) as bundle:
            return Prompts(bundle).tokens([Message("user", self.prompt)])

    def _one(self, name: str, command: list[str]) -> dict[str, Any]:
        done = subprocess.run([*shlex.split(self.wrap), *command], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise FlashdError(f"{name} ended with {done.returncode}: {last}")
        figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        figures["to_first_token_seconds"] = figures["load_seconds"] + figures["first_token_seconds"]
        return figures


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: median(run[key] for run in runs) for key in COLUMNS if all(key in run for run in runs)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, each rate and time also as a ratio to the peer where there is one."""
    peer = results.get("llama.cpp mmap")
    lines = ["| |" + "|".join(COLUMNS.values()) + "|", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, figures in results.items():
        lines.append(f"|{name}|" + "|".join(_cell(key, figures, peer) for key in COLUMNS) + "|")
    return "\n".join(lines)


def _cell(key: str, figures: dict[str, Any], peer: dict[str, Any] | None) -> str:
    if key not in figures:
        return ""
    value = figures[key]
    if key.endswith("bytes") or key.startswith("card_bytes"):
        return f"{value / (1 << 20):.0f} Mi"
    text = f"{value:.3g}"
    if peer is None or peer is figures:
        return text
    gain = value / peer[key] if key.endswith("per_second") else peer[key] / value
    return f"{text} ({gain:.2f}x)"
