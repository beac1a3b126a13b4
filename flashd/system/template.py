"""Templates that others wrote: a bundle's for chats, the configuration's for triggers.

Jinja's sandbox keeps a template from objects that are not its own. It does not keep it from running or growing
without end: two nested loops over a range, a text times a number, a field of a billion characters. That happens in C
code, which cannot be counted, and in part while Jinja compiles. So a template is compiled and rendered in a child
process that the kernel limits. This takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flashd.errors import DataError
from flashd.system.child import ChildDied, Limits, Result, in_child

LIMITS = Limits(seconds=4, memory=32 << 20)
"""The templates of models take milliseconds on a small board, and a few times the memory of their text."""

LONGEST_REASON = 300
"""The most characters of an error's text: some errors quote the template."""

ERRORS = (
    jinja2.TemplateError, SyntaxError,
    TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError,
)  # fmt: skip
"""What a sandboxed template can raise."""


class TemplateFails(DataError):
    """A text is not a template, or it cannot be rendered. The error says why, but does not name the template."""


@dataclass(frozen=True)
class Template:
    """A template. This process holds only its text: it is compiled and rendered in child processes."""

    source: str
    longest: int  # the most characters that it may make
    options: Mapping[str, Any] = field(default_factory=dict)  # of Jinja's environment
    filters: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def names(self) -> set[str]:
        """The variables that it uses and does not define. Raises TemplateFails if it is not a template."""

        def names() -> set[str]:
            environment = self._environment()
            tree = environment.parse(self.source)
            environment.from_string(tree)
            return {*jinja2.meta.find_undeclared_variables(tree)}

        return _within_limits(names)

    def render(self, values: Mapping[str, Any]) -> str:
        """The text that it makes of `values`. Raises TemplateFails."""
        return self.render_each([values])[0]

    def render_each(self, every: Sequence[Mapping[str, Any]]) -> list[str]:
        """The texts that it makes of some values, all in one child. Raises TemplateFails if one of them fails."""

        def texts() -> list[str]:
            template = self._environment().from_string(self.source)
            return [self._checked(template.render(values)) for values in every]

        return _within_limits(texts)

    def _checked(self, made: str) -> str:
        if len(made) > self.longest:
            raise TemplateFails(f"it makes {len(made)} characters; at most {self.longest} are allowed")
        return made

    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(**self.options)
        environment.filters |= self.filters
        environment.globals |= self.functions
        return environment


def _within_limits(action: Callable[[], Result]) -> Result:
    def tried() -> Result:
        try:
            return action()
        except ERRORS as error:
            raise TemplateFails(" ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__) from error

    try:
        return in_child(tried, LIMITS)
    except ChildDied:
        raise TemplateFails(f"it takes more than {LIMITS}") from None
