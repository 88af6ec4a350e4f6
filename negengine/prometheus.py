"""Counters of what the methods did, for Prometheus. ``pip install prometheus-client``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from negengine.diffusers.observers import observe
from negengine.diffusers.report import Status

LABELS = ("method", "family")
COUNTERS = {  # name without "negengine_" and "_total" -> help, and the field of a report that is added, if it has it
    "steps": ("Denoising steps of runs with the method.", "steps"),
    "active_steps": ("Denoising steps in which the method was active.", "active_steps"),
    "eligible_tokens": ("Tokens that had a reference (NegToMe).", "eligible_tokens"),
    "merged_tokens": ("Tokens that were pushed away from their match (NegToMe).", "merged_tokens"),
    "clamped_updates": ("Updates of the posterior that met its bounds (DNG).", "clamped"),
    "unusable_updates": ("Updates of the posterior that were not a number (DNG).", "unusable"),
}


def export(registry: Any = None) -> Callable[[], None]:
    """Count every run in this process.

    ``negengine_runs_total``, of these ``negengine_idle_runs_total`` (a run that the method did not change) and
    ``negengine_failed_runs_total``, and the counters of :data:`COUNTERS`, each with the labels ``method`` and ``family``.

    Args:
        registry: a ``prometheus_client.CollectorRegistry``; the library's own if None.

    Returns:
        A function that ends it and takes the counters off the registry; called again it does nothing.

    Raises:
        ImportError: no ``prometheus_client``. ValueError: the registry has such counters already; nothing has been changed then.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise ImportError("negengine.prometheus needs the package prometheus-client: pip install prometheus-client") from error
    registry = registry or prometheus_client.REGISTRY

    def counter(name: str, text: str) -> Any:
        return prometheus_client.Counter(f"negengine_{name}", text, LABELS, registry=registry)

    try:
        runs = counter("runs", "Runs of a pipeline with the method.")
    except ValueError as error:
        raise ValueError(
            "this registry has counters of negengine already; call the function that the first export returned, or export to "
            "another prometheus_client.CollectorRegistry"
        ) from error
    idle = counter("idle_runs", "Of these, runs that the method did not change.")
    failed = counter("failed_runs", "Of these, runs that an error ended or refused.")
    counters = [(field, counter(name, text)) for name, (text, field) in COUNTERS.items()]

    def count(status: Status) -> None:
        for name, report in status.as_dict().items():
            labels = name, report["family"]
            runs.labels(*labels).inc()
            idle.labels(*labels).inc(report["idle_reason"] is not None)
            failed.labels(*labels).inc(report["stage"] == "failed")
            for field, found in counters:
                if field in report:
                    found.labels(*labels).inc(report[field])

    end = observe(count)
    exported = [runs, idle, failed, *(found for _, found in counters)]

    def stop() -> None:
        end()
        while exported:
            registry.unregister(exported.pop())

    return stop
