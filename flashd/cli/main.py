"""The flashd command: parses what was typed, runs the command, and ends with its exit code."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import assert_never

from flashd.cli import options as o
from flashd.cli.parser import parse
from flashd.errors import INTERRUPTED, FlashdError
from flashd.system.printable import PlainFormatter, plain_output, printable

STARTED = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code, from sysexits.h."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("flashd: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        with redirect_stdout(plain_output()):
            return _run(parse(argv))
    except FlashdError as error:
        print(printable(f"flashd: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.EX_OK


def _run(command: o.Command) -> int:
    """Imports the command's module only now: what another command needs would take RAM that pins neurons."""
    match command:
        case o.Ask():
            from flashd.cli.commands.ask import ask

            return ask(command, STARTED)
        case o.Chat():
            from flashd.cli.commands.ask import chat

            return chat(command)
        case o.Pack():
            from flashd.cli.commands.pack import pack

            pack(command)
        case o.Info():
            from flashd.cli.commands.info import info

            info(command)
        case o.Verify():
            from flashd.cli.commands.info import verify

            verify(command)
        case o.Plan():
            from flashd.cli.commands.plan import plan

            plan(command)
        case o.Eval():
            from flashd.cli.commands.bench import evaluate

            evaluate(command)
        case o.Bench():
            from flashd.cli.commands.bench import bench

            bench(command)
        case o.Models():
            from flashd.cli.commands.models import models

            models(command)
        case o.Use():
            from flashd.cli.commands.models import use

            use(command)
        case o.Rm():
            from flashd.cli.commands.models import rm

            rm(command)
        case o.Serve():
            from flashd.cli.commands.serve import serve

            serve(command)
        case o.CheckConfig():
            from flashd.cli.commands.serve import check_config

            check_config(command)
        case o.Jobs():
            from flashd.cli.commands.jobs import jobs

            jobs(command)
        case o.Show():
            from flashd.cli.commands.jobs import show

            show(command)
        case o.Doctor():
            from flashd.cli.commands.doctor import doctor

            return doctor(command)
        case o.Update():
            from flashd.cli.commands.update import update

            update(command)
        case o.Sign():
            from flashd.cli.commands.update import sign

            sign(command)
        case o.Safe():
            from flashd.cli.commands.board import safe

            safe(command)
        case o.Allow():
            from flashd.cli.commands.board import allow

            allow(command)
        case _:
            assert_never(command)
    return os.EX_OK
