"""``python -m negengine.models.people.render PACKAGES``: make the sheet of pictures anew from the three icon packages.

The packages come from ``npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9
@iconify-json/twemoji@1.2.5``; other versions draw other pictures. Each is unpacked into a folder of its own below ``PACKAGES``;
``resvg_py`` draws them. Neither is needed to train: the sheet is part of the package.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from negengine.models.people.attributes import GENDERS, PROFESSIONS, SIZE, STYLES, TONES
from negengine.models.people.pictures import DATA, LISTING, SHEET

PACKAGES = {"fluent": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji"}
GENDER_PREFIX = {"person": "", "man": "man-", "woman": "woman-"}
OVERSAMPLING = 4


def main(
    packages: Annotated[Path, typer.Argument(help="Folder that holds the unpacked packages.")],
    output: Annotated[Path, typer.Option(help="Folder for the sheet and its listing.")] = DATA,
) -> None:
    """Draw every picture on white and write the lossless sheet, one row a profession, and its listing."""
    icons = {style: read_icons(packages, prefix) for style, prefix in PACKAGES.items()}
    sheet = Image.new("RGB", (SIZE * len(STYLES) * len(GENDERS) * len(TONES), SIZE * len(PROFESSIONS)), "white")
    for row, profession in enumerate(PROFESSIONS):
        column = 0
        for style in STYLES:
            for gender in GENDERS:
                for tone in TONES:
                    svg = find_svg(icons[style], profession, gender, tone)
                    sheet.paste(draw(svg), (column * SIZE, row * SIZE))
                    column += 1
    output.mkdir(parents=True, exist_ok=True)
    # multiples of 5 differ from the drawing by at most 2 of 255 and take half of the bytes
    sheet.point(lambda value: round(value / 5) * 5).save(output / SHEET, lossless=True, quality=100, method=6)
    listing = {
        "rows": list(PROFESSIONS),
        "columns": {"styles": list(STYLES), "genders": list(GENDERS), "tones": list(TONES)},
        "size": SIZE,
        "sources": {style: source(icons[style]) for style in STYLES},
    }
    (output / LISTING).write_text(json.dumps(listing, indent=1) + "\n")


def read_icons(packages: Path, prefix: str) -> dict[str, Any]:
    """The icons of one package with its version and its licence."""
    for file in packages.glob("**/icons.json"):
        icons: dict[str, Any] = json.loads(file.read_text())
        if icons["prefix"] == prefix:
            package, about = (json.loads((file.parent / name).read_text()) for name in ("package.json", "info.json"))
            return icons | {"package": package["name"], "version": package["version"], "about": about}
    raise typer.BadParameter(f"there is no icons.json of {prefix} below {packages}; unpack `npm pack @iconify-json/{prefix}` there")


def source(icons: dict[str, Any]) -> dict[str, str]:
    about = icons["about"]
    return {
        "package": f"{icons['package']}@{icons['version']}",
        "author": about["author"]["name"],
        "url": about["author"]["url"],
        "licence": about["license"]["spdx"],
    }


def find_svg(icons: dict[str, Any], profession: str, gender: str, tone: str) -> str:
    """The drawing of a look; the packages write tones with and without ``-skin-tone``."""
    name = GENDER_PREFIX[gender] + profession.replace(" ", "-")
    tone = tone.replace(" ", "-")
    names = [name] if tone == "yellow" else [f"{name}-{tone}", f"{name}-{tone}-skin-tone"]
    found = [icons["icons"][each] for each in names if each in icons["icons"]]
    if not found:
        raise typer.BadParameter(f"{icons['package']} {icons['version']} has no icon called {' or '.join(names)}")
    icon = found[0]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    pixels = SIZE * OVERSAMPLING
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{pixels}" height="{pixels}" viewBox="{box}">{icon["body"]}</svg>'
    )


def draw(svg: str) -> Image.Image:
    """The drawing on white."""
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("resvg_py draws the icons; install it with: pip install resvg_py") from error
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    page = Image.new("RGBA", drawn.size, "white")
    page.alpha_composite(drawn)
    return page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    typer.run(main)
