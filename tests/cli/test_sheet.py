"""The demo's picture: every image and every picture to keep away from has its place."""

import pytest
from PIL import Image

from negengine.cli.sheet import FAINT, INK, PAPER, Row, sheet, stack

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 200, 0)


def image(colour, size=64):
    return Image.new("RGB", (size, size), colour)


def share(page, colour):
    return next((count for count, pixel in page.getcolors(page.width * page.height) if pixel == colour), 0)


@pytest.mark.parametrize(("size", "shown"), [(32, 96), (64, 96), (48, 96), (300, 300)])
def test_small_pictures_are_enlarged_and_none_is_cut(size, shown):
    page = sheet("title", ("left", "right"), [Row("a cat", [image(RED, size)] * 4, [image(BLUE, size)] * 4)] * 2)
    assert share(page, RED) == share(page, BLUE) == 8 * shown**2


def test_a_picture_and_its_mask_stand_in_frames_below_the_label():
    mask = Image.new("L", (64, 64), 255)
    row = Row("away from this", [image(RED)] * 2, [image(BLUE)] * 2, pictures=(image(GREEN), mask))
    page = sheet("", ("without", "with"), [row])
    assert share(page, GREEN) == 92**2  # within a frame of two pixels
    plain = sheet("", ("without", "with"), [Row("away from this", [image(RED)] * 2, [image(BLUE)] * 2)])
    frames = share(page, INK) - share(plain, INK)
    assert frames == pytest.approx(2 * (96**2 - 92**2), rel=0.02)
    assert page.height > plain.height
    assert share(page, RED) == share(page, BLUE) == 2 * 96**2


def test_a_line_parts_the_halves_and_what_to_know_stands_behind_the_title():
    rows = [Row("a cat", [image(RED)] * 4, [image(BLUE)] * 4)] * 3
    page = sheet("title", ("left", "right"), rows)
    lines = [x for x in range(page.width) if all(page.getpixel((x, y)) == FAINT for y in range(60, page.height - 20))]
    (line,) = lines
    reds, blues = ([x for x in range(page.width) if page.getpixel((x, 100)) == colour] for colour in (RED, BLUE))
    assert line - max(reds) == pytest.approx(min(blues) - line, abs=1)
    assert share(sheet("title", ("left", "right"), rows, "a word"), FAINT) > share(page, FAINT)


def test_pages_stand_below_each_other():
    page = stack([image(RED, 20), image(BLUE, 30)])
    assert page.size == (30, 60)
    assert page.getpixel((5, 5)) == RED
    assert page.getpixel((25, 5)) == PAPER
    assert page.getpixel((5, 35)) == BLUE
