"""``negengine methods``: what there is to choose from."""

from __future__ import annotations

import functools
import textwrap

from rich.console import Console
from rich.table import Column, Table

from negengine.methods import KINDS

WIDE = 170  # columns of a terminal that has room for whole names and hints beside the description
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
    "guidance-interval": (
        "guides only at middling noise: richer, less saturated images",
        "guidance-interval.low, guidance-interval.high; not FLUX",
    ),
    "dnp": ("finds the negative prompt by asking the model", "`negengine negative`; guidance above 1; few steps: --nag"),
}


def methods() -> None:
    """What each method does to the picture, its presets, and what it needs."""
    console = Console()
    names, hints = (60, 60) if console.width >= WIDE else (10, 23)  # the longest name with its comma; the longest setting
    whole = functools.partial(Column, no_wrap=True, overflow="fold")  # only what is no name may be broken anew
    table = Table(whole("method"), "what it does to the picture", whole("presets"), whole("needs"))
    for name, kind in KINDS.items():
        presets = ", ".join(kind.presets) if name != "dnp" else ""
        table.add_row(name, ABOUT[name][0], _lines(presets, names), _lines(ABOUT[name][1], hints))
    console.print(table)


def _lines(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
