"""The daemon's figures as Prometheus text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flashd.daemon.jobs import Jobs
from flashd.daemon.worker import Worker
from flashd.system.memory import peak, resident_now


class _Figures(Collector):
    def __init__(self, jobs: Jobs, worker: Worker) -> None:
        self._jobs, self._worker = jobs, worker

    def collect(self) -> Iterator[Metric]:
        totals, last, plan = self._worker.totals, self._worker.last, self._worker.engine.plan
        yield CounterMetricFamily("flashd_jobs", "Jobs that were run", totals.jobs)
        yield CounterMetricFamily("flashd_tokens", "Tokens that were said", totals.tokens)
        yield CounterMetricFamily("flashd_reused_tokens", "Prompt tokens that were kept", totals.reused_tokens)
        yield CounterMetricFamily("flashd_card_bytes", "Bytes read from the card for jobs", totals.card_bytes)
        yield CounterMetricFamily("flashd_busy_seconds", "Seconds spent on jobs", totals.seconds)
        yield GaugeMetricFamily("flashd_waiting_jobs", "Jobs that wait", self._jobs.waiting)
        yield GaugeMetricFamily("flashd_resident_bytes", "RAM that the daemon holds", resident_now())
        yield GaugeMetricFamily("flashd_peak_bytes", "The most RAM that it ever held", peak())
        yield GaugeMetricFamily("flashd_memory_budget_bytes", "RAM that it may hold", plan.memory)
        for name in ("first_token_seconds", "decode_tokens_per_second", "window_hit_rate"):
            yield GaugeMetricFamily(f"flashd_last_{name}", f"The last job's {name}", last.get(name, 0.0))


def metrics_text(jobs: Jobs, worker: Worker) -> Callable[[], bytes]:
    """A function that gives the text of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(jobs, worker))
    return lambda: generate_latest(registry)
