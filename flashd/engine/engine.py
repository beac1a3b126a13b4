"""The engine as the command line and the daemon see it: it opens a bundle under a budget and answers prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.bundle.token_bytes import TokenBytes
from flashd.engine.cache.prefixes import Prefixes
from flashd.engine.decoding.conversation import Conversation
from flashd.engine.decoding.decisions import Choices, Decision, decide
from flashd.engine.decoding.drafting.draft_model import DraftModel
from flashd.engine.decoding.line import Figures, Line
from flashd.engine.decoding.reasoning.channels import ChannelWords, answering, without_thoughts, words
from flashd.engine.decoding.reasoning.thoughts import Said, Thoughts, tag_that_closes
from flashd.engine.decoding.sampling import Constraint, Sampler, Sampling, Score
from flashd.engine.decoding.text import ChatTemplate, Detokenizer, Message, StopStrings, TextTokenizer
from flashd.engine.decoding.tools.calls import Calling, Tool, text_of
from flashd.engine.decoding.tools.formats import GENERIC, CallFormat, harmony, learnt, plain_talk
from flashd.engine.decoding.tools.grammar import Speaking, speaking
from flashd.engine.forward.paged import PagedModel
from flashd.engine.forward.resident import ResidentModel
from flashd.engine.model.contract import Model, OnStep, silent
from flashd.engine.paging.card_speed import remembered
from flashd.engine.planning.draft import Pair, check_draft, plan_draft
from flashd.engine.planning.plan import Plan, make_plan, rates_of
from flashd.engine.planning.rates import ASSUMED, expected, remembered_rates
from flashd.errors import DataError, UsageError
from flashd.graphs.constant import Arithmetic
from flashd.graphs.rounding import KvFormat
from flashd.system.memory import available_memory, resident_now

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Budget:
    """What the user allows. None means as much as there is."""

    memory: int | None = None  # bytes
    context: int = DEFAULT_CONTEXT  # tokens
    threads: int | None = None
    arithmetic: Arithmetic | None = None  # see make_plan
    beside: Mapping[str, int] = field(default_factory=dict)  # bytes of a service beside the model, by what for
    kv: KvFormat = "float32"  # how keys and values are kept


class Prompts:
    """Turns messages into tokens. It holds the tokenizer, which takes tens of megabytes for a large vocabulary."""

    def __init__(self, bundle: Bundle) -> None:
        text = bundle.header.text
        self._tokenizer = TextTokenizer(bundle.read("tokenizer"), text.bos, text.add_bos, text.eos)
        self._template = ChatTemplate(text.chat_template) if text.chat_template else None
        self._channels = text.channels

    def tokens(
        self, messages: Sequence[Message], room: int | None = None, calling: Calling | None = None,
        think: bool = False,
    ) -> list[int]:  # fmt: skip
        """The tokens of the prompt that asks for the next answer.

        Args:
            messages: the conversation so far.
            room: the most tokens that the caller can use. A text of many more is refused before it takes memory.
            calling: the tools that the answer may call.
            think: whether the model may think before it answers, if it is one that does.

        Raises DataError if the chat template fails, PromptTooLong if the text is longer than `room`.
        """
        if room is not None:
            called = [call.arguments for m in messages for call in m.calls]
            self._tokenizer.check_length([*(m.content for m in messages), *called, text_of(calling)], room)
        if self._channels:
            messages = [replace(m, content=without_thoughts(m.content)) for m in messages]
        tools = calling.tools if calling else ()
        if (tools or any(m.calls or m.role == "tool" for m in messages)) and not self.calls_format.native:
            messages, tools = plain_talk(messages, calling, self.calls_format), ()
        if self._template is None:
            return self._tokenizer.encode_plain("\n".join(m.content for m in messages))
        tokens = self._template.encode(messages, self._tokenizer, tools, think)
        if think or (calling and self.calls_format.words):  # the answer says itself in which channel it is
            return tokens
        return answering(tokens, self._channels)

    @cached_property
    def calls_format(self) -> CallFormat:
        """How the model writes calls of tools."""
        template, t = self._template, self._tokenizer
        if template is None:
            return GENERIC

        def render(messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: bool = True) -> str:
            return template.render(messages, t.bos_token, t.eos_token, t.unk_token, tools=tools, prompt=prompt)

        return harmony(render, t.ends) if self._channels else learnt(render, t.ends)

    def speaking(self, calling: Calling) -> Speaking:
        """How an answer is made that may call tools."""
        return speaking(calling, self.calls_format, self._tokenizer.pieces, self._tokenizer.spelt)

    def choices(self, texts: Sequence[str], room: int | None = None) -> Choices:
        """The tokens of each text, as an answer that is this text begins with them. `room` is that of `tokens`."""
        if room is not None:
            for text in texts:
                self._tokenizer.check_length([text], room)
        return {text: self._tokenizer.encode_answer(text) for text in texts}

    def plain(self, text: str, room: int | None = None) -> list[int]:
        """The tokens of a text as it stands, without a chat template. `room` is that of `tokens`."""
        if room is not None:
            self._tokenizer.check_length([text], room)
        return self._tokenizer.encode(text)


def plan_for(bundle: Bundle, budget: Budget, draft: Bundle | None = None) -> Plan:
    """The plan that an engine opened now would obey. Raises MemoryTooSmall; DataError for what cannot be a draft."""
    return plans_for(bundle, budget, draft).taken


def plans_for(bundle: Bundle, budget: Budget, draft: Bundle | None = None) -> Pair:
    """What a budget buys without a draft and with it. Raises what `plan_for` raises."""
    memory = budget.memory or available_memory()
    context = min(budget.context, bundle.header.model.context)
    threads = budget.threads or len(os.sched_getaffinity(0))
    if draft is not None:
        check_draft(bundle, draft)
    small = None if draft is None else plan_draft(draft, context, threads)
    often, base = rates_of(bundle), resident_now()
    alone, beside = (
        partial(
            make_plan, bundle.header, memory=memory, context=context, threads=threads, base=base,
            beside=budget.beside, rates=often, arithmetic=budget.arithmetic, kv=budget.kv, draft=one,
        )
        for one in (None, small)
    )  # fmt: skip
    return Pair.of(alone, beside if small else None, partial(rate_of, bundle))


def rate_of(bundle: Bundle, plan: Plan) -> float:
    """The tokens a second to expect of a plan, by what was measured on this machine and its card before."""
    card = remembered(bundle.path)
    rates = remembered_rates(bundle.header, plan) or ASSUMED
    return expected(plan, rates, card.bandwidth if card else None)


@dataclass
class Answer:
    """One answer as it grows."""

    text: str = ""
    thoughts: str = ""  # what the model thought before
    figures: Figures = field(default_factory=Figures)


class Speech:
    """An answer in progress. It gives complete characters only and ends before a stop string.

    Several may be in progress at once.
    """

    def __init__(
        self, line: Line, sampler: Sampler, answer: Answer, words: Detokenizer | ChannelWords, stop: Sequence[str],
        thoughts: Thoughts | None,
    ) -> None:  # fmt: skip
        self.line, self._sampler = line, sampler
        self._scored: list[Score] = []  # those of tokens whose text is held back
        self._shown: list[Score] = []
        self._answer, self._words, self._stops = answer, words, StopStrings(list(stop))
        self._thoughts = thoughts  # None: all that comes is the answer
        self._whole = False

    @property
    def done(self) -> bool:
        return self.line.done

    def stop(self) -> None:
        """Ends the answer here: the caller wants no more of it."""
        self.line.done = self._whole = True

    def push(self, token: int) -> list[Said]:
        """Takes the next token and returns what can be shown now."""
        if self._sampler.score is not None:
            self._scored.append(self._sampler.score)
        text, told = self._words.push(token), []
        for said in self._thoughts.push(text) if self._thoughts else [Said(text)]:
            if said.thought:
                told.append(self._thought(said))
                continue
            shown, stopped = self._stops.push(said.text)
            told.append(self._said(shown))
            if stopped:
                self._answer.figures.finish = "stop"
                self.stop()
                break
        return told

    def rest(self) -> list[Said]:
        """What was held back, to be shown when the answer has ended. Later calls return nothing."""
        if self._whole:
            return []
        self._whole = True
        cut = self._answer.figures.finish != "stop"
        text, told, rest = self._words.finish(cut), [], ""
        for said in [*self._thoughts.push(text), *self._thoughts.finish()] if self._thoughts else [Said(text)]:
            if said.thought:
                told.append(self._thought(said))
            else:
                rest += self._stops.push(said.text)[0]
        return [*told, self._said(rest + self._stops.finish())]

    def _thought(self, said: Said) -> Said:
        self._answer.thoughts += said.text
        self._scored = []
        return said

    def _said(self, text: str) -> Said:
        self._answer.text += text
        self._show_scores(text)
        return Said(text)

    def scores(self) -> list[Score]:
        """The scores of the tokens whose text has been shown since the last call."""
        shown, self._shown = self._shown, []
        return shown

    def _show_scores(self, text: str) -> None:
        """What a token says is scored when its text is shown. Tokens of a stop string never are."""
        if text:
            self._shown += self._scored
            self._scored = []


class Engine:
    """A loaded model. Use it in a with statement, or close it.

    Args:
        bundle: an open bundle. The caller closes it.
        budget: how much memory, context and how many threads the engine may use.
        on_step: is told how far loading has come.
        snapshots: a folder that keeps what prompts often begin with, see Conversation.remember. None keeps nothing.
        draft: the open bundle of a small model that makes guesses, if that is faster. The caller closes it.
        on_part: is called when a part of a snapshot is on the card.

    Raises MemoryTooSmall before it loads anything large; DataError, CardError while it loads and answers.
    """

    def __init__(
        self, bundle: Bundle, budget: Budget, on_step: OnStep = silent, snapshots: Path | None = None,
        draft: Bundle | None = None, on_part: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.bundle = bundle
        plans = plans_for(bundle, budget, draft)
        self.plan = plans.taken
        if plans.why_not:
            log.warning("the draft is not used: %s", plans.why_not)
        self.token_bytes = TokenBytes.from_bytes(bundle.read("token_bytes"))
        if len(self.token_bytes) < bundle.header.model.vocabulary:
            raise DataError(f"{bundle.path}: fewer token texts than tokens; pack it again")
        kind = ResidentModel if self.plan.resident else PagedModel
        self.model: Model = kind(bundle, self.plan, on_step)
        small = None
        if draft is not None and self.plan.draft is not None:
            try:
                small = DraftModel(draft, self.plan.draft, bundle.header.model.vocabulary, on_step)
            except BaseException:
                self.model.close()
                raise
        prefixes = Prefixes(snapshots, bundle, self.plan, on_part) if snapshots else None
        self._conversation = Conversation(self.model, prefixes, small)
        self._speeches: list[Speech] = []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.model.close()

    def remember(self, leaving: bool = False) -> None:
        """Writes to the card that part of the last prompt which is likely to come again.

        If `leaving`, a chat is written in full, since its next turn will begin with it. Call this when nobody waits
        for an answer.
        """
        self._conversation.remember(leaving)

    def begin(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        answer: Answer,
        *,
        limit: int,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        drafts: bool = True,
        constraint: Constraint | None = None,
        scores: int | None = None,
        session: str | None = None,
        shown: Mapping[int, bytes] | None = None,
        thinks: bool = True,
    ) -> Speech:
        """Starts an answer. Other answers may be in progress: ask `fits` first. Call `end` when it is done.

        Args:
            prompt: the tokens of the prompt.
            answer: is filled as the answer grows, with complete characters only.
            limit: the most tokens that the answer may have.
            stop: the answer ends before the first of these strings.
            ignore_eos: go on behind the model's own end tokens.
            drafts: check several guessed tokens a pass, if the model gains by it.
            constraint: a grammar that says which tokens may come.
            session: the talk that it belongs to, which `remember` keeps on the card.
            scores: so many of the likeliest tokens are in the score of each token. None: there are no scores.
            shown: the bytes of some tokens in this answer, such as of control tokens, which otherwise have none.
            thinks: whether thoughts are told from the answer. Not so if the prompt is plain text.

        Raises UsageError for a prompt that is empty or too long.
        """
        sampler, channels = Sampler(sampling, constraint, scores), self.bundle.header.text.channels
        if constraint and not shown:
            prompt = answering(prompt, channels)
        line = self._conversation.begin(
            prompt, sampler, limit=limit, eos=() if ignore_eos else self.bundle.header.text.eos,
            figures=answer.figures, drafts=drafts, session=session,
        )  # fmt: skip
        thoughts = Thoughts(tag_that_closes(prompt, self.token_bytes)) if thinks else None
        speech = Speech(line, sampler, answer, words(self.token_bytes, channels, shown), stop, thoughts)
        self._speeches.append(speech)
        return speech

    def pieces(self, speech: Speech, on_step: OnStep = silent) -> Iterator[Said]:
        """What is said in the only answer in progress, piece by piece. The answer is ended when this returns.

        Raises CardError, DataError.
        """
        try:
            while not speech.done:
                with closing(self.go_on(on_step)) as pieces:
                    for _, piece in pieces:
                        yield piece
        finally:
            self.end(speech)

    def fits(self, prompt: Sequence[int], limit: int) -> bool:
        """Whether one more answer may join those in progress."""
        return self._conversation.fits(prompt, limit)

    def go_on(self, on_step: OnStep = silent) -> Generator[tuple[Speech, Said]]:
        """Runs one pass for all answers in progress and yields what each gains. Close the generator.

        Raises CardError, DataError. The answers are then as they were before the pass and may go on.
        """
        by_line = {speech.line: speech for speech in self._speeches}
        with closing(self._conversation.go_on(on_step)) as said:
            for line, token in said:
                for part in by_line[line].push(token):
                    yield by_line[line], part
        for speech in self._speeches:
            for part in speech.rest() if speech.done else []:
                yield speech, part

    def end(self, speech: Speech) -> None:
        """Takes an answer out of those in progress. Do not call it within a pass."""
        self._speeches.remove(speech)
        self._conversation.end(speech.line)

    def choose(
        self, prompt: Sequence[int], choices: Choices, sampling: Sampling, answer: Answer, on_step: OnStep = silent
    ) -> Decision:
        """Draws one of `choices` as the answer and returns it with the probability of each.

        Raises UsageError for a prompt that is too long or for choices that `decide` refuses; CardError, DataError.
        """
        ends = self.bundle.header.text.eos
        if not ends:
            raise UsageError("the model has no token that ends an answer, so it cannot choose")
        prompt = answering(prompt, self.bundle.header.text.channels)

        def logits(said: Sequence[int]) -> Floats:
            return self._conversation.logits([*prompt, *said], answer.figures, on_step)

        decision = decide(logits, choices, ends[0], sampling.temperature, sampling.seed)
        answer.text, answer.figures.finish = decision.text, "stop"
        answer.figures.tokens = len(choices[decision.text])
        return decision
