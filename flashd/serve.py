"""flashd serve: start-up order, signals, reload and a clean stop."""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from starlette.applications import Starlette
from starlette.routing import Route

from device import demo as demonstration
from device import kiosk
from device.appliance import Appliance, check
from device.controls import Controls, Facts
from flashd.bundle.file import Patience
from flashd.bundle.reader import Bundle
from flashd.config.settings import Settings, load
from flashd.daemon import last_run
from flashd.daemon.http.admission import CLIENTS
from flashd.daemon.http.api import Api
from flashd.daemon.http.server import Server
from flashd.daemon.jobs import Jobs
from flashd.daemon.metrics import metrics_text
from flashd.daemon.notify import Notifier, log_to_journal
from flashd.daemon.spool import Spool, held_alone
from flashd.daemon.worker import Worker
from flashd.engine.decoding.schemas import Schemas
from flashd.engine.engine import Budget, Engine, Prompts
from flashd.errors import ConfigError, FlashdError, MemoryTaken, MemoryTooSmall
from flashd.pack import default_model
from flashd.system.memory import MIB, parse_size, peak
from flashd.system.paths import snapshot_folder

log = logging.getLogger(__name__)

NEEDS_RESTART = (
    "model",
    "draft",
    "memory",
    "context",
    "threads",
    "arithmetic",
    "kv",
    "card",
    "schemas",
    "snapshots",
    "api",
    "spool",
    "serial",
    "hearing",
)
"""What a reload does not change."""


class _Stopped(Exception):
    """A signal to stop came before the model was loaded."""


class Daemon:
    """One run of the daemon, from its settings to its last signal.

    Args:
        settings: the configuration.
        reread: gives the configuration anew, for SIGHUP.
        more: gives routes beside the API's and the kiosk's. Only the demo has some.
    """

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        more: Callable[[Controls], list[Route]] | None = None,
    ) -> None:
        self._settings, self._reread, self._more = settings, reread, more
        self._notify = Notifier()
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stopping = False
        self._worker: Worker | None = None

    def run(self, when_ready: Callable[[], None]) -> None:
        """Serves until SIGTERM or SIGINT. Raises FlashdError where it cannot start."""
        before = os.umask(0o007)  # prompts and answers are for the service and its group, whoever starts it
        try:
            self._run(when_ready)
        except _Stopped:
            log.info("stopped before the model was loaded")
        finally:
            os.umask(before)

    def _run(self, when_ready: Callable[[], None]) -> None:
        s = self._settings
        if not s.model and not default_model.bundle_path().exists():
            log.info("packing the default model, once; this takes a minute or two")
        bundle_path = Path(s.model) if s.model else default_model.ensure_apart(lambda done, total: None)
        with ExitStack() as stack:
            self._take_signals(stack)
            spool_path = Path(s.spool.path)
            stack.enter_context(held_alone(spool_path))
            last = stack.enter_context(last_run.watched(spool_path))
            server = Server(Path(s.api.socket), s.api.loopback, s.api.network.port if s.api.network else None)
            stack.callback(server.close)
            spool = Spool(spool_path, s.spool.keep)
            stack.callback(spool.close)
            jobs = Jobs(spool, s.spool.most_waiting, last.died)
            last.noted()
            appliance = Appliance(s, jobs, self._facts)
            stack.callback(appliance.close)
            bundle = stack.enter_context(Bundle(bundle_path, Patience(s.card.wait)))
            self._name = bundle.header.model.name
            prompts = Prompts(bundle)
            # before the engine, whose plan counts what is held already
            schemas = Schemas(bundle) if s.schemas else None
            draft = stack.enter_context(Bundle(Path(s.draft))) if s.draft else None
            engine = stack.enter_context(self._load(bundle, draft))
            self._worker = Worker(jobs, engine, prompts, schemas, s.answer, self._notify)
            self._worker.start()
            stack.callback(self._worker.stop)
            server.start(self._application(jobs, appliance, self._worker))
            stack.callback(server.stop)
            stack.callback(appliance.close)
            appliance.open()
            stack.callback(jobs.close)
            self._notify.ready()
            log.info("ready: %s in %.0f of %.0f MiB", self._name, peak() / MIB, engine.plan.memory / MIB)
            when_ready()
            self._wait(appliance)
            self._notify.stopping()
            log.info("stopping")

    def _load(self, bundle: Bundle, draft: Bundle | None) -> Engine:
        s = self._settings

        def on_step(done: int, total: int, _: int) -> None:
            if self._stopping:
                raise _Stopped
            self._notify.alive()
            self._notify.status(f"loading {100 * done // total} %")

        self._notify.status("loading")
        budget = budget_of(s, parse_size(s.memory) if s.memory else None)
        try:
            snapshots = snapshot_folder() if s.snapshots else None
            return Engine(bundle, budget, on_step, snapshots, draft, self._notify.alive)
        except MemoryTooSmall as error:
            if s.memory is not None:
                raise ConfigError(f"memory: {too_small(s.memory, error)}") from error
            # what takes it may be gone at the next try
            need = -(-error.smallest // MIB)
            raise MemoryTaken(f"too little memory is free: {error.what} needs {need}M at the least") from error

    def _application(self, jobs: Jobs, appliance: Appliance, worker: Worker) -> Starlette:
        metrics = metrics_text(jobs, worker)
        api = Api(
            jobs, self._name, appliance.status, appliance.start, metrics,
            lambda request, answers: worker.fitting(appliance.equipped(request), answers),
        )  # fmt: skip
        more = self._more(appliance) if self._more else []
        wanted = self._settings.api
        network = kiosk.network(wanted.network, socket.gethostname()) if wanted.network else None
        if network:
            log.info(
                "the page is on the local network, at http://%s:%d/, behind its PIN; nothing of it is encrypted",
                network.names[-1], network.port,
            )  # fmt: skip
        return api.application([*kiosk.routes(appliance), *more], wanted.loopback_jobs, network)

    def _facts(self) -> Facts:
        """What the appliance's status says of the model and its last answer."""
        demo = self._more is not None
        if self._worker is None:
            return Facts(demo=demo)
        plan = self._worker.engine.plan
        share = 100 if plan.resident else int(100 * plan.pinned_share)
        model = {
            "name": self._name, "context": f"{plan.context} tokens",
            "memory": f"{peak() / MIB:.0f} of {plan.memory / MIB:.0f} MiB", "neurons in RAM": f"{share} %",
        }  # fmt: skip
        return Facts(model=model, last=self._worker.last, demo=demo)

    def _take_signals(self, stack: ExitStack) -> None:
        """A handler only notes the signal: the main thread acts on it when it is in a state to."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before = signal.signal(number, self._note_signal)
            stack.callback(signal.signal, number, before)

    def _note_signal(self, number: int, _: FrameType | None) -> None:
        self._stopping = self._stopping or number != signal.SIGHUP
        self._signals.put(number)

    def _wait(self, appliance: Appliance) -> None:
        while self._next_signal() == signal.SIGHUP:
            self._notify.reloading()
            self._reload(appliance)
            self._notify.ready()

    def _next_signal(self) -> int:
        # in slices: a Python that waits without end in a lock does not run signal handlers
        while True:
            try:
                return self._signals.get(timeout=0.5)
            except queue.Empty:
                continue

    def _reload(self, appliance: Appliance) -> None:
        try:
            settings = self._reread()
            appliance.reload(settings)
        except FlashdError as error:
            log.error("not reloaded, all is as it was: %s", error)
            return
        if self._worker is not None:
            self._worker.answering = settings.answer
        kept = [key for key in NEEDS_RESTART if getattr(settings, key) != getattr(self._settings, key)]
        log.info("reloaded" + (f"; {', '.join(kept)} will change with a restart" if kept else ""))


def budget_of(settings: Settings, memory: int | None) -> Budget:
    """What the engine may use of so many bytes; the service's clients and what hears have their share beside it."""
    beside = {"clients": CLIENTS} | ({"hearing": settings.hearing.held} if settings.hearing else {})
    return Budget(memory, settings.context, settings.threads, settings.arithmetic, beside, settings.kv)


def too_small(memory: str, error: MemoryTooSmall, more: int = 0) -> str:
    """That a configuration's `memory` is too small; with `more` bytes it is enough for what is not counted yet."""
    return f"{memory} is too small for {error.what}; the smallest that works is {-(-(error.smallest + more) // MIB)}M"


def serve(path: Path) -> None:
    """Runs the daemon that a file describes. Raises FlashdError where it cannot start."""
    log_to_journal()
    faulthandler.enable()  # a lost watchdog's SIGABRT writes down where each thread hangs
    settings = load(path, check)
    Daemon(settings, lambda: load(path, check)).run(lambda: None)


def serve_demo(screen: demonstration.Screen) -> None:
    """Runs the daemon with no board, in a folder that is gone afterwards, and shows on a screen what happens."""
    log_to_journal()
    screen.take_log()
    with tempfile.TemporaryDirectory(prefix="flashd-demo-", dir=os.environ.get("XDG_RUNTIME_DIR")) as folder:
        demo = demonstration.Demo(Path(folder), screen)
        try:
            Daemon(demo.settings, lambda: demo.settings, demo.routes).run(demo.ready)
        finally:
            demo.close()
