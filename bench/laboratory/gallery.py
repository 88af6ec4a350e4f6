"""docs/gallery.html: one file with all its pictures, which is also what keeps them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("gallery.html")
MOST = 4_000_000  # bytes of the page
DATA = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)


def page(told: Mapping[str, Any]) -> str:
    """The page of what :mod:`laboratory.strengths` drew. Raises ValueError if it would be too large."""
    data = json.dumps(told, separators=(",", ":")).replace("</", "<\\/")
    text = TEMPLATE.read_text(encoding="utf-8").replace("DATA", data, 1)
    if len(text.encode()) > MOST:
        raise ValueError(f"the gallery has {len(text.encode()) / 1e6:.1f} MB, more than {MOST / 1e6:g}; draw fewer pictures")
    return text


def data_of(path: Path) -> dict[str, Any]:
    """What a page was made from. Raises ValueError if it is no such page."""
    found = DATA.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} is no gallery")
    return json.loads(found[1])
