"""flashd ask and flashd chat: the daemon answers if it runs and nothing else is asked for, else an own model does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from flashd.cli.options import Answering, Ask, Chat
from flashd.cli.own_model import budget, bundle_of, draft_of
from flashd.cli.progress import Bar
from flashd.cli.talking.desks import Pipe, checked, desk
from flashd.cli.talking.said import STOPPED, Aside, Said, print_end
from flashd.cli.talking.talk import Talk, Turns
from flashd.errors import INTERRUPTED, DataError, UsageError
from flashd.system.paths import snapshot_folder, socket_path

if TYPE_CHECKING:
    from flashd.bundle.reader import Bundle
    from flashd.engine.decoding.sampling import Sampling
    from flashd.engine.engine import Answer, Engine


def ask(options: Ask, started: float) -> int:
    """Answers one prompt. `started`: when the process began, by time.perf_counter."""
    text = _prompt(options.prompt)
    if daemon_answers(options):
        from flashd.cli.commands import ask_daemon

        return ask_daemon.ask(options, text)
    from flashd.bundle.reader import Bundle
    from flashd.engine.decoding.apart import tokens_apart
    from flashd.engine.decoding.text import Message
    from flashd.engine.engine import Prompts

    said, pipe = Said(), Pipe()
    messages = [Message("system", options.system)] if options.system else []
    with Bundle(bundle_of(options.model)) as bundle:
        sampling = _sampling(options, bundle)
        messages.append(Message("user", text))
        think = bool(options.think)
        tokens = tokens_apart(bundle.path, lambda: Prompts(bundle).tokens(messages, think=think))
        with _loaded(bundle, options) as engine:
            loaded = time.perf_counter() - started
            pipe.answer(said, lambda: _say(engine, tokens, sampling, options, said, pipe.say))
            if options.json:
                said.figures |= {"load_seconds": loaded, "resident": engine.plan.resident}
            print_end(options, said)
            if not said.stopped:
                engine.remember()
    return INTERRUPTED if said.stopped else os.EX_OK


def chat(options: Chat) -> int:
    """Talks until the person ends it."""
    if options.port is not None or daemon_answers(options):
        from flashd.cli.commands import ask_daemon

        return ask_daemon.chat(options)
    if options.resume is not None:
        raise UsageError("--resume needs the daemon, which keeps the talk: start it, and give no --model")
    from flashd.bundle.reader import Bundle
    from flashd.engine.decoding.forgetting import shortened
    from flashd.engine.decoding.text import Message
    from flashd.engine.engine import Prompts

    with Bundle(bundle_of(options.model)) as bundle:
        sampling = _sampling(options, bundle)
        prompts = Prompts(bundle)
        with _loaded(bundle, options) as engine:
            room = engine.plan.context - 1

            def answer(turns: Turns, said: Said) -> None:
                messages = [Message(*turn) for turn in turns]
                encode = partial(prompts.tokens, think=bool(options.think))
                said.forgotten, tokens = shortened(messages, encode, room, options.limit)
                _say(engine, tokens, sampling, options, said, here.say)

            with desk(at_once=False) as here:
                Talk(here, options, answer).run()
            engine.remember()
    return os.EX_OK


@contextmanager
def _loaded(bundle: Bundle, options: Answering) -> Iterator[Engine]:
    """An engine of this process's own. A bar shows how far loading has come."""
    from flashd.engine.engine import Engine

    snapshots = None if options.no_snapshots else snapshot_folder()
    with (
        Bar("loading", "layers") as bar, draft_of(options.draft) as draft,
        Engine(bundle, budget(options), bar.show_pass, snapshots, draft) as engine,
    ):  # fmt: skip
        bar.close()
        yield engine


def daemon_answers(options: Answering) -> bool:
    """Whether the daemon is to answer: it runs, and no option asks for a model or a budget of this process's own."""
    if not socket_path().exists():
        return False
    own = options.own_model
    if own and not options.model:
        print(
            f"flashd: the daemon is not asked because of {own[0]}; a second model is loaded beside it",
            file=sys.stderr,
        )
    return not own


def _say(
    engine: Engine, tokens: list[int], sampling: Sampling, options: Answering, said: Said, show: Callable[[str], None]
) -> None:
    """Shows one answer piece by piece. Ctrl-C ends it and keeps what was said."""
    from flashd.engine.cost import cost
    from flashd.engine.engine import Answer

    answer = Answer()
    try:
        _stream(engine, tokens, sampling, options, answer, said, show)
    except KeyboardInterrupt:
        said.stopped, answer.figures.finish = True, STOPPED
    said.text, said.thoughts, said.finish = answer.text, answer.thoughts, answer.figures.finish
    said.figures = cost(engine, answer)


def _stream(
    engine: Engine, tokens: list[int], sampling: Sampling, options: Answering, answer: Answer, said: Said,
    show: Callable[[str], None],
) -> None:  # fmt: skip
    """Shows the pieces of an answer as they come. Until the first one there is a bar."""
    speech = engine.begin(
        tokens, sampling, answer, limit=options.limit, stop=options.stop, ignore_eos=options.ignore_eos,
        drafts=not options.no_drafts,
    )  # fmt: skip
    aside = Aside(options)
    with Bar("thinking", "layers") as bar:

        def on_step(done: int, layers: int, card_bytes: int) -> None:
            if said.stopped:  # here the engine is in a state that the next answer can go on from
                raise KeyboardInterrupt
            bar.show_pass(done, layers, card_bytes)

        for part in engine.pieces(speech, on_step):
            if part.thought:
                aside.say(part.text, bar.close)
                continue
            bar.close()
            aside.end()
            if not options.json:
                said.shown = True
                show(part.text)


def _sampling(options: Answering, bundle: Bundle) -> Sampling:
    from flashd.bundle.header import Drawing
    from flashd.engine.decoding.sampling import sampling_of

    wished = Drawing(
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, min_p=options.min_p,
        repeat_penalty=options.repeat_penalty,
    )  # fmt: skip
    return sampling_of(wished, bundle.header.text.drawing, options.seed)


def _prompt(prompt: str) -> str:
    """The prompt as text, read from standard input if it is '-'. Raises DataError, UsageError."""
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"the prompt is not UTF-8 (byte {error.start}); send UTF-8 text") from error
    if not checked(prompt).strip():
        raise UsageError('the prompt is empty; ask for example: flashd ask "Why is the sky blue?"')
    return prompt
