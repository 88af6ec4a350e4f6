"""``negengine evaluate --list``: what there is to choose from, and what is not installed."""

from __future__ import annotations

import importlib.util

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from negengine.evaluate.protocols import PROTOCOLS
from negengine.evaluate.worlds import EMBEDDED
from negengine.metrics.extractors import EXTRACTORS
from negengine.metrics.registry import METRICS

MODULES = {"torchmetrics": "torchmetrics", "torch-fidelity": "torch_fidelity", "lpips": "lpips", "t2v-metrics": "t2v_metrics"}
EXTRACTOR_MODULES = {"dreamsim": "dreamsim", "inception": "torch_fidelity", "clip": "open_clip"}


def show() -> None:
    """Three tables."""
    console = Console()
    whole = Column("metric", no_wrap=True)
    metrics = Table(
        whole, "what it says", "better", "usual extractor", "library", title="Metrics", box=SIMPLE, title_justify="left"
    )
    for metric in METRICS.values():
        library = metric.library or "negengine"
        missing = "" if library not in MODULES or _there(MODULES[library]) else " (not installed)"
        metrics.add_row(metric.name, metric.about, metric.better or "", metric.extractor or "", library + missing)
    console.print(metrics)
    for name in (*EXTRACTORS, *EMBEDDED):
        module = EXTRACTOR_MODULES.get(name)
        missing = "" if module is None or _there(module) else " (its package is not installed)"
        console.print(f"extractor {name}{missing}", highlight=False)
    for name, kind in PROTOCOLS.items():
        console.print(f"protocol {name}: {kind.about}", highlight=False)


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
