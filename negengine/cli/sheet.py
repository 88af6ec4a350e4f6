"""The side-by-side picture of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

ZOOM = 2
GAP = 6
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (120, 120, 128)


@dataclass(frozen=True)
class Row:
    """One prompt: the same seeds without and with the method."""

    prompt: str
    without: list[Image.Image]
    with_: list[Image.Image]


def sheet(title: str, rows: list[Row]) -> Image.Image:
    """Prompts from top to bottom, without on the left, with on the right; pictures enlarged without smoothing."""
    size = rows[0].without[0].width * ZOOM
    count = len(rows[0].without)
    text, small = ImageFont.load_default(16), ImageFont.load_default(13)
    label = 10 + int(max(small.getlength(row.prompt) for row in rows))
    block = count * (size + GAP) - GAP
    top = 62
    page = Image.new("RGB", (label + 2 * block + 5 * GAP, top + len(rows) * (size + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    left, right = label + 2 * GAP, label + 4 * GAP + block
    draw.text((GAP, 8), title, INK, font=text)
    draw.text((left, 38), "without", FAINT, font=small)
    draw.text((right, 38), "with NegToMe, same seeds", FAINT, font=small)
    for r, row in enumerate(rows):
        y = top + r * (size + GAP)
        draw.text((GAP, y + size // 2), row.prompt, INK, font=small, anchor="lm")
        for x, images in ((left, row.without), (right, row.with_)):
            for k, image in enumerate(images):
                page.paste(image.resize((size, size), Image.Resampling.NEAREST), (x + k * (size + GAP), y))
    return page


def stack(pages: list[Image.Image]) -> Image.Image:
    """Pages below each other."""
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages) + 10 * (len(pages) - 1)), PAPER)
    y = 0
    for part in pages:
        page.paste(part, (0, y))
        y += part.height + 10
    return page
