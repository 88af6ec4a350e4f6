"""Pictures of a job that were drawn before, so that an interrupted part goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from negengine.evaluate.groups import Drawn, Group


def save(drawn: Sequence[Drawn], path: Path) -> None:
    """The file appears whole, or not at all."""
    told = [{"name": one.name, "about": dict(one.about), "groups": [_plain(group) for group in one.groups]} for one in drawn]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(told, part)
    part.replace(path)


def load(path: Path) -> list[Drawn]:
    return [Drawn(one["name"], tuple(_group(group) for group in one["groups"]), one["about"]) for one in torch.load(path)]


def _plain(group: Group) -> dict[str, object]:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in group.images]))
    names, seeds = list(group.names), list(group.image_seeds)
    return {"key": group.key, "images": pixels, "names": names, "prompt": group.prompt, "seed": group.seed, "image_seeds": seeds}


def _group(told: dict[str, object]) -> Group:
    pixels, names, seeds = told["images"], told["names"], told["image_seeds"]
    assert isinstance(pixels, torch.Tensor) and isinstance(names, list) and isinstance(seeds, list)  # noqa: PT018
    images = tuple(Image.fromarray(picture) for picture in pixels.numpy())
    return Group(**{**told, "images": images, "names": tuple(names), "image_seeds": tuple(seeds)})  # type: ignore[arg-type]
