"""The one thread that runs the engine: takes jobs, answers them, some together, says how it went."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from flashd.bundle.header import Drawing
from flashd.config.settings import Answering
from flashd.daemon.job import Job, Request, Scored, State
from flashd.daemon.jobs import Jobs
from flashd.daemon.notify import Notifier
from flashd.daemon.talks import Talks
from flashd.daemon.whole import lacking, schemas_of
from flashd.engine.cost import cost
from flashd.engine.decoding.reasoning.thoughts import Said
from flashd.engine.decoding.sampling import Constraint, Sampling, greedy_unless, sampling_of
from flashd.engine.decoding.schemas import HELD_BY_ANSWERS, Schemas, held_by_answer, held_by_schemas
from flashd.engine.decoding.tools.grammar import Speaking
from flashd.engine.decoding.tools.listener import Listener
from flashd.engine.engine import Answer, Engine, Prompts, Speech
from flashd.errors import BadField, DataError, FlashdError, InputMissing, UsageError

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""How long the worker waits for a job before it shows that it still could take one."""

MOST_SCORES = 4096
"""Probabilities of tokens that a client may ask for at once."""

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


@dataclass
class _Running:
    """A job that is answered."""

    job: Job
    before: int  # bytes of the card that were read until it began
    answer: Answer = field(default_factory=Answer)
    started: float = field(default_factory=time.monotonic)
    speech: Speech | None = None  # None for a decision
    listener: Listener | None = None  # of an answer that may call tools
    over: bool = False  # it has ended, and only the pass that it was in goes on


class Worker:
    """Answers jobs until it is stopped: several share a pass where the model and the context allow."""

    def __init__(
        self, jobs: Jobs, engine: Engine, prompts: Prompts, schemas: Schemas | None, answering: Answering,
        notify: Notifier,
    ) -> None:  # fmt: skip
        self.answering = answering
        self.last: dict[str, float] = {}
        self.totals = Totals()
        self._jobs, self._engine, self._prompts, self._notify = jobs, engine, prompts, notify
        self._stopping = threading.Event()
        self._schemas, self._making = schemas, threading.Lock()
        self._talks = Talks(prompts, engine.plan.context - 1, lambda: self.answering)
        self._running: list[_Running] = []
        self._asked: tuple[Job, list[int]] | None = None  # the job looked at last, and its prompt
        self._counted = engine.model.card.bytes_read
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
            self._begin(job)
            while self._running:
                self._begin_others()
                self._attempt(self._pass, self._running)
        self._engine.remember(leaving=True)

    def _while_waiting(self) -> None:
        """A read waits for a card that is gone: no hang, but no reason to keep anybody who has given up."""
        self._notify.alive()
        self._notify.status("waiting for the card")
        self._let_go()

    def _begin(self, job: Job) -> None:
        """Begins an answer; a decision is made at once."""
        running = _Running(job, self._engine.model.card.bytes_read)
        self._running.append(running)
        self._attempt(lambda: self._start(running), [running])

    def _start(self, running: _Running) -> None:
        self._let_go()
        request = running.job.asked
        prompt, sampling = self._prompt_of(running.job), self._sampling(running.job)
        if request.choose:
            self._choose(running, prompt, sampling)
            self._finish(running, State.DONE, running.answer.figures.finish)
            return
        speaking = self._speaking(request)
        running.listener = Listener(speaking.calls_format, speaking.blocks) if speaking else None
        running.speech = self._engine.begin(
            prompt, sampling, running.answer, limit=self._talks.limit(request), stop=request.stop,
            constraint=self._constraint(request, speaking), scores=request.logprobs,
            session=request.session,
            shown=speaking.shown if speaking else None, thinks=not request.plain,
        )  # fmt: skip

    def _choose(self, running: _Running, prompt: list[int], sampling: Sampling) -> None:
        job = running.job
        choices = self._prompts.choices(job.request.choose)
        decision = self._engine.choose(prompt, choices, sampling, running.answer, self._on_step)
        job.result.probabilities = decision.probabilities
        self._jobs.say(job, decision.text)

    def _begin_others(self) -> None:
        """Takes those next in the queue beside the jobs that run, as long as there is room."""
        try:
            while (job := self._jobs.next) is not None and self._joins(job) and self._jobs.take_beside(job):
                self._begin(job)
        except FlashdError as error:
            log.error("%s", error)  # the spool's: what waits there goes on waiting

    def _joins(self, job: Job) -> bool:
        """Whether a job may be answered beside those that run; an urgent one that barged in is not held up."""
        if self._stopping.is_set() or any(self._jobs.preempted(r.job) for r in self._running):
            return False  # those that run make way at the next step, and this one would with them
        asked, running = job.asked, [r.job.asked for r in self._running]
        held = [held_by_answer(*schemas) for r in (asked, *running) if (schemas := schemas_of(r))]
        if schemas_of(asked) and sum(held) > HELD_BY_ANSWERS:
            return False
        if job.request.choose or any(r.barge_in and r.priority > job.request.priority for r in running):
            return False
        try:
            return self._engine.fits(self._prompt_of(job), self._talks.limit(asked))
        except Exception:  # noqa: BLE001 - whatever it is, this thread must not end
            return True  # it fails in words of its own, and holds nobody up

    def _pass(self) -> None:
        """One pass for all that runs."""
        with closing(self._engine.go_on(self._on_step)) as pieces:
            for speech, said in pieces:
                self._say(speech, said)
        for running in self._running:
            if running.speech is not None and running.speech.done:
                if running.listener is not None and not running.over and (held := running.listener.finish()):
                    self._jobs.say(running.job, held)
                self._finish(running, State.DONE, running.answer.figures.finish)
        self._let_go()

    def _attempt(self, work: Callable[[], None], whose: Sequence[_Running]) -> None:
        """Works for some jobs, which end where that fails; an interruption ends those that are not wanted."""
        names = ", ".join(str(r.job) for r in whose)
        try:
            work()
        except _Interrupted:
            for running in whose:
                if self._stopping.is_set() or not self._jobs.wanted(running.job):
                    self._finish(running, State.CANCELLED, "cancelled")
                elif running.speech is None:  # nothing would go on with a decision that broke off
                    running.over = True
                    self._jobs.put_back(running.job)
        except FlashdError as error:
            log.error("%s failed: %s", names, error)
            for running in whose:
                running.job.result.refused = isinstance(error, UsageError)
                running.job.result.param = error.param if isinstance(error, BadField) else None
            self._fail(whose, str(error))
        except Exception as error:
            log.exception("%s failed", names)
            self._fail(whose, f"an error in flashd: {type(error).__name__}: {error}")
        self._forget_ended()

    def _fail(self, whose: Sequence[_Running], why: str) -> None:
        for running in whose:
            self._finish(running, State.FAILED, why)

    def _say(self, speech: Speech, said: Said) -> None:
        running = next(r for r in self._running if r.speech is speech)
        if not said.text or running.over:
            return
        if said.thought:
            self._jobs.think(running.job, said.text)
            return
        for part in running.listener.push(said.text) if running.listener else [said.text]:
            if isinstance(part, str):
                self._jobs.say(running.job, part, self._scored(speech))
            else:
                self._jobs.call(running.job, part)

    def _scored(self, speech: Speech) -> tuple[Scored, ...]:
        """The tokens of the text that is shown now, if the job asks for them."""
        text = self._engine.token_bytes
        return tuple(
            Scored(text[s.token], s.logprob, tuple((text[token], logprob) for token, logprob in s.top))
            for s in speech.scores()
        )

    def _on_step(self, done: int, total: int, card_bytes: int) -> None:
        self._notify.alive()
        self._notify.status("answering " + ", ".join(str(r.job) for r in self._running))
        self._let_go()
        if time.monotonic() - self._told > PROGRESS_SECONDS:
            self._told = time.monotonic()
            for running in self._running:
                if not running.job.result.text:
                    self._jobs.progress(running.job, done, total, card_bytes)

    def _let_go(self) -> None:
        """Ends jobs that nobody wants. Raises _Interrupted where the pass is for nobody else, or in the way."""
        unwanted = [r for r in self._running if not r.over and not self._jobs.wanted(r.job)]
        alone = len(unwanted) == sum(not r.over for r in self._running)
        if self._stopping.is_set() or (unwanted and (alone or any(self._jobs.preempted(r.job) for r in unwanted))):
            raise _Interrupted
        for running in unwanted:
            self._finish(running, State.CANCELLED, "cancelled")

    def _finish(self, running: _Running, state: State, finish: str) -> None:
        """Ends a job, once."""
        if running.over:
            return
        running.over, job = True, running.job
        if running.speech is not None:
            running.speech.stop()
        lacks = lacking(job.asked, job.result, finish, running.listener) if state is State.DONE else None
        if lacks:
            if finish != "stop":  # the same would come of it again
                job.result.refused, job.result.param = True, "max_tokens" if finish == "length" else "messages"
            state, finish, job.result.calls = State.FAILED, lacks, ()
        self._note(running)
        if state is State.CANCELLED and (self._stopping.is_set() or self._jobs.preempted(job)):
            self._jobs.put_back(job)
        else:
            self._jobs.finish(job, state, finish)

    def _forget_ended(self) -> None:
        """Lets the engine go on without those that have ended. Not within a pass."""
        for running in [r for r in self._running if r.over]:
            self._running.remove(running)
            if running.speech is not None:
                self._engine.end(running.speech)

    def fitting(self, request: Request, answers: int = 1) -> Request:
        """The request without the messages that are to be forgotten, if it can be answered. For any thread.

        `answers`: so many requests its client makes at once.

        Raises UsageError, which says why it cannot be answered; DataError.
        """
        request = self._talks.fitting(request)
        vocabulary = self._engine.bundle.header.model.vocabulary
        if (last := max(request.draw.logit_bias, default=0)) >= vocabulary:
            raise BadField("logit_bias", f"there is no token {last}; the last one is {vocabulary - 1}")
        if request.logprobs is not None:
            most = MOST_SCORES // (request.logprobs + 1) // answers
            if min(self._talks.limit(request), self._talks.room) > most:
                raise BadField("max_tokens", f"with these logprobs allowed is 1 to {most} an answer")
        try:
            self._constraint(request, self._speaking(request))
        except (UsageError, DataError, InputMissing) as error:
            raise BadField(
                "tools" if request.calling else "response_format", str(error), "unsupported_value"
            ) from error
        return request

    def _prompt_of(self, job: Job) -> list[int]:
        """Its tokens, made once: one that waits for room is looked at before each pass."""
        if self._asked is None or self._asked[0] is not job:
            left_out, tokens = self._talks.tokens(job.asked, self._notify.alive)
            job.result.forgotten = job.request.forgotten + left_out
            self._asked = job, tokens
        return self._asked[1]

    def _sampling(self, job: Job) -> Sampling:
        a, d = self.answering, job.request.draw
        # one that is interrupted says the same when it begins anew, and who was told a part of it gets the rest
        seed = int(job.created * 1e6) + job.id if d.seed is None else d.seed
        wished = Drawing(
            temperature=a.temperature if d.temperature is None else d.temperature,
            top_p=a.top_p if d.top_p is None else d.top_p,
            top_k=a.top_k if d.top_k is None else d.top_k,
            min_p=a.min_p if d.min_p is None else d.min_p,
            repeat_penalty=a.repeat_penalty if d.repeat_penalty is None else d.repeat_penalty,
        )  # fmt: skip
        calls = job.request.calling is not None and job.request.calling.required
        decides = calls or job.request.choose or job.request.json_schema is not None
        drawn = greedy_unless(wished) if decides else sampling_of(wished, self._engine.bundle.header.text.drawing)
        return replace(
            drawn, seed=seed, frequency_penalty=d.frequency_penalty, presence_penalty=d.presence_penalty,
            logit_bias=d.logit_bias,
        )  # fmt: skip

    def _speaking(self, request: Request) -> Speaking | None:
        """What it takes to make an answer that may call tools. None if it may not."""
        return self._prompts.speaking(request.calling) if request.calling else None

    def _constraint(self, request: Request, speaking: Speaking | None) -> Constraint | None:
        if request.calling is not None and speaking is not None:
            return self._grammars().compile_calls(request.calling.callable, speaking.grammar)
        return None if request.json_schema is None else self._grammars().compile(request.json_schema)

    def _grammars(self) -> Schemas:
        """Made at the first answer that needs them, if the plan has left room.

        Raises UsageError, DataError, InputMissing.
        """
        with self._making:
            if self._schemas is None:
                plan, need = self._engine.plan, held_by_schemas(self._engine.bundle)
                if plan.total + need > plan.memory:
                    raise UsageError(
                        f"the grammar of a schema or of tools needs {need >> 20} MiB of RAM, and the plan leaves"
                        f" {(plan.memory - plan.total) >> 20}; set schemas: true in flashd.yaml, which plans for it"
                    )
                self._schemas = Schemas(self._engine.bundle)
            return self._schemas

    def _note(self, running: _Running) -> None:
        """Keeps what the answer cost; what jobs read of the card together counts for each, and once in all."""
        f, seconds = running.answer.figures, time.monotonic() - running.started
        card = self._engine.model.card.bytes_read
        running.job.result.figures = self.last = {
            **cost(self._engine, running.answer), "seconds": seconds,
            "card_bytes": card - running.before + f.snapshot_bytes,
        }  # fmt: skip
        t = self.totals
        self.totals = Totals(
            t.jobs + (not running.job.has_calls), t.tokens + f.tokens, t.reused_tokens + f.reused_tokens,
            t.card_bytes + card - self._counted + f.snapshot_bytes, t.seconds + seconds,
        )  # fmt: skip
        self._counted = card
