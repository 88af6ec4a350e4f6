"""Folders of images: found, opened, and put into groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from negengine import png
from negengine.evaluate.groups import Drawn, Group

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
BY = ("settings", "folder", "name", "none")


def read_folder(folder: Path, by: str | None = None, per_group: int | None = None) -> Drawn:
    """The images of a folder and its subfolders, in groups.

    Args:
        by: ``"settings"``: what PNG files of negengine tell; ``"folder"``: each subfolder is a group; ``"name"``: files that
            differ in the number at the end of their names only; ``"none"``: all are one group. None: the first that fits.
        per_group: take so many of each group, in the order of their names.

    Raises:
        ValueError: no such folder, no image in it, a file that cannot be read as one, files that do not fit ``by``, or a group that
            has fewer than ``per_group``.
    """
    files = image_files(folder)
    images = [open_image(file) for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    told = [told_by(file) for file in files]
    by = by or _guess(names, told)
    if by not in BY:
        raise ValueError(f"images are grouped by {', '.join(BY)}, not by {by!r}")
    if by == "settings" and not all(told):
        raise ValueError(f"{files[told.index({})]} does not tell how it was made; group by folder, name or none")
    keys = [_key(by, name, about) for name, about in zip(names, told, strict=True)]
    if by == "folder" and "" in keys:
        raise ValueError(f"{files[keys.index('')]} lies in no subfolder of {folder}; group by name or none")
    groups = [_group(key, keys, images, names, told) for key in dict.fromkeys(keys)]
    if per_group is not None:
        groups = [_first(group, per_group) for group in groups]
    return Drawn(folder.name or str(folder), tuple(groups), {"folder": str(folder), "grouped by": by})


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted. Raises ValueError if there is no such folder, or none in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"there is no image in {folder}; endings that are read: {', '.join(ENDINGS)}")
    return files


def open_image(file: Path) -> Image.Image:
    """An image file in RGB, as a viewer shows it: turned as its EXIF says, on white where it is transparent, 16 bits as 8.

    Raises:
        ValueError: it cannot be read, or its numbers have no range that could be white.
    """
    try:
        with Image.open(file) as image:
            return as_shown(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def as_shown(image: Image.Image) -> Image.Image:
    """RGB of 8 bits. Raises ValueError for the modes I and F, whose conversion would clip what is above 255."""
    deep = image.mode in SIXTEEN_BITS or (image.mode, image.format) == ("I", "PNG")  # as Pillow before 11 reads 16 bits
    if image.mode in ("I", "F") and not deep:
        raise ValueError(f"its mode {image.mode} holds numbers of no certain range; save it with 8 or 16 bits a channel")
    image = ImageOps.exif_transpose(image)
    if deep:
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def told_by(file: Path) -> dict[str, Any]:
    """What a PNG of negengine tells of itself; nothing for other files."""
    if file.suffix.lower() != ".png":
        return {}
    try:
        told = png.read(file)
    except (ValueError, OSError):  # one that cannot be read at all is an error where it is opened
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("prompt"), str) else {}


def _guess(names: Sequence[str], told: Sequence[Mapping[str, Any]]) -> str:
    if all(told):
        return "settings"
    if all("/" in name for name in names):
        return "folder"
    return "name" if all(_stem(name) for name in names) else "none"


def _stem(name: str) -> str:
    """A file's name without the number at its end; empty if there is none."""
    found = re.fullmatch(r"(.*?)[-_. ]?\d+", name.rpartition(".")[0])
    return found[1] if found else ""


def _of_settings(told: Mapping[str, Any]) -> str:
    """``group`` where a file tells it; else its prompt, and its seed where that is one for the whole call."""
    if isinstance(told.get("group"), str):
        return told["group"]
    seed = (told.get("run") or {}).get("seed")
    return f"{told['prompt']}, seed {seed}" if isinstance(seed, int) else told["prompt"]


def _key(by: str, name: str, told: Mapping[str, Any]) -> str:
    ways: dict[str, Callable[[], str]] = {
        "settings": lambda: _of_settings(told),
        "folder": lambda: name.rpartition("/")[0],
        "name": lambda: _stem(name) or name,
        "none": lambda: "all",
    }
    return ways[by]()


def _group(
    key: str, keys: Sequence[str], images: Sequence[Image.Image], names: Sequence[str], told: Sequence[Mapping[str, Any]]
) -> Group:
    rows = [row for row, other in enumerate(keys) if other == key]
    first = told[rows[0]]
    seed = first.get("group seed", (first.get("run") or {}).get("seed"))
    return Group(
        key,
        tuple(images[row] for row in rows),
        tuple(names[row] for row in rows),
        first.get("prompt"),
        seed if isinstance(seed, int) else None,
    )


def _first(group: Group, count: int) -> Group:
    if len(group.images) < count:
        raise ValueError(f"the group {group.key} has {len(group.images)} images, fewer than --per-group {count}")
    return Group(group.key, group.images[:count], group.names[:count], group.prompt, group.seed)
