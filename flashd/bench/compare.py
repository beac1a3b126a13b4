"""flashd bench: measures flashd, the paper's baselines and llama.cpp in turns, each in a process of its own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from flashd.bundle.reader import Bundle
from flashd.engine.decoding.apart import tokens_apart
from flashd.engine.decoding.text import Message
from flashd.engine.engine import Prompts
from flashd.engine.planning.plan import MARGIN
from flashd.errors import FlashdError, InputMissing, UsageError

PEER = "llama.cpp mmap"
NAIVE, HYBRID, DRAFTS = "naive: all of the FFN each token", "hybrid: what fits pinned, the rest each token", "flashd"
"""The first two are the baselines of "LLM in a flash", table 2. The third adds drafts: several tokens a pass."""

COLUMNS = {
    "load_seconds": "load s",
    "first_token_seconds": "first token s",
    "to_first_token_seconds": "load + first s",
    "prefill_tokens_per_second": "prefill tok/s",
    "decode_tokens_per_second": "decode tok/s",
    "tokens_per_pass": "tokens a pass",
    "card_bytes_per_token": "card MiB/token",
    "card_reads_per_token": "reads/token",
    "card_wanted_share": "wanted of read",
    "window_hit_rate": "found in RAM",
    "card_bandwidth_share": "of card's bandwidth",
    "peak_bytes": "peak MiB",
}
PICTURES = (".svg", ".png", ".pdf")
SHARES = ("card_wanted_share", "window_hit_rate", "card_bandwidth_share")

Figures = dict[str, float]


@dataclass(frozen=True)
class Contender:
    """One of those that are compared: a command that prints its figures as JSON."""

    name: str
    memory: str  # flashd's budget; empty if it has none
    command: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A row of the table: the medians of a contender."""

    name: str
    memory: str
    figures: Figures


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    bundle: Path
    model: Path | None  # the GGUF file for llama.cpp; None leaves llama.cpp out
    prompt: str
    tokens: int  # of each answer
    repeat: int  # runs of each contender
    memory: tuple[str, ...]  # budgets such as 512M; empty: one run with all the memory that there is
    threads: int
    wrap: str  # a command that every contender runs under, such as one that caps its memory; empty: none
    draft: Path | None = None  # a small model that guesses for flashd with drafts

    def run(self) -> list[Row]:
        """Measures llama.cpp, if a model file is given, the baselines, if every token needs every neuron, and flashd.

        Raises UsageError; FlashdError, which names the contender that failed.
        """
        self.check()
        wrap = command(self.wrap, "--wrap")
        contenders = self._contenders()
        runs: dict[Contender, list[Figures]] = {contender: [] for contender in contenders}
        for _ in range(self.repeat):
            # in turns, so that a slow minute of the machine affects all of them
            for contender in contenders:
                runs[contender].append(self.measured(contender, wrap))
        return [Row(c.name, c.memory, medians(results)) for c, results in runs.items()]

    def check(self) -> None:
        """Raises UsageError if there is nothing to measure."""
        if self.repeat < 1 or self.tokens < 2:
            raise UsageError("--repeat 1 and --tokens 2 are the least that can be measured")

    def _contenders(self) -> list[Contender]:
        prompt = self.prompt_tokens()
        out = self.peer(prompt)
        plans = {memory: self.plan(memory) for memory in self.memory or ("",)}
        paged = {memory for memory, plan in plans.items() if not plan["resident"]} if self._needs_all() else set()
        if paged:
            # a KV cache that is just large enough lends no memory to neurons
            context = str(len(prompt) + self.tokens + 1)
            least = f"{int(self.plan('', context)['smallest']) + MARGIN}"
            out.append(self.ask(NAIVE, least, "--context", context, "--no-drafts"))
        for memory in plans:
            if memory in paged:
                out.append(self.ask(HYBRID, memory, "--no-drafts"))
            out.append(self.ask(DRAFTS, memory, *(["--draft", str(self.draft)] if self.draft else [])))
        return out

    def prompt_tokens(self) -> list[int]:
        return tokens_apart(self.bundle, self._prompt_tokens)

    def peer(self, prompt: list[int]) -> list[Contender]:
        """llama.cpp, if a model file is given. It gets the same tokens as flashd."""
        if self.model is None:
            return []
        asked = (str(self.model), json.dumps(prompt), str(self.tokens), str(self.threads))
        return [Contender(PEER, "", (sys.executable, "-m", "flashd.bench.llama_cpp", *asked))]

    def ask(self, name: str, memory: str, *more: str) -> Contender:
        """flashd with a budget."""
        command = (
            sys.executable, "-m", "flashd", "ask", self.prompt, "--model", str(self.bundle), "--json", "--ignore-eos",
            "--no-snapshots", "--max-tokens", str(self.tokens), "--threads", str(self.threads), *more,
        )  # fmt: skip
        return Contender(name, memory, (*command, "--memory", memory) if memory else command)

    def _needs_all(self) -> bool:
        """Whether a token needs every neuron. With experts or a selection the baselines would mean nothing."""
        with Bundle(self.bundle) as bundle:
            return bundle.header.model.experts is None and bundle.header.selection is None

    def plan(self, memory: str, context: str = "") -> dict[str, Any]:
        """The plan that `flashd plan` prints for a budget and a context."""
        command = [sys.executable, "-m", "flashd", "plan", str(self.bundle), "--json", "--threads", str(self.threads)]
        command += ["--memory", memory] if memory else []
        command += ["--context", context] if context else []
        plan: dict[str, Any] = self._run("flashd plan", command)
        return plan

    def _prompt_tokens(self) -> list[int]:
        with Bundle(self.bundle) as bundle:
            return Prompts(bundle).tokens([Message("user", self.prompt)])

    def measured(self, contender: Contender, wrap: list[str]) -> Figures:
        """The figures of one run under a command. Raises FlashdError, which names the contender."""
        figures = self._run(contender.name, [*wrap, *contender.command])
        figures["to_first_token_seconds"] = figures["load_seconds"] + figures["first_token_seconds"]
        return figures

    def _run(self, name: str, command: list[str]) -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
            raise FlashdError(f"{name} ended with {done.returncode}: {last}")
        said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return said


def command(wrap: str, option: str) -> list[str]:
    """The words of a command that others run under. Raises UsageError, which names the option."""
    try:
        words = shlex.split(wrap)
    except ValueError as error:
        raise UsageError(f"{option} {wrap}: {error}") from error
    if words and not shutil.which(words[0]):
        raise UsageError(f"{option} {wrap}: {words[0]} is not a command on this machine")
    return words


def medians(runs: list[Figures]) -> Figures:
    """The median of each figure that all runs have."""
    return {key: median(run[key] for run in runs) for key in COLUMNS if all(key in run for run in runs)}


def table(rows: list[Row]) -> str:
    """The results as a Markdown table. If llama.cpp was measured, rates and times are also given as ratios to it."""
    peer = _peer(rows)
    lines = ["| | budget |" + "|".join(COLUMNS.values()) + "|", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        cells = "|".join(_cell(key, row.figures, peer) for key in COLUMNS)
        lines.append(f"|{row.name}|{row.memory}|{cells}|")
    return "\n".join(lines)


def _peer(rows: list[Row]) -> Figures | None:
    return next((row.figures for row in rows if row.name == PEER), None)


def _cell(key: str, figures: Figures, peer: Figures | None) -> str:
    if key not in figures:
        return ""
    value = figures[key]
    if "bytes" in key:
        return f"{value / (1 << 20):.0f}"
    if key in SHARES:
        return f"{100 * value:.0f} %"
    text = f"{value:.3g}"
    if peer is None or peer is figures or key not in peer:
        return text
    gain = value / peer[key] if key.endswith("per_second") else peer[key] / value
    return f"{text} ({gain:.2f}x)"


def check_plot(path: Path) -> None:
    """Raises UsageError for a file that `plot` cannot write, InputMissing if matplotlib is not installed."""
    if path.suffix not in PICTURES:
        raise UsageError(f"--plot {path}: the name of a picture must end in {', '.join(PICTURES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such folder")
    if not find_spec("matplotlib"):
        raise InputMissing("a plot needs matplotlib: pip install 'flashd[bench]'")


def plot(rows: list[Row], path: Path) -> None:
    """Draws tokens a second against RAM, and the card bytes of a token for each technique."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    speed, cost = figure.subplots(1, 2)
    for name in dict.fromkeys(row.name for row in rows):
        of_it = sorted((row.figures["peak_bytes"] / (1 << 20), row.figures["decode_tokens_per_second"])
                       for row in rows if row.name == name and "peak_bytes" in row.figures)  # fmt: skip
        if of_it:
            speed.plot(*zip(*of_it, strict=True), marker="o", label=name)
    if peer := _peer(rows):
        speed.axhline(peer["decode_tokens_per_second"], linestyle="--", color="grey", label=PEER)
    speed.set(xlabel="RAM at the most, MiB", ylabel="tokens a second", ylim=(0, None))
    speed.legend(fontsize="small")
    last = {row.name: row.figures["card_bytes_per_token"] / (1 << 20) for row in rows if row.name != PEER}
    bars = cost.barh(list(last), list(last.values()))
    cost.bar_label(bars, fmt="%.0f")
    cost.invert_yaxis()
    cost.set(xlabel="MiB read from the card for a token, with the largest budget")
    figure.savefig(path)
