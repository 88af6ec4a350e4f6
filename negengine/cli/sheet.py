"""The side-by-side picture of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SHOWN = 96  # pixels, about: small pictures are enlarged
LABEL = 204  # pixels, at least, so that pages below each other stand in line
GAP = 6
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (100, 100, 108)


@dataclass(frozen=True, eq=False)
class Row:
    """The same seeds without and with the method.

    Attributes:
        label: the prompt, or what is avoided.
        pictures: shown in a frame below the label.
        note: behind the row, in one line or more.
    """

    label: str
    without: Sequence[Image.Image]
    with_: Sequence[Image.Image]
    pictures: Sequence[Image.Image] = ()
    note: str = ""


def sheet(title: str, heads: tuple[str, str], rows: Sequence[Row], about: str = "") -> Image.Image:
    """Rows from top to bottom, without on the left, with on the right.

    Args:
        about: what a reader must know, behind the title.
    """
    size = _size(rows[0].without[0])
    count = len(rows[0].without)
    text, small = ImageFont.load_default(16), ImageFont.load_default(13)
    framed = max((len(row.pictures) for row in rows), default=0) * (size + GAP)
    label = 10 + int(max(LABEL, framed, *(small.getlength(row.label) for row in rows)))
    note = 10 + int(max(small.getlength(line) for row in rows for line in row.note.split("\n")))
    block = count * (size + GAP) - GAP
    left, right = label + 2 * GAP, label + 6 * GAP + block
    heights = [size + (18 + GAP if row.pictures else 0) for row in rows]
    top = 62
    page = Image.new("RGB", (right + block + GAP + note, top + sum(heights) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 8), title, INK, font=text)
    draw.text((GAP + text.getlength(f"{title}   "), 10), about, FAINT, font=small)
    between = (left + block + right) // 2
    draw.line((between, 38, between, top + sum(heights) + GAP * (len(rows) - 1)), FAINT)
    for x, head in zip((left, right), heads, strict=True):
        draw.text((x, 38), head, INK, font=small)
    y = top
    for row, height in zip(rows, heights, strict=True):
        below = y + height - size  # where the pictures of the row begin
        draw.text((GAP, y + 9 if row.pictures else below + size // 2), row.label, INK, font=small, anchor="lm")
        for k, picture in enumerate(row.pictures):
            _framed(page, picture, (GAP + k * (size + GAP), below), size)
        for x, images in ((left, row.without), (right, row.with_)):
            for k, image in enumerate(images):
                page.paste(_shown(image, size), (x + k * (size + GAP), below))
        draw.text((right + block + GAP, below + size // 2), row.note, FAINT, font=small, anchor="lm")
        y += height + GAP
    return page


def _size(image: Image.Image) -> int:
    """The largest multiple of half its size up to ``SHOWN``, and never less than its size."""
    return max(2, 2 * SHOWN // image.width) * image.width // 2


def _shown(image: Image.Image, size: int) -> Image.Image:
    whole = size % image.width == 0
    return image.convert("RGB").resize((size, size), Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def _framed(page: Image.Image, picture: Image.Image, corner: tuple[int, int], size: int) -> None:
    x, y = corner
    page.paste(_shown(picture, size), corner)
    ImageDraw.Draw(page).rectangle((x, y, x + size - 1, y + size - 1), outline=INK, width=2)


def stack(pages: Sequence[Image.Image]) -> Image.Image:
    """Pages below each other."""
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages) + 10 * (len(pages) - 1)), PAPER)
    y = 0
    for part in pages:
        page.paste(part, (0, y))
        y += part.height + 10
    return page
