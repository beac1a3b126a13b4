"""The model that a command loads by itself: which bundle, how much RAM, and what is kept of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flashd.cli.options import CONTEXT, Budgeted
from flashd.cli.progress import Bar

if TYPE_CHECKING:
    from flashd.bundle.reader import Bundle
    from flashd.engine.engine import Budget
    from flashd.engine.planning.draft import Pair
    from flashd.engine.planning.plan import Plan


PACKING = 24 * 3600, 8 << 30, True
"""Limits of a child that packs a model: seconds of processor time, bytes, and that it may write to the terminal."""


def default_bundle() -> Path:
    """The bundle of the small model that comes with flashd. It is packed at the first use."""
    from flashd.pack import default_model

    with Bar("packing the default model, once", "weights") as bar:
        return default_model.ensure_apart(bar.show)


def bundle_of(model: Path | None) -> Path:
    """The bundle to load. A model file or folder is packed at the first use, and again when it has changed."""
    from flashd.cli import bundles
    from flashd.system.child import Limits, in_child

    if model is None:
        return default_bundle()
    if not bundles.is_model(model):
        return model
    path = bundles.packed_path(model)
    if not bundles.is_current(path, model):
        with Bar(f"packing {model.name}, once", "weights") as bar:
            in_child(lambda: bundles.pack_into_cache(model, bar.show), Limits(*PACKING))
    return path


@contextmanager
def draft_of(draft: Path | None) -> Iterator[Bundle | None]:
    """The open bundle of a draft, packed at its first use like a model. None if there is none."""
    if draft is None:
        yield None
        return
    from flashd.bundle.reader import Bundle

    with Bundle(bundle_of(draft)) as bundle:
        yield bundle


def plan_for_answers(bundle: Bundle, budget: Budget) -> Plan:
    """What a budget buys for `flashd ask`. Raises MemoryTooSmall."""
    return plans_for_answers(bundle, budget).taken


def plans_for_answers(bundle: Bundle, budget: Budget, draft: Bundle | None = None) -> Pair:
    """What a budget buys for `flashd ask`, without a draft and with it. Raises MemoryTooSmall, DataError.

    A plan counts the RAM that this process holds. So what `ask` has loaded has to be loaded here too. Else the
    least that works would be a few MiB less than `ask` needs.
    """
    import flashd.cli.commands.ask
    import flashd.engine.cache.prefixes
    import flashd.system.child  # noqa: F401
    from flashd.engine.engine import plans_for

    return plans_for(bundle, budget, draft)


def budget(options: Budgeted) -> Budget:
    """What the command may use."""
    from flashd.engine.engine import Budget

    context = CONTEXT if options.context is None else options.context
    return Budget(options.memory, context, options.threads, options.arithmetic, kv=options.kv)
