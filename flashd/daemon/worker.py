"""The one thread that runs the engine: takes jobs, answers them, says how it went."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from flashd.config import Answering
from flashd.daemon.job import Job, Request, State
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.engine.engine import Answer, Engine, Prompts
from flashd.engine.sample import Constraint, Sampling
from flashd.engine.schema import Schemas
from flashd.engine.text import Message
from flashd.errors import FlashdError, UsageError

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""How long the worker waits for a job before it shows that it still could take one."""

FORGET = 8
"""Messages that a long talk is shortened by: so many, that what is left begins alike for some questions and its
KV cache is kept."""

PROGRESS_SECONDS = 0.25
"""Progress is told this often at the most."""


class _Interrupted(Exception):
    """The running job is cancelled, too late, in the way of a more urgent one, or the daemon stops."""


@dataclass(frozen=True)
class Totals:
    """What all answers since the start came to."""

    jobs: int = 0
    tokens: int = 0
    reused_tokens: int = 0
    card_bytes: int = 0
    seconds: float = 0.0


class Worker:
    """Answers jobs one after the other until it is stopped."""

    def __init__(
        self, jobs: Jobs, engine: Engine, prompts: Prompts, schemas: Schemas | None, answering: Answering,
        notify: Notifier,
    ) -> None:  # fmt: skip
        self.answering = answering
        self.last: dict[str, float] = {}
        self.totals = Totals()
        self._jobs, self._engine, self._prompts, self._notify = jobs, engine, prompts, notify
        self._stopping = threading.Event()
        self._schemas = schemas
        self._told = 0.0
        self._thread = threading.Thread(target=self._run, name="worker")
        engine.bundle.patience.while_waiting = self._while_waiting

    @property
    def engine(self) -> Engine:
        return self._engine

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Puts the running job back into the queue and ends within a layer's time."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        said = ""
        while not self._stopping.is_set():
            self._notify.alive()
            self._notify.status("idle")
            try:
                job = self._jobs.take(IDLE_SECONDS)
            except FlashdError as error:
                # the spool's disk is full or gone: what waits there goes on waiting
                if str(error) != said:
                    log.error("%s", error)
                said = str(error)
                self._stopping.wait(IDLE_SECONDS)
                continue
            said = ""
            if job is None:
                self._engine.remember()
                continue
            self._notify.status(f"answering {job}")
            self._answer(job)
        self._engine.remember(leaving=True)

    def _while_waiting(self) -> None:
        """A read waits for a card that is gone: no hang, but no reason to keep anybody who has given up."""
        self._notify.alive()
        self._notify.status("waiting for the card")
        job = self._jobs.running
        if self._stopping.is_set() or (job is not None and not self._jobs.wanted(job)):
            raise _Interrupted

    def _answer(self, job: Job) -> None:
        answer, started = Answer(), time.monotonic()
        before = self._engine.model.card.bytes_read
        try:
            self._run_job(job, answer)
            state, finish = State.DONE, answer.figures.finish
        except _Interrupted:
            state, finish = State.CANCELLED, "cancelled"
        except FlashdError as error:
            log.error("%s failed: %s", job, error)
            state, finish = State.FAILED, str(error)
        except Exception as error:
            log.exception("%s failed", job)
            state, finish = State.FAILED, f"an error in flashd: {type(error).__name__}: {error}"
        self._note(job, answer, started, before)
        if state is State.CANCELLED and (self._stopping.is_set() or self._jobs.preempted(job)):
            self._jobs.put_back(job)
        else:
            self._jobs.finish(job, state, finish)

    def _run_job(self, job: Job, answer: Answer) -> None:
        request = job.request
        if not self._jobs.wanted(job):
            raise _Interrupted
        prompt, sampling = self._prompt(request), self._sampling(request)

        def on_step(done: int, total: int, card_bytes: int) -> None:
            self._notify.alive()
            self._notify.status(f"answering {job}")
            if self._stopping.is_set() or not self._jobs.wanted(job):
                raise _Interrupted
            if not job.result.text and time.monotonic() - self._told > PROGRESS_SECONDS:
                self._told = time.monotonic()
                self._jobs.progress(job, done, total, card_bytes)

        if request.choose:
            decision = self._engine.choose(prompt, self._prompts.choices(request.choose), sampling, answer, on_step)
            job.result.probabilities = decision.probabilities
            self._jobs.say(job, decision.text)
            return
        pieces = self._engine.answer(
            prompt, sampling, answer, limit=self._limit(request), stop=request.stop,
             constraint=self._constraint(request), on_step=on_step,
        )  # fmt: skip
        for piece in pieces:
            if piece:
                self._jobs.say(job, piece)
        if request.json_schema is not None and answer.figures.finish == "length":
            raise FlashdError("the answer was cut before its JSON was whole; raise max_tokens")

    def _prompt(self, request: Request) -> list[int]:
        if request.plain:
            return self._prompts.plain("".join(turn.content for turn in request.turns))
        messages = [Message(turn.role, turn.content) for turn in request.turns]
        return self._shortened(messages, request) if request.forget else self._prompts.tokens(messages)

    def _shortened(self, messages: list[Message], request: Request) -> list[int]:
        """The tokens of a talk without its oldest messages where they leave no room for an answer."""
        context = self._engine.plan.context
        room = context - min(self._limit(request), context // 2)
        first = 1 if messages[0].role == "system" else 0
        tokens = self._prompts.tokens(messages)
        while len(tokens) > room and len(messages) - first > 1:
            del messages[first : min(first + FORGET, len(messages) - 1)]
            tokens = self._prompts.tokens(messages)
        return tokens

    def _limit(self, request: Request) -> int:
        return request.max_tokens or self.answering.max_tokens

    def _sampling(self, request: Request) -> Sampling:
        a, d = self.answering, request.draw
        return Sampling(
            temperature=a.temperature if d.temperature is None else d.temperature,
            top_p=a.top_p if d.top_p is None else d.top_p,
            top_k=a.top_k, min_p=a.min_p, repeat_penalty=a.repeat_penalty, seed=d.seed,
        )  # fmt: skip

    def _constraint(self, request: Request) -> Constraint | None:
        if request.json_schema is None:
            return None
        if self._schemas is None:
            raise UsageError("answers by a schema are off; set schemas: true in flashd.yaml")
        return self._schemas.compile(request.json_schema)

    def _note(self, job: Job, answer: Answer, started: float, before: int) -> None:
        """Keeps what the answer cost."""
        f, seconds = answer.figures, time.monotonic() - started
        read = self._engine.model.card.bytes_read - before + f.snapshot_bytes
        job.result.figures = self.last = {
            "prompt_tokens": f.prompt_tokens + f.reused_tokens, "reused_tokens": f.reused_tokens, "tokens": f.tokens,
            "seconds": seconds, "first_token_seconds": f.first_token_seconds,
            "decode_tokens_per_second": f.decode_rate, "card_bytes": read,
            "card_bytes_per_token": f.decode_card_bytes / max(1, f.tokens - 1),
            "window_hit_rate": self._engine.model.hit_rate,
        }  # fmt: skip
        t = self.totals
        self.totals = Totals(
            t.jobs + 1, t.tokens + f.tokens, t.reused_tokens + f.reused_tokens, t.card_bytes + read,
            t.seconds + seconds,
        )  # fmt: skip
