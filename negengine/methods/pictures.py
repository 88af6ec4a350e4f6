"""Pictures as users have them: turned as they are shown, and in a mode whose values have a known meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_TURNED = 0x0112  # EXIF's orientation, 1 where a picture lies as it is shown
_PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # modes whose colours are multiplied by their opacity


def as_shown(image: Image.Image, what: str) -> Image.Image:
    """The picture as it is shown; itself if nothing is to be done.

    Args:
        what: what it is, for errors.

    Raises:
        ValueError: a mode that does not say which value is white, or that Pillow does not convert.
    """
    from PIL import ImageOps

    if image.getexif().get(_TURNED, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _of_16_bits(image, what)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{what} has the mode {image.mode!r}, which does not say which value is white; scale it to 0 to 255 and give "
            "Image.fromarray(values.astype('uint8'))"
        )
    if image.mode in _PLAIN:
        return image
    try:
        return image.convert(_STRAIGHT.get(image.mode, "RGB"))
    except ValueError as error:
        raise ValueError(f"{what} has the mode {image.mode!r}, which Pillow cannot convert; give one of mode RGB or L") from error


def _of_16_bits(image: Image.Image, what: str) -> Image.Image:
    """Pillow's own conversion makes white of all but the darkest values."""
    if image.has_transparency_data:
        raise ValueError(f"{what} has 16 bits and a transparent value; give one of mode RGBA or LA")
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
