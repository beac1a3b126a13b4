"""flashd ask and flashd chat through the daemon."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

from flashd.cli.client import Client
from flashd.cli.options import Answering, Ask, Chat
from flashd.cli.progress import Waiting
from flashd.cli.talking.desks import Pipe, desk
from flashd.cli.talking.said import STOPPED, Aside, Said, print_end
from flashd.cli.talking.talk import MOST_PRESETS, Talk, Turns, Welcome
from flashd.cli.talking.tty import as_terminal
from flashd.errors import INTERRUPTED, FlashdError, UsageError
from flashd.system.paths import socket_path

WELCOME_SECONDS = 2.0
"""How long the first prompt waits for the title and the questions to show."""


def ask(options: Ask, text: str) -> int:
    """Streams the daemon's answer to standard output. Ctrl-C cancels the job."""
    turns = [*([("system", options.system)] if options.system else []), ("user", text)]
    said, pipe = Said(), Pipe()
    pipe.answer(said, lambda: _say(options, _body(options), turns, said, pipe.say))
    print_end(options, said)
    return INTERRUPTED if said.stopped else os.EX_OK


def chat(options: Chat) -> int:
    """A talk with the daemon, here or on a serial line. It goes on even if the daemon goes away and comes back."""
    body = _body(options) | {"forget": True}
    if options.port is not None and options.own_model:
        raise UsageError(
            f"--port is a console of the daemon, which has a model of its own: leave out {options.own_model[0]}"
        )

    with (
        as_terminal(options.port, options.speed) if options.port is not None else nullcontext(),
        desk(at_once=True) as here,
    ):
        kept = _Kept(options.resume)

        def answer(turns: Turns, said: Said) -> None:
            _say(options, body | kept.body, kept.new(turns), said, here.say)
            kept.answered(said)

        Talk(here, options, answer, _welcome, kept.reset).run()
    return os.EX_OK


class _Kept:
    """A talk that the daemon keeps: it is sent what is new. Without a name nothing is kept, and all is sent."""

    def __init__(self, name: str | None) -> None:
        self._name, self._anew = name, False

    def reset(self) -> None:
        """It begins anew."""
        self._anew = True

    def answered(self, said: Said) -> None:
        if said.text:
            self._anew = False

    @property
    def body(self) -> dict[str, Any]:
        if self._name is None:
            return {}
        return {"session": self._name, "new_session": self._anew}

    def new(self, turns: Turns) -> Turns:
        """What the daemon does not know yet."""
        if self._name is None:
            return turns
        return [turn for turn in turns[:-1] if turn[0] == "system"] + turns[-1:]


def _welcome() -> Welcome:
    """The daemon's title and questions; nothing of it while it does not answer."""
    try:
        with closing(Client(socket_path())) as client:
            status = client.status(WELCOME_SECONDS)
    except FlashdError:
        return Welcome()
    return Welcome(status["title"], tuple(status["presets"][:MOST_PRESETS]))


def _body(options: Answering) -> dict[str, Any]:
    """What the daemon is asked beside the messages. It answers None with what its configuration says."""
    if any(given is not None for given in (options.top_k, options.min_p, options.repeat_penalty)):
        raise UsageError(
            "the daemon takes --temperature, --top-p and --seed only; add --model to use --top-k, --min-p or"
            " --repeat-penalty"
        )
    think = {} if options.think is None else {"chat_template_kwargs": {"enable_thinking": options.think}}
    return think | {
        "max_tokens": options.max_tokens, "temperature": options.temperature, "top_p": options.top_p,
        "seed": options.seed, "stop": options.stop or None,
    }  # fmt: skip


def _say(options: Answering, body: dict[str, Any], turns: Turns, said: Said, show: Callable[[str], None]) -> None:
    """Shows the daemon's answer piece by piece, or prints it whole with --json."""
    messages, aside = [{"role": role, "content": text} for role, text in turns], Aside(options)
    with closing(Waiting()) as waiting:
        try:
            with closing(Client(socket_path())) as client:
                for event in client.ask({**body, "messages": messages}, waiting.show):
                    piece, thought = _take(event, said)
                    if thought:
                        aside.say(thought, waiting.close)
                    if piece and not options.json:
                        waiting.close()
                        aside.end()
                        said.shown = True
                        show(piece)
        except KeyboardInterrupt:
            said.stopped, said.finish = True, STOPPED


def _take(event: dict[str, Any], said: Said) -> tuple[str, str]:
    """What an event adds to an answer, and to the thoughts before it."""
    delta = event["choices"][0]["delta"]
    piece, thought = delta.get("content", ""), delta.get("reasoning_content", "")
    said.text += piece
    said.thoughts += thought
    if more := event.get("flashd"):
        said.finish, said.figures, said.forgotten = more["finish"], more["figures"], more["forgotten"]
    return piece, thought
