"""The command line: every command, every option, and the help that explains them.

The manual page flashd(1) is made of this module, so a help text is a whole sentence that stands alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import flashd
from flashd.cli import arguments as a
from flashd.cli import options as o
from flashd.cli.arguments import BUNDLE, YAML, Commands, Parser
from flashd.system.memory import parse_size

DAEMONS = "or what the daemon's configuration says"
MODELS = "what the daemon's configuration says, else what the model's makers recommend"


def parse(argv: Sequence[str] | None = None) -> o.Command:
    """What was typed, as the options of one command. Raises UsageError."""
    typed = vars(build().parse_args(argv))
    kind: Callable[..., o.Command] = typed.pop("command")
    return kind(**typed)


def build() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="flashd",
        description="Answers prompts with a language model that is larger than the RAM of this machine.",
    )
    parser.add_argument(
        "--version", action="version", version=f"flashd {flashd.__version__}", help="Print the version and exit."
    )
    commands: Commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (_ask, _chat, _models, _use, _rm, _pack, _info, _verify, _plan, _eval, _bench):
        add(commands)
    for add in (_serve, _check_config, _jobs, _show, _doctor, _update, _sign, _safe, _allow):
        add(commands)
    return parser


# --- answering --------------------------------------------------------------------------------------------


def _ask(commands: Commands) -> None:
    ask = a.command(
        commands, "ask", o.Ask, "Answer one prompt.",
        "If the daemon runs, it answers. If you give --model, or an option that changes how the model is loaded, this"
        " command loads a model of its own.",
    )  # fmt: skip
    ask.add_argument("prompt", metavar="PROMPT", help="The prompt. If it is -, it is read from standard input.")
    _add_answering(ask)


def _chat(commands: Commands) -> None:
    chat = a.command(
        commands, "chat", o.Chat, "Talk with the model, one line at a time.",
        "If the daemon runs, it answers, as with flashd ask. Ctrl-C stops an answer. Ctrl-D or /quit ends the talk."
        " /reset forgets it. /help lists the keys. If the talk outgrows the context, its oldest messages are"
        " forgotten.",
    )  # fmt: skip
    _add_answering(chat)
    chat.add_argument(
        "--port", type=Path, metavar="DEVICE",
        help="Talk on this serial line instead of the terminal. The daemon answers.",
    )  # fmt: skip
    chat.add_argument(
        "--resume", metavar="NAME",
        help="Go on with the talk of this name, or begin it. The daemon keeps it, also while it does not run.",
    )  # fmt: skip
    a.number(chat, "--speed", int, "Set the speed of --port in bits a second.", "a speed of serial lines", 115200)


def _add_answering(parser: Parser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar=BUNDLE,
        help="Load this bundle. A GGUF file or a Hugging Face folder is packed at its first use. The default without"
        " a daemon is a small model that comes with flashd.",
    )  # fmt: skip
    a.draft(parser)
    parser.add_argument("--system", metavar="TEXT", help="Tell the model how to behave: the system prompt.")
    a.number(parser, "--max-tokens", int, "End the answer after this many tokens.", "1 or more", None,
            f"{o.MOST_TOKENS}, {DAEMONS}")  # fmt: skip
    a.number(parser, "--temperature", float, "Draw more freely the higher this is. 0 takes the likeliest token.",
            "0 to 10", None, MODELS)  # fmt: skip
    a.number(parser, "--top-p", float, "Draw only from the likeliest tokens whose probabilities add up to this.",
            "above 0 up to 1", None, MODELS)  # fmt: skip
    a.number(parser, "--top-k", int, "Draw only from this many of the likeliest tokens. 0 turns this off.",
            "0 or more", None, MODELS)  # fmt: skip
    a.number(parser, "--min-p", float,
            "Never draw a token whose probability is below this share of the likeliest one's. 0 turns this off.",
            "0 up to below 1", None, MODELS)  # fmt: skip
    a.number(parser, "--repeat-penalty", float,
            "Make tokens that were said lately less likely by this factor. 1 turns this off.",
            "above 0 up to 10", None, MODELS)  # fmt: skip
    a.number(parser, "--seed", int, "Draw the same answer again with the same number.", "0 or more", None,
            "a new one each time")  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="End the answer before this text. This option may be given several times.",
    )  # fmt: skip
    parser.add_argument(
        "--think", action=argparse.BooleanOptionalAction,
        help="Let a reasoning model think before it answers, or not (default: as the daemon is configured, else not)."
        " ask prints the thoughts on standard error.",
    )  # fmt: skip
    a.flag(parser, "--ignore-eos", "Go on when the model ends its answer. This is for measuring.")
    a.flag(parser, "--no-drafts", "Compute one token in each pass over the card. This is for comparing.")
    a.flag(parser, "--no-snapshots", "Use no kept beginnings of prompts, and keep none.")
    a.flag(parser, "--stats", "Print what the answer cost.")
    a.flag(parser, "--json", "Print one JSON object when the answer is complete.")
    _add_budget(parser)


def _add_budget(parser: Parser) -> None:
    parser.add_argument(
        "--memory", type=parse_size, metavar="SIZE",
        help="Use at most this much RAM for everything, such as 512M or 1.5G (1M or more; default: what is free)."
        " MB and MiB mean the same as M.",
    )  # fmt: skip
    a.number(parser, "--context", int, "Hold this many tokens of prompt and answer.", "2 or more", None,
            str(o.CONTEXT))  # fmt: skip
    a.number(parser, "--threads", int, "Use this many processors.", f"1 to {o.MOST_THREADS}", None, "all")
    parser.add_argument(
        "--arithmetic", choices=get_args(o.Arithmetic),
        help="Multiply in this way (default: int8, but float32 for neurons that are selected). int8 rounds what goes"
        " into a product to 8 bits and is faster; float32 rounds nothing.",
    )  # fmt: skip
    parser.add_argument(
        "--kv", choices=get_args(o.KvFormat), default="float32",
        help="Keep the keys and values of the tokens so far in this way (default: float32). int8 takes less than a"
        " third of the RAM, which then keeps more of the model, and rounds them to 8 bits.",
    )  # fmt: skip


# --- bundles ----------------------------------------------------------------------------------------------


def _models(commands: Commands) -> None:
    models = a.command(
        commands, "models", o.Models, "List the bundles here, the RAM that each needs, and the speed to expect."
    )
    a.json_flag(models)


def _use(commands: Commands) -> None:
    use = a.command(
        commands, "use", o.Use, "Have the daemon answer with another bundle.",
        "This checks that the bundle works in the memory of this machine, and then changes model and, if it is too"
        " small, memory in the configuration. Your comments stay. The service starts again; if it does not, the"
        " configuration is put back.",
    )  # fmt: skip
    a.name(use)
    a.config(use)


def _rm(commands: Commands) -> None:
    rm = a.command(
        commands, "rm", o.Rm, "Remove a bundle.", "The bundle that the daemon answers with is not removed."
    )
    a.name(rm)
    a.config(rm)


def _pack(commands: Commands) -> None:
    pack = a.command(
        commands, "pack", o.Pack, "Make a bundle of a GGUF file or a Hugging Face folder.",
        "Pack on a workstation, then copy the bundle to the board's card.",
    )  # fmt: skip
    pack.add_argument(
        "source", type=Path, metavar="MODEL", help="The model: a .gguf file, or a folder with .safetensors files."
    )
    pack.add_argument(
        "-o", "--out", type=Path, metavar=BUNDLE,
        help="Write the bundle to this file. The default is the cache, where flashd models and --model find it.",
    )  # fmt: skip
    pack.add_argument(
        "--rows", choices=get_args(o.Rows),
        help="Store weights with this many bits. The default goes tensor by tensor: 4 for up to 4.5 bits in the file,"
        " 8 for more. With --max-loss or --select it is 4.",
    )  # fmt: skip
    a.number(pack, "--max-loss", float, "Allow perplexity to rise by this share: 0.02 allows 2 %%.",
            "above 0 below 1", None, "no loss, or 0.01 if --select allows one")  # fmt: skip
    pack.add_argument(
        "--select", choices=get_args(o.Select),
        help="Choose how quality is given up for speed. exact: not at all (the default). narrow: store the neurons"
        " that matter least, or the experts of some layers, with fewer bits (the default with --max-loss). predictor:"
        " for ReLU models, let a small network choose the neurons that take part. gate: for gated models, let the"
        " gates choose and stay in RAM.",
    )  # fmt: skip
    pack.add_argument(
        "--text", type=Path, metavar="FILE.txt",
        help="Measure the loss on this text. It should be like the texts that the model will meet.",
    )  # fmt: skip
    pack.add_argument(
        "--pre", metavar="NAME", help="Split words as this pre-tokenizer of GGUF does, if the file does not name one."
    )
    a.number(pack, "--context", int, "Pack for texts of up to so many tokens. A model with LongRoPE, such as"
            " Phi-4-mini, reads short texts a little worse if long ones are possible", "1 or more", None,
            "all that it can read without that")  # fmt: skip


def _info(commands: Commands) -> None:
    info = a.command(commands, "info", o.Info, "Show what is in a bundle, or which model families can be packed.")
    a.bundle(info, "The bundle to look at.", optional=True)
    a.flag(info, "--families", "List the model families that can be packed.")
    a.json_flag(info)


def _verify(commands: Commands) -> None:
    verify = a.command(commands, "verify", o.Verify, "Read a whole bundle and check every checksum.")
    a.bundle(verify, "The bundle to check.")
    a.json_flag(verify)


def _plan(commands: Commands) -> None:
    plan = a.command(commands, "plan", o.Plan, "Show what a memory budget buys: what stays in RAM, what is read.")
    a.bundle(plan, "The bundle to plan for. The default is the small model that comes with flashd.", optional=True)
    a.draft(plan)
    a.json_flag(plan)
    _add_budget(plan)


def _eval(commands: Commands) -> None:
    evaluate = a.command(commands, "eval", o.Eval, "Measure the perplexity of a text.")
    a.bundle(evaluate, "The bundle to measure with.")
    evaluate.add_argument("--text", type=Path, required=True, metavar="FILE.txt", help="Measure on this text.")
    a.json_flag(evaluate)
    _add_budget(evaluate)


def _bench(commands: Commands) -> None:
    bench = a.command(
        commands, "bench", o.Bench, "Measure speed, beside llama.cpp if you like.",
        "With --gguf, llama.cpp answers the same prompt with the same model. The bench extra has what that needs.",
    )  # fmt: skip
    a.bundle(bench, "The bundle to measure.")
    a.draft(bench)
    bench.add_argument("--gguf", type=Path, metavar="MODEL.gguf", help="Measure llama.cpp with this file too.")
    bench.add_argument(
        "--prompt", metavar="TEXT", default="Explain what a hash table is and when to use one.",
        help="Ask this (default: %(default)s).",
    )  # fmt: skip
    a.number(bench, "--tokens", int, "Let each answer have this many tokens.", "2 or more", 16)
    a.number(bench, "--repeat", int, "Measure this often, and show the medians.", "1 or more", 3)
    bench.add_argument(
        "--memory", metavar="SIZE", nargs="+", action="extend", default=[],
        help="Measure with each of these budgets, such as 400M 1G. Name the largest last (default: what is free).",
    )  # fmt: skip
    a.number(bench, "--threads", int, "Use this many processors.", f"1 to {o.MOST_THREADS}", 2)
    bench.add_argument(
        "--wrap", default="", metavar="COMMAND",
        help="Run everything that is measured under this command, such as one that limits its RAM.",
    )  # fmt: skip
    bench.add_argument(
        "--grid", metavar="CARD=COMMAND", nargs="+", action="extend", default=[],
        help="Measure flashd and llama.cpp with every budget on every card. Each command runs what is measured on the"
        " card that it is named for. {memory} in it stands for the budget, so that both have the same limit.",
    )  # fmt: skip
    a.json_flag(bench)
    bench.add_argument("--plot", type=Path, metavar="FILE.svg", help="Draw a plot too: .svg, .png or .pdf.")


# --- the appliance ----------------------------------------------------------------------------------------


def _serve(commands: Commands) -> None:
    serve = a.command(
        commands, "serve", o.Serve, "Run the daemon: jobs, the API, consoles, triggers and outputs.",
        "On a board, systemd starts this: systemctl start flashd.",
    )  # fmt: skip
    a.config(serve)
    a.flag(serve, "--demo", "Try the daemon without a board: with imitated pins and an imitated serial line.")


def _check_config(commands: Commands) -> None:
    check = a.command(commands, "check-config", o.CheckConfig, "Check a configuration before the daemon reads it.")
    check.add_argument(
        "config", type=Path, nargs="?", default=o.CONFIG, metavar=YAML,
        help="The configuration to check (default: %(default)s).",
    )  # fmt: skip


def _jobs(commands: Commands) -> None:
    jobs = a.command(commands, "jobs", o.Jobs, "List the latest jobs.")
    a.number(jobs, "--most", int, "List at most this many.", "1 or more", 20)
    _add_spool(jobs)


def _show(commands: Commands) -> None:
    show = a.command(commands, "show", o.Show, "Show one job: what was asked, what was answered and what it cost.")
    show.add_argument("number", type=int, metavar="ID", help="The job's number, as flashd jobs lists it.")
    _add_spool(show)


def _add_spool(parser: Parser) -> None:
    a.config(parser)
    parser.add_argument(
        "--spool", type=Path, metavar="FILE.db",
        help="Read the jobs from this file. The default is the one that the configuration names.",
    )  # fmt: skip
    a.json_flag(parser)


def _doctor(commands: Commands) -> None:
    doctor = a.command(commands, "doctor", o.Doctor, "Examine this machine, and say what stands in flashd's way.")
    doctor.add_argument(
        "--card", type=Path, metavar="PATH",
        help="Look at the card that this bundle or folder is on. The default is where the daemon's bundle is.",
    )  # fmt: skip
    a.json_flag(doctor)


def _update(commands: Commands) -> None:
    update = a.command(
        commands, "update", o.Update, "Install a model or a configuration from a folder, such as a USB stick's.",
        "Give either a folder or --undo. The old files are kept beside the new ones.",
    )  # fmt: skip
    _add_stick(update)
    a.flag(update, "--undo", "Put the old files back if the last update was interrupted.")


def _sign(commands: Commands) -> None:
    sign = a.command(
        commands, "sign", o.Sign, "Sign an update, so that boards take it which have your public key.",
        "Make a key with --new-key first, and copy FILE.pub to each board's /etc/flashd/update-keys.",
    )  # fmt: skip
    _add_stick(sign)
    sign.add_argument("--key", type=Path, metavar="FILE", help="Sign with this secret key.")
    sign.add_argument("--new-key", type=Path, metavar="FILE", help="Make a secret key, and FILE.pub for the boards.")


def _add_stick(parser: Parser) -> None:
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="PATH", help="The folder that has a flashd-update.yaml."
    )


def _safe(commands: Commands) -> None:
    safe = a.command(
        commands, "safe", o.Safe, "Turn off every pin that a decision drives.",
        "systemd runs this when the daemon ends, even if it crashed.",
    )  # fmt: skip
    a.config(safe)


def _allow(commands: Commands) -> None:
    allow = a.command(
        commands, "allow", o.Allow, "Tell systemd which devices and how much memory the service may have.",
        "systemd runs this before the daemon starts, so that its sandbox fits the configuration.",
    )  # fmt: skip
    a.config(allow)
    a.flag(allow, "--devices", "Tell it of the devices only. A change of memory needs a restart.")
