"""flashd ask and flashd chat through the daemon."""

from __future__ import annotations

import os
import sys
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

from flashd.cli.client import Client, socket_path
from flashd.cli.options import Answering, Ask, Chat
from flashd.cli.printing import answer_as_json, cost_in_words, say_cut
from flashd.cli.progress import Waiting
from flashd.cli.talk import Turns, talk
from flashd.cli.tty import as_terminal
from flashd.errors import INTERRUPTED, FlashdError, UsageError
from flashd.system.printable import printable

STOPPED = "interrupted"
"""How an answer ended that Ctrl-C cut short."""


@dataclass
class Said:
    """The daemon's answer as its events come."""

    text: str = ""
    finish: str = ""  # stop, length, context, or STOPPED
    figures: dict[str, float] = field(default_factory=dict)  # with the last event

    def take(self, event: dict[str, Any]) -> str:
        """The text that an event adds."""
        choice = event["choices"][0]
        piece: str = choice["delta"].get("content", "")
        self.text += piece
        if more := event.get("flashd"):
            self.finish, self.figures = more["finish"], more["figures"]
        return piece


def ask(options: Ask, text: str) -> int:
    """Streams the daemon's answer to standard output. Ctrl-C cancels the job."""
    turns = [*([("system", options.system)] if options.system else []), ("user", text)]
    return INTERRUPTED if _say(options, _body(options), turns).finish == STOPPED else os.EX_OK


def chat(options: Chat) -> int:
    """A talk with the daemon, here or on a serial line. It goes on even if the daemon goes away and comes back."""
    body = _body(options) | {"forget": True}
    if options.port is not None and options.own_model:
        raise UsageError(
            f"--port is a console of the daemon, which has a model of its own: leave out {options.own_model[0]}"
        )

    def answer(turns: Turns) -> str | None:
        try:
            return _say(options, body, turns).text
        except UsageError:
            raise
        except FlashdError as error:
            print(printable(f"flashd: {error}"), file=sys.stderr, flush=True)
            return None

    with as_terminal(options.port, options.speed) if options.port is not None else nullcontext():
        talk(options.system, answer)
    return os.EX_OK


def _body(options: Answering) -> dict[str, Any]:
    """What the daemon is asked beside the messages. It answers None with what its configuration says."""
    if options.top_k or options.min_p or options.repeat_penalty != 1:
        raise UsageError(
            "the daemon takes --temperature, --top-p and --seed only; add --model to use --top-k, --min-p or"
            " --repeat-penalty"
        )
    return {
        "max_tokens": options.max_tokens, "temperature": options.temperature, "top_p": options.top_p,
        "seed": options.seed, "stop": options.stop or None,
    }  # fmt: skip


def _say(options: Answering, body: dict[str, Any], turns: Turns) -> Said:
    """Streams the daemon's answer to standard output, or prints it whole with --json."""
    said = Said()
    messages = [{"role": role, "content": text} for role, text in turns]
    with closing(Waiting()) as waiting:
        try:
            with closing(Client(socket_path())) as client:
                for event in client.ask({**body, "messages": messages}, waiting.show):
                    piece = said.take(event)
                    if piece and not options.json:
                        waiting.close()
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            said.finish = STOPPED
        except FlashdError:
            if said.text and not options.json:
                print(flush=True)
            raise
    if options.json:
        print(answer_as_json(said.text, said.finish, said.figures), flush=True)
    else:
        print(flush=True)
        say_cut(said.finish)
    if options.stats and said.figures:
        print(cost_in_words(said.finish, said.figures), file=sys.stderr)
    return said
