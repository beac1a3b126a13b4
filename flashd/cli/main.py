"""The flashd command: parses what was typed, calls what does it, prints what came of it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import flashd
from flashd.bundle.header import Measured, Narrowed, Selection
from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import ROW_KINDS
from flashd.cli import appliance
from flashd.cli.figures import as_json, in_words
from flashd.cli.progress import MIB, Bar, for_terminal, say_cut
from flashd.cli.talk import Turns, checked, talk
from flashd.errors import INTERRUPTED, DataError, FlashdError, InputMissing, UsageError
from flashd.pack import default_model

STARTED = time.perf_counter()
MOST_THREADS = 256
MOST_TOKENS = 256
"""Of an answer for which nothing else is asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, from sysexits.h."""
    logging.basicConfig(format="flashd: %(message)s", level=logging.WARNING)
    try:
        args = _parser().parse_args(argv)
        return int(args.run(args) or 0)
    except FlashdError as error:
        print(f"flashd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.EX_OK


# --- packing and looking --------------------------------------------------------------------------------


def run_pack(args: argparse.Namespace) -> None:
    """flashd pack"""
    try:
        from flashd.pack.pack import pack
    except ImportError as error:
        raise InputMissing(f"packing needs the pack extra ({error.name}): pip install 'flashd[pack]'") from error
    with Bar("packing", "weights") as bar:
        header = pack(args.source, args.out, args.rows, bar.show, _allowed(args), args.pre)
    print(f"{args.out}: {header.model.name}, {args.out.stat().st_size / MIB:.0f} MiB, {args.rows} rows")
    if s := header.selection:
        who = "a predictor" if s.kind == "predictor" else "the gate"
        print(
            f"{who} chooses {100 * sum(s.chosen) / len(s.chosen):.1f} % of neurons,"
            f" {100 * sum(s.fired) / len(s.fired):.1f} % are not zero; perplexity {s.perplexity:.2f},"
            f" {s.perplexity_exact:.2f} with all ({100 * s.loss:+.2f} %, {s.tokens} held-out tokens)"
        )
    if n := header.narrowed:
        print(
            f"{_narrow_share(header):.0f} % of groups have fewer bits; perplexity {n.perplexity:.3f},"
            f" {n.perplexity_exact:.3f} exact ({100 * n.loss:+.2f} %, KL {n.divergence:.4f},"
            f" {n.tokens} held-out tokens)"
        )


def _narrow_share(header: Any) -> float:
    """Per cent of all groups that have fewer bits on the card."""
    m = header.model
    return 100 * float(1 - sum(header.narrowed.int3) / (m.layers * m.groups))


def _allowed(args: argparse.Namespace) -> Any:
    """What loss of quality is allowed, and for what."""
    from flashd.pack.lossy.gates import Gating
    from flashd.pack.lossy.narrow_groups import Narrowing
    from flashd.pack.lossy.predictors import Selecting

    if args.max_loss is not None and not 0 < args.max_loss < 1:
        raise UsageError(f"--max-loss {args.max_loss:g} is no share between 0 and 1; 0.02 allows 2 %")
    text = _text_of(args.text) if args.text else None
    if args.select is None and args.max_loss is None and text is not None:
        raise UsageError("--text is for what may cost quality: give --max-loss too, or --select")
    if args.select == "exact" and (args.max_loss is not None or text is not None):
        raise UsageError("--select exact loses nothing: leave out --max-loss and --text, or --select")
    if args.select == "exact" or (args.select is None and args.max_loss is None):
        return None
    if args.select == "predictor":
        if text is None:
            raise UsageError(
                "a predictor is trained on text like that which the model will meet; name some with --text"
            )
        return Selecting(text, args.max_loss or 0.01)
    if args.select == "gate":
        return Gating(args.max_loss or 0.01, text)
    return Narrowing(args.max_loss or 0.01, text)


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error


def run_info(args: argparse.Namespace) -> None:
    """flashd info"""
    if args.families:
        _print_families(args.json)
        return
    if args.bundle is None:
        raise UsageError("name a bundle, or ask for --families")
    with Bundle(args.bundle) as bundle:
        header = bundle.header
    m, f = header.model, header.formats
    lengths = header.expected_lengths()
    ffn = sum(lengths[name] for name in header.paged_sections[:-1])
    facts: dict[str, Any] = {
        "name": m.name, "family": m.family, "layers": m.layers, "hidden": m.hidden, "neurons": m.neurons,
        "heads": m.heads, "kv_heads": m.kv_heads, "vocabulary": m.vocabulary, "context": m.context,
        "rows": f.ffn, "attention": f.attention, "head": f.head, "embedding": f.embedding,
        "bundle_bytes": (header.neuron if header.selection else header.group).bundle_bytes,
        "group_bytes": header.unit_bytes,
        "ffn_bytes": ffn, "file_bytes": args.bundle.stat().st_size,
        **_selection_facts(header.selection), **_narrowed_facts(header.narrowed),
        "chat_template": header.text.chat_template is not None,
        "source": header.source.name, "source_bytes": header.source.nbytes, "source_sha256": header.source.sha256,
        "packed_by": header.flashd,
    }  # fmt: skip
    if m.experts:
        facts |= {"experts": m.experts.count, "experts_of_a_token": m.experts.used}
    _print_facts(facts, args.json)


def _selection_facts(s: Selection | None) -> dict[str, Any]:
    """What `info` says of which neurons take part."""
    if s is None:
        return {"selection": "exact"}
    chooser = {"ranks": s.ranks} if s.kind == "predictor" else {"thresholds": [round(t, 6) for t in s.thresholds]}
    return {
        "selection": s.kind, **chooser, "chosen": [round(c, 4) for c in s.chosen],
        "fired": [round(f, 4) for f in s.fired], **_measured_facts(s),
    }  # fmt: skip


def _narrowed_facts(n: Narrowed | None) -> dict[str, Any]:
    """What `info` says of groups that have fewer bits."""
    if n is None:
        return {}
    return {
        "int3_from_group": n.int3, "int2_from_group": n.int2, **_measured_facts(n), "divergence": n.divergence,
    }  # fmt: skip


def _measured_facts(m: Measured) -> dict[str, Any]:
    """What `info` says of a loss."""
    return {
        "held_out_tokens": m.tokens, "perplexity_exact": m.perplexity_exact, "perplexity": m.perplexity,
        "perplexity_loss": m.loss,
    }  # fmt: skip


def _print_families(as_json: bool) -> None:
    try:
        from flashd.pack.families.registry import FAMILIES
    except ImportError as error:
        raise InputMissing(f"the table needs the pack extra ({error.name}): pip install 'flashd[pack]'") from error
    rows = [{"architecture": f.architecture, "models": f.models, "checked": f.checked} for f in FAMILIES.values()]
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(row["models"]) for row in rows)
    for row in rows:
        print(f"{row['architecture']:12} {row['models']:{width}} checked on {row['checked']}")


def run_verify(args: argparse.Namespace) -> None:
    """flashd verify"""
    with Bundle(args.bundle) as bundle, Bar("verifying", "bytes") as bar:
        total = sum(s.length for s in bundle.header.sections)
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar.show(done, total)

        bundle.verify(count)
        runs = len(bundle.checksums)
    facts = {"bundle": str(args.bundle), "bytes": total, "runs": runs, "whole": True}
    print(json.dumps(facts) if args.json else f"{args.bundle}: whole, {runs} runs of {total / MIB:.0f} MiB checked")


def run_plan(args: argparse.Namespace) -> None:
    """flashd plan"""
    from flashd.engine.engine import plan_for

    with Bundle(args.bundle or _default_bundle()) as bundle:
        plan = plan_for(bundle, _budget(args))
    if args.json:
        print(json.dumps(asdict(plan) | {"total": plan.total}))
        return
    for name, size in plan.parts.items():
        print(f"{name:34}{size / MIB:9.1f} MiB")
    print(f"{'in all':34}{plan.total / MIB:9.1f} MiB of {plan.memory / MIB:.0f}")
    print(f"{'smallest that works':34}{plan.smallest / MIB:9.1f} MiB with a context of {plan.context}")
    if plan.whole is not None:
        print(f"{'the whole model stays from':34}{plan.whole / MIB:9.1f} MiB on, and answers many times as fast")
    if plan.resident:
        print("the whole model fits: constant graphs, nothing is read from the card while it answers")
        return
    share = 100 * plan.pinned_share
    print(f"{'neurons pinned':34}{share:9.1f} %")
    if plan.lent_groups:
        print(f"{'while a text is short, up to':34}{share + 100 * plan.lent_groups / plan.groups:9.1f} %")
    print(f"{'card bytes a pass':34}{plan.card_bytes / MIB:9.1f} MiB")


# --- answering --------------------------------------------------------------------------------------------


def run_ask(args: argparse.Namespace) -> int:
    """flashd ask: through the daemon where one runs and nothing else is asked for, else with a model of its own."""
    if appliance.daemon_serves(args):
        return appliance.ask_daemon(args, _prompt_text(args.prompt))
    from flashd.engine.decoding.text import Message
    from flashd.engine.engine import Engine, Prompts
    from flashd.system.child import in_child

    sampling, text = _sampling(args), _prompt_text(args.prompt)
    messages = [Message("system", args.system)] if args.system else []
    with Bundle(args.model or _default_bundle()) as bundle:
        # Freed here, a vocabulary of 151,000 tokens would still leave some 40 MiB behind, in libraries and in
        # holes of the heap; that buys pinned neurons.
        tokens = in_child(lambda: Prompts(bundle).tokens([*messages, Message("user", text)]))
        prefixes = _prefixes(args, bundle)
        with Bar("loading", "layers") as bar, Engine(bundle, _budget(args), bar.show_pass, prefixes) as engine:
            bar.close()
            loaded = time.perf_counter() - STARTED
            code = _say(engine, tokens, sampling, args, loaded=loaded)
            if code == os.EX_OK:
                engine.remember()
            return code


def run_chat(args: argparse.Namespace) -> int:
    """flashd chat: as `ask`, through the daemon or with a model of its own."""
    if args.port is not None or appliance.daemon_serves(args):
        return appliance.chat_with_daemon(args)
    from flashd.engine.decoding.text import Message
    from flashd.engine.engine import Answer, Engine, Prompts

    sampling = _sampling(args)
    with Bundle(args.model or _default_bundle()) as bundle:
        prompts, prefixes = Prompts(bundle), _prefixes(args, bundle)
        with Bar("loading", "layers") as bar, Engine(bundle, _budget(args), bar.show_pass, prefixes) as engine:
            bar.close()

            def answer(turns: Turns) -> str:
                said = Answer()
                _say(engine, prompts.tokens([Message(*turn) for turn in turns]), sampling, args, said)
                return said.text

            talk(args.system, answer)
            engine.remember()
    return os.EX_OK


def _say(
    engine: Any, tokens: list[int], sampling: Any, args: argparse.Namespace, answer: Any = None, loaded: float = 0.0
) -> int:
    """Streams one answer to standard output; Ctrl-C keeps what was said."""
    from flashd.engine.cost import cost
    from flashd.engine.engine import Answer

    answer = answer or Answer()
    code = os.EX_OK
    bar: Bar | None = Bar("thinking", "layers")
    try:
        speech = engine.begin(
            tokens, sampling, answer, limit=_limit(args), stop=args.stop or [],
            ignore_eos=args.ignore_eos, drafts=not args.no_drafts,
        )  # fmt: skip
        pieces = engine.pieces(speech, lambda *step: bar.show_pass(*step) if bar else None)
        for piece in pieces:
            if bar:
                bar.close()
                bar = None
            if not args.json:
                print(for_terminal(piece), end="", flush=True)
    except KeyboardInterrupt:
        answer.figures.finish, code = "interrupted", INTERRUPTED
    finally:
        if bar:
            bar.close()
    figures, finish = cost(engine, answer), answer.figures.finish
    if args.json:
        more = {"load_seconds": loaded, "resident": engine.plan.resident}
        print(as_json(answer.text, finish, figures | more), flush=True)
    else:
        print(flush=True)
        if not args.ignore_eos:
            say_cut(finish)
    if args.stats:
        print(in_words(finish, figures), file=sys.stderr)
    return code


def run_eval(args: argparse.Namespace) -> None:
    """flashd eval"""
    from flashd.engine.engine import Engine, Prompts
    from flashd.engine.evaluate import perplexity
    from flashd.system.child import in_child

    text = _text_of(args.text)
    with Bundle(args.bundle) as bundle:
        tokens = in_child(lambda: Prompts(bundle).plain(text))
        with Bar("reading", "tokens") as bar, Engine(bundle, _budget(args)) as engine:
            result = perplexity(engine.model, tokens, bar.show)
    header = bundle.header
    mode = header.selection.kind if header.selection else "narrow" if header.narrowed else "exact"
    facts = {"mode": mode, **asdict(result)}
    _print_facts(facts, args.json)


def run_bench(args: argparse.Namespace) -> None:
    """flashd bench"""
    from flashd.bench.compare import Bench, check_plot, plot, table

    if args.plot:
        check_plot(args.plot)
    bench = Bench(
        args.bundle, args.gguf, args.prompt, args.tokens, args.repeat, tuple(args.memory), args.threads, args.wrap
    )
    rows = bench.run()
    print(json.dumps([asdict(row) for row in rows]) if args.json else table(rows))
    if args.plot:
        plot(rows, args.plot)


# --- what the commands share ------------------------------------------------------------------------------


def _default_bundle() -> Path:
    """The embedded model's bundle; a child packs it, whose memory is not to count against the budget."""
    from flashd.system.child import in_child

    with Bar("packing the default model, once", "weights") as bar:
        return in_child(lambda: default_model.ensure(bar.show))


def _prefixes(args: argparse.Namespace, bundle: Bundle) -> Any:
    from flashd.engine.cache.prefixes import Prefixes
    from flashd.system.paths import snapshot_folder

    return None if args.no_snapshots else Prefixes(snapshot_folder(), bundle)


def _budget(args: argparse.Namespace) -> Any:
    from flashd.engine.engine import DEFAULT_CONTEXT, Budget
    from flashd.system.memory import parse_size

    context = DEFAULT_CONTEXT if args.context is None else args.context
    if context < 2:
        raise UsageError(f"--context {context} is out of range; allowed is 2 or more")
    if args.threads is not None and not 1 <= args.threads <= MOST_THREADS:
        raise UsageError(f"--threads {args.threads} is out of range; allowed is 1 to {MOST_THREADS}")
    return Budget(parse_size(args.memory) if args.memory else None, context, args.threads)


def _sampling(args: argparse.Namespace) -> Any:
    from flashd.engine.decoding.sampling import Sampling

    if _limit(args) < 1:
        raise UsageError(f"--max-tokens {args.max_tokens} is out of range; allowed is 1 or more")
    return Sampling(
        temperature=args.temperature or 0.0, top_p=1.0 if args.top_p is None else args.top_p,
        top_k=args.top_k, min_p=args.min_p,
        repeat_penalty=args.repeat_penalty, seed=args.seed,
    )  # fmt: skip


def _limit(args: argparse.Namespace) -> int:
    return MOST_TOKENS if args.max_tokens is None else int(args.max_tokens)


def _prompt_text(prompt: str) -> str:
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"the prompt is not UTF-8 (byte {error.start}); send UTF-8 text") from error
    if not checked(prompt).strip():
        raise UsageError('the prompt is empty; ask for example: flashd ask "Why is the sky blue?"')
    return prompt


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):18} {value}")


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flashd", description="Answers prompts with a language model larger than RAM, paged from flash."
    )
    parser.add_argument("--version", action="version", version=f"flashd {flashd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="a GGUF file or a Hugging Face folder -> a bundle")
    pack.add_argument("source", type=Path, metavar="MODEL")
    pack.add_argument("--out", type=Path, required=True, metavar="FILE.flash")
    pack.add_argument("--rows", choices=ROW_KINDS, default="int4", help="bits of a weight (default int4)")
    pack.add_argument(
        "--max-loss", type=float, metavar="X",
        help="by how much perplexity may rise, 0.02 for 2 %%: what matters least has fewer bits (default: exact)",
    )  # fmt: skip
    pack.add_argument(
        "--select", choices=("exact", "narrow", "predictor", "gate"),
        help="how: exact (default), fewer bits (default with --max-loss), or neurons chosen: for ReLU models by a"
        " predictor, in gated ones by their gates, which stay in RAM",
    )  # fmt: skip
    pack.add_argument("--text", type=Path, metavar="T.txt", help="text like that to come, to measure the loss on")
    pack.add_argument("--pre", metavar="NAME", help="how a GGUF's tokenizer splits words, if the file does not say")
    pack.set_defaults(run=run_pack)

    info = commands.add_parser("info", help="what is in a bundle, or which families can be packed")
    info.add_argument("bundle", type=Path, nargs="?", metavar="FILE.flash")
    info.add_argument("--families", action="store_true", help="the model families that can be packed")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=run_info)

    verify = commands.add_parser("verify", help="read a bundle and check every checksum")
    verify.add_argument("bundle", type=Path, metavar="FILE.flash")
    verify.add_argument("--json", action="store_true")
    verify.set_defaults(run=run_verify)

    bench = commands.add_parser("bench", help="measure, beside llama.cpp where --gguf names the same model")
    bench.add_argument("bundle", type=Path, metavar="FILE.flash")
    bench.add_argument("--gguf", type=Path, metavar="MODEL.gguf", help="for the peer; needs the bench extra")
    bench.add_argument("--prompt", default="Explain what a hash table is and when to use one.")
    bench.add_argument("--tokens", type=int, default=16, help="tokens of each answer (default 16)")
    bench.add_argument("--repeat", type=int, default=3, help="runs of which the medians are shown (default 3)")
    bench.add_argument("--memory", metavar="SIZE", nargs="+", default=[], help="flashd's budgets, the largest last")
    bench.add_argument("--threads", type=int, default=2)
    bench.add_argument("--wrap", default="", metavar="COMMAND", help="run every contender under this command")
    bench.add_argument("--json", action="store_true")
    bench.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw it too: .svg, .png or .pdf")
    bench.set_defaults(run=run_bench)

    plan = commands.add_parser("plan", help="what a memory budget buys")
    plan.add_argument("bundle", type=Path, nargs="?", metavar="FILE.flash")
    plan.add_argument("--json", action="store_true")
    _add_budget(plan)
    plan.set_defaults(run=run_plan)

    ask = commands.add_parser("ask", help="answer one prompt")
    ask.add_argument("prompt", help="the prompt; - reads it from standard input")
    _add_answering(ask)
    ask.set_defaults(run=run_ask)

    chat = commands.add_parser("chat", help="talk, a line at a time")
    _add_answering(chat)
    chat.add_argument("--port", type=Path, metavar="DEVICE", help="a console of the daemon on this serial line")
    chat.add_argument("--speed", type=int, default=115200, help="of --port, bits a second (default 115200)")
    chat.set_defaults(run=run_chat)

    appliance.add_commands(commands)

    evaluate = commands.add_parser("eval", help="perplexity of a text")
    evaluate.add_argument("bundle", type=Path, metavar="FILE.flash")
    evaluate.add_argument("--text", type=Path, required=True, metavar="T.txt")
    evaluate.add_argument("--json", action="store_true")
    _add_budget(evaluate)
    evaluate.set_defaults(run=run_eval)
    return parser


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", metavar="SIZE", help="RAM for everything, such as 512M (default: what is free)")
    parser.add_argument("--context", type=int, help="tokens of prompt and answer (default 1024)")
    parser.add_argument("--threads", type=int, help="processors to use (default: all)")


def _add_answering(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FILE.flash", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--system", help="the system prompt")
    where = "; of a daemon: as its configuration says"
    parser.add_argument("--max-tokens", type=int, help=f"(default {MOST_TOKENS}{where})")
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest token (default 0{where})")
    parser.add_argument("--top-p", type=float, help=f"(default 1{where})")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repeat-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text")
    parser.add_argument("--ignore-eos", action="store_true", help="do not end at an end token, to measure")
    parser.add_argument("--no-drafts", action="store_true", help="one token for each pass over the card, to compare")
    parser.add_argument("--no-snapshots", action="store_true", help="keep nothing of the prompt, use nothing kept")
    parser.add_argument("--stats", action="store_true", help="print what the answer cost")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    _add_budget(parser)
