"""A reference picture in the batch beside its bank: ``python bench/reference_bank.py`` writes bench/results/reference_bank.json.

Runs alternate on one thread, and each figure is the median processor time of the rounds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import negengine
from negengine import models
from negengine.environment import machine, versions

IMAGES, ROUNDS, PROMPT = 4, 3, "a handwritten three"
RESULT = Path(__file__).resolve().parent / "results" / "reference_bank.json"


def asset() -> negengine.ReferenceImage:
    """A held-out digit, of which the left half is to be avoided."""
    digit = models.heldout_digits()[0][0]
    picture = Image.fromarray((digit.permute(1, 2, 0) * 255).round().byte().numpy())
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, picture.width // 2, picture.height))
    return negengine.ReferenceImage(picture, mask)


def measure(name: str, folder: Path) -> dict[str, Any]:
    pipe, preset, picture = models.load(name), models.preset(name), asset()
    call = preset.call_kwargs()
    once = {key: value[0] if isinstance(value, list) else value for key, value in call.items()}
    settings = {"threshold": 0.5, "min_grid": 1}
    start = time.process_time()
    bank = negengine.record_bank(pipe, negengine.NegToMe(**settings, reference=picture), folder / name, prompt=PROMPT, **once)
    recording = time.process_time() - start

    def run(given: Any) -> tuple[float, torch.Tensor]:
        if given is None:
            negengine.remove(pipe)
        else:
            negengine.apply(pipe, negengine.NegToMe(**settings, reference=given))
        start = time.process_time()
        generator = torch.Generator().manual_seed(0)
        latents = pipe([PROMPT], num_images_per_prompt=IMAGES, generator=generator, output_type="latent", **call).images
        return time.process_time() - start, latents

    kinds = {"without": None, "joined": picture, "bank": bank}
    runs = [{kind: run(given) for kind, given in kinds.items()} for _ in range(ROUNDS + 1)][1:]  # the first warms up
    seconds = {kind: statistics.median(each[kind][0] for each in runs) for kind in kinds}
    plain, joined, held = (runs[-1][kind][1] for kind in kinds)
    return {
        "bytes": Path(bank.path).stat().st_size,
        "active_steps": len(bank.about.steps),
        "steps": preset.steps,
        "seconds_recording": recording,
        "seconds": seconds,
        "largest_difference": (held - joined).abs().amax().item(),
        "largest_change": (joined - plain).abs().amax().item(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(name, Path(folder)) for name in models.NAMES}
    about = {"date": time.strftime("%Y-%m-%d"), "images": IMAGES, "rounds": ROUNDS, "machine": machine(), "versions": versions()}
    RESULT.write_text(json.dumps(about | {"models": found}, indent=1) + "\n")
    print("| model | steps merged | bank | without NegToMe | picture in the batch | bank | recording |")
    for name, row in found.items():
        times = [f"{row['seconds'][kind]:.2f} s" for kind in ("without", "joined", "bank")]
        of = f"{row['active_steps']} of {row['steps']}"
        print(f"| {name} | {of} | {row['bytes'] / 1e6:.2f} MB | {' | '.join(times)} | {row['seconds_recording']:.2f} s |")
