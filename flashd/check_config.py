"""Whether the service would start with a configuration: what it would say, before anybody starts it."""

from __future__ import annotations

from pathlib import Path

from device import appliance
from device.hearing import by_sherpa, listener
from flashd import serve
from flashd.bundle.reader import Bundle
from flashd.config.hearing import Sherpa
from flashd.config.settings import Settings
from flashd.engine.decoding.schemas import Schemas
from flashd.engine.engine import Prompts, plan_for
from flashd.engine.planning.draft import check_draft
from flashd.errors import FlashdError, InputMissing, MemoryTooSmall, Misfit
from flashd.pack import default_model
from flashd.system.memory import MIB, parse_size
from flashd.system.paths import SERVICE

STARTED = 2 * MIB
"""What the service holds beside when it plans: its queue, its devices, the threads of both."""


def check(settings: Settings) -> None:
    """Looks at templates, at the bundle and at what it needs of `memory`. Raises Misfit.

    This module has imported what the service imports, so that this process holds what the service would hold.
    """
    appliance.check(settings)
    _check_recogniser(settings)
    path = bundle_path(settings)
    if not path.exists() or path.suffix == ".gguf":  # a card that is not in yet; a model that is not packed yet
        return
    try:
        with Bundle(path) as bundle:
            _check_memory(settings, bundle)
            _check_draft(settings, bundle)
    except Misfit:
        raise
    except FlashdError as error:
        raise Misfit(("model",), str(error)) from error


def _check_recogniser(settings: Settings) -> None:
    """Whether what is to hear and understand speech is there. The service starts without it all the same."""
    if settings.hearing is None:
        return
    part = "recogniser"
    try:
        if isinstance(settings.hearing.recogniser, Sherpa):
            by_sherpa.made_of(settings.hearing.recogniser)
        part = "listener"
        if settings.hearing.listener is not None:
            listener.made_of(settings.hearing.listener, ())
    except InputMissing as error:
        raise Misfit(("hearing", part), str(error)) from error


def bundle_path(settings: Settings) -> Path:
    """The bundle that the service would answer with."""
    if settings.model:
        return Path(settings.model)
    own = default_model.bundle_path()
    services = SERVICE / "flashd" / own.name
    return services if services.exists() else own


def least_memory(settings: Settings, bundle: Bundle) -> int:
    """The smallest `memory` with which the service answers. Raises FlashdError."""
    held = _held(settings, bundle)
    plan = plan_for(bundle, serve.budget_of(settings, 1 << 40))
    del held
    return plan.least + STARTED


def _check_memory(settings: Settings, bundle: Bundle) -> None:
    try:
        held = _held(settings, bundle)
    except FlashdError as error:
        raise Misfit(("schemas",) if settings.schemas else ("model",), str(error)) from error
    if settings.memory is None:  # what is free when it starts
        return
    try:
        plan_for(bundle, serve.budget_of(settings, parse_size(settings.memory) - STARTED))
    except MemoryTooSmall as error:
        raise Misfit(("memory",), serve.too_small(settings.memory, error, STARTED)) from error
    del held


def _check_draft(settings: Settings, bundle: Bundle) -> None:
    if settings.draft is None or not Path(settings.draft).exists():  # it may be on a card that is not in yet
        return
    try:
        with Bundle(Path(settings.draft)) as draft:
            check_draft(bundle, draft)
    except FlashdError as error:
        raise Misfit(("draft",), str(error)) from error


def _held(settings: Settings, bundle: Bundle) -> list[object]:
    """What the service holds of a bundle when it plans."""
    return [Prompts(bundle), *([Schemas(bundle)] if settings.schemas else [])]
