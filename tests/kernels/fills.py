"""How busy the search keeps a device, by simulated deal; as a script it writes the table of docs/kernels-triton.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from negengine.kernels.triton import occupancy, tuning

from negengine.bench.shapes import SHAPES

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels-triton.md"
BEGIN, END = "<!-- written by tests/kernels/fills.py -->\n", "<!-- end of fills -->\n"
DEVICES = {108: "sm_80", 132: "sm_90", 148: "sm_100"}
IMAGES = range(2, 9)
ENOUGH = 0.9


@dataclass(frozen=True)
class Row:
    images: int
    tile: str
    splits: int
    fill: float
    best: float  # that any of the device's tiles reaches with any number of splits

    @property
    def reason(self) -> str:
        """Why the fill is not more; empty where it is enough."""
        return "" if self.fill >= ENOUGH else "few tiles" if self.best < ENOUGH else "slow tiles"


def rows(name: str, processors: int) -> Iterator[Row]:
    """A shape on a device, bfloat16, mode ``first``, for every number of images."""
    device = tuning.ARCHITECTURES[DEVICES[processors]]
    shape = SHAPES[name]
    for images in IMAGES:
        call = tuning.Shape(images, 1, shape.tokens, shape.tokens, shape.channels, images - 1)
        config = tuning.match_config(call, 2, device, True)
        splits = tuning.splits(call, config, device, 2)
        fill = occupancy.fill(tuning.work(call, config, device, 2), splits)
        yield Row(images, f"{config.block_m} x {config.block_n}", splits, fill, best(call, device))


def best(call: tuning.Shape, device: tuning.Architecture) -> float:
    works = [tuning.work(call, config, device, 2) for config in tuning.known_configs(2, device, True)]
    return max(occupancy.fill(work, splits) for work in works for splits in range(1, work.key_tiles + 1))


def table() -> str:
    lines = [f"| shape | processors | {' | '.join(f'N = {n}' for n in IMAGES)} |", "| --- |" + " --- |" * (1 + len(IMAGES))]
    for name in SHAPES:
        for processors in DEVICES:
            cells = [f"{row.fill:.2f}" + (f" ({row.reason})" if row.reason else "") for row in rows(name, processors)]
            lines.append(f"| {name} | {processors} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    sys.exit(main())
