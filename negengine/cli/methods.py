"""``negengine methods``: what there is to choose from."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from negengine.methods import KINDS

# name -> what it does to the picture, what it needs
ABOUT = {
    "negtome": ("makes the images of a prompt differ, or keeps them away from a given picture", "--count 2 or more, or a picture"),
    "dng": (
        "keeps an image away from a prompt, the more the nearer it comes",
        "--avoid TEXT; most samplers: dng.surrogate=ancestral",
    ),
    "negative-prompting": ("keeps an image away from a prompt, always as much", "--avoid TEXT"),
    "sld": ("keeps parts of an image away from a concept; unsafe content if none is named", "guidance above 1; FLUX: sld:dng"),
    "nag": ("keeps an image away from a prompt, also in few-step models", "--avoid TEXT; FLUX: no true CFG"),
    "cads": ("makes images differ by noise in the prompt that fades", "FLUX: no true CFG"),
    "seed-variance": ("makes images differ by noise in the prompt at first", "FLUX: no true CFG"),
    "interval": ("guides only at middling noise: richer, less saturated images", "interval.low, interval.high; not FLUX"),
    "dnp": ("finds the negative prompt by asking the model", "`negengine negative`; guidance above 1"),
}


def methods() -> None:
    """What each method does to the picture, its presets, and what it needs."""
    table = Table("method", "what it does to the picture", "presets", "needs")
    for name, kind in KINDS.items():
        table.add_row(name, ABOUT[name][0], ", ".join(kind.presets) if name != "dnp" else "", ABOUT[name][1])
    Console().print(table)
