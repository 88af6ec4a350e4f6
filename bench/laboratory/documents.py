"""What is written from the results: the plots and the tables of docs/evidence.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import plots

PLOTS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Path], None]]] = {
    "diversity": ("a", plots.diversity),
    "removal": ("c", plots.removal),
    "posterior": ("c", plots.posterior),
}
TABLES = Path(__file__).resolve().parent.parent / "tables.py"


def write(results: Path, docs: Path, usual: bool) -> None:
    """Every plot whose part is there; and the tables, if these are the results that they show.

    Args:
        usual: whether the results are those of the repository.
    """
    for name, (part, plot) in PLOTS.items():
        file = results / f"{part}.json"
        if file.exists():
            docs.mkdir(parents=True, exist_ok=True)
            plot(json.loads(file.read_text()), docs / f"evidence-{name}.png")
    if usual:
        subprocess.run([sys.executable, str(TABLES)], check=True)
