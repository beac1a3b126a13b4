"""What each command is asked to do: its options, with their types.

The parser builds these. Commands get them, and never see argparse's Namespace. This module imports nothing large, so
that a command which only asks the daemon stays small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashd.errors import UsageError

CONFIG = Path("/etc/flashd/flashd.yaml")
CONTEXT = 1024
MOST_THREADS = 256
MOST_TOKENS = 256
"""An answer's longest length if nothing else is asked for."""

SESSION = "[A-Za-z0-9_.-]{1,64}"
"""The name of a talk that the daemon keeps."""

Rows = Literal["int4", "int8", "f16"]
Select = Literal["exact", "narrow", "predictor", "gate"]


def check_range(option: str, value: float | None, holds: bool, allowed: str) -> None:
    """Raises UsageError if an option has a value that is not allowed. None means that it was not given."""
    if value is not None and not holds:
        raise UsageError(f"{option} {value:g} is out of range; allowed is {allowed}")


Arithmetic = Literal["int8", "float32"]

KvFormat = Literal["float32", "int8"]


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """Options of every command that loads or plans a model."""

    memory: int | None  # bytes; None: what is free
    context: int | None  # tokens; None: CONTEXT
    threads: int | None  # None: all processors
    arithmetic: Arithmetic | None
    kv: KvFormat

    def __post_init__(self) -> None:
        check_range("--context", self.context, (self.context or 0) >= 2, "2 or more")
        check_range("--threads", self.threads, 1 <= (self.threads or 0) <= MOST_THREADS, f"1 to {MOST_THREADS}")


@dataclass(frozen=True, kw_only=True)
class Answering(Budgeted):
    """Options of `ask` and `chat`. None: as the daemon's configuration says, else the model."""

    model: Path | None
    draft: Path | None
    system: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None
    stop: list[str]
    think: bool | None
    ignore_eos: bool
    no_drafts: bool
    no_snapshots: bool
    stats: bool
    json: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--max-tokens", self.max_tokens, (self.max_tokens or 0) >= 1, "1 or more")

    @property
    def own_model(self) -> list[str]:
        """The options given that ask for a model or a budget of this process's own."""
        given = {
            "--model": self.model, "--draft": self.draft, "--memory": self.memory, "--context": self.context,
            "--threads": self.threads, "--arithmetic": self.arithmetic is not None, "--kv": self.kv != "float32",
            "--ignore-eos": self.ignore_eos, "--no-drafts": self.no_drafts, "--no-snapshots": self.no_snapshots,
        }  # fmt: skip
        return [option for option, value in given.items() if value]

    @property
    def limit(self) -> int:
        """Tokens of an answer."""
        return MOST_TOKENS if self.max_tokens is None else self.max_tokens


@dataclass(frozen=True, kw_only=True)
class Ask(Answering):
    prompt: str  # "-": standard input


@dataclass(frozen=True, kw_only=True)
class Chat(Answering):
    port: Path | None
    speed: int
    resume: str | None  # the name of a talk that the daemon keeps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume is not None and not re.fullmatch(SESSION, self.resume):
            raise UsageError(
                f"--resume {self.resume} is not a name; a name has up to 64 letters, digits, -, _ and points"
            )


@dataclass(frozen=True, kw_only=True)
class Pack:
    source: Path
    out: Path | None  # None: into the cache
    rows: Rows | None
    max_loss: float | None
    select: Select | None
    text: Path | None
    pre: str | None
    context: int | None

    def __post_init__(self) -> None:
        holds = 0 < (self.max_loss or 0) < 1
        check_range("--max-loss", self.max_loss, holds, "between 0 and 1, such as 0.02 for 2 %")
        check_range("--context", self.context, (self.context or 1) >= 1, "1 or more")
        if self.select is None and self.max_loss is None and self.text is not None:
            raise UsageError("--text measures a loss, and no loss is allowed: add --max-loss or --select")
        if self.select == "exact" and (self.max_loss is not None or self.text is not None):
            raise UsageError("--select exact loses nothing: leave out --max-loss and --text, or leave out --select")
        if self.select == "predictor" and self.text is None:
            raise UsageError("--select predictor needs --text: a text like those that the model will meet")


@dataclass(frozen=True, kw_only=True)
class Info:
    bundle: Path | None
    families: bool
    json: bool

    def __post_init__(self) -> None:
        if self.bundle is None and not self.families:
            raise UsageError("name a bundle, or ask for --families")


@dataclass(frozen=True, kw_only=True)
class Verify:
    bundle: Path
    json: bool


@dataclass(frozen=True, kw_only=True)
class Plan(Budgeted):
    bundle: Path | None
    draft: Path | None
    json: bool


@dataclass(frozen=True, kw_only=True)
class Eval(Budgeted):
    bundle: Path
    text: Path
    json: bool


@dataclass(frozen=True, kw_only=True)
class Bench:
    bundle: Path
    draft: Path | None
    gguf: Path | None
    prompt: str
    tokens: int
    repeat: int
    memory: list[str]  # budgets as they were typed: rows of the table are named after them
    threads: int
    wrap: str
    grid: list[str]  # cards, each as NAME=COMMAND
    json: bool
    plot: Path | None

    def __post_init__(self) -> None:
        if self.grid and self.wrap:
            raise UsageError("--grid names a command for each card: leave out --wrap")
        if self.grid and not self.memory:
            raise UsageError("--grid measures each budget on each card: give the budgets with --memory")


@dataclass(frozen=True, kw_only=True)
class Serve:
    config: Path
    demo: bool


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    config: Path


@dataclass(frozen=True, kw_only=True)
class SpoolOptions:
    """Where the jobs are."""

    config: Path
    spool: Path | None  # None: as the configuration says
    json: bool


@dataclass(frozen=True, kw_only=True)
class Jobs(SpoolOptions):
    most: int

    def __post_init__(self) -> None:
        check_range("--most", self.most, self.most >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Show(SpoolOptions):
    number: int


@dataclass(frozen=True, kw_only=True)
class Doctor:
    card: Path | None
    json: bool


@dataclass(frozen=True, kw_only=True)
class Update:
    folder: Path | None
    undo: bool

    def __post_init__(self) -> None:
        if (self.folder is None) == (not self.undo):
            raise UsageError("flashd update needs either a PATH or --undo")


@dataclass(frozen=True, kw_only=True)
class Sign:
    folder: Path | None
    key: Path | None
    new_key: Path | None

    def __post_init__(self) -> None:
        signs = self.folder is not None or self.key is not None
        if self.new_key is not None and signs:
            raise UsageError("--new-key makes a key and signs nothing: leave out the rest")
        if self.new_key is None and (self.folder is None or self.key is None):
            raise UsageError("flashd sign needs a PATH and --key FILE, or --new-key FILE to make a key first")


@dataclass(frozen=True, kw_only=True)
class Safe:
    config: Path


@dataclass(frozen=True, kw_only=True)
class Allow:
    config: Path
    devices: bool


@dataclass(frozen=True, kw_only=True)
class Models:
    json: bool


@dataclass(frozen=True, kw_only=True)
class Use:
    name: str
    config: Path


@dataclass(frozen=True, kw_only=True)
class Rm:
    name: str
    config: Path


Command = (
    Ask | Chat | Pack | Info | Verify | Plan | Eval | Bench | Models | Use | Rm | Serve | CheckConfig | Jobs | Show
    | Doctor | Update | Sign | Safe | Allow
)  # fmt: skip
