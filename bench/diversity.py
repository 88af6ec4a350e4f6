"""What NegToMe does to the embedded models: diversity and fidelity over many groups, and the curve over alpha.

    python bench/diversity.py curve      # over alpha, each reference mode and matching
    python bench/diversity.py preset     # the presets, 90 groups of 4, three seeds
    python bench/diversity.py pictures   # away from given digits, with and without mask

Every command writes a JSON a model under ``bench/results/diversity``; ``curve`` also the plot in ``docs``. All draw the same
seeds.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.progress import track
from torch import Tensor

import negengine
from negengine import metrics, models
from negengine.environment import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "diversity"
GROUP = 4
ALPHAS = {"mnist-flux": (0.3, 0.6, 0.9, 1.3, 1.8), "mnist-sdxl": (1.5, 3.0, 4.5, 6.0, 8.0)}
VARIANTS = (("first", "paper"), ("others", "paper"), ("previous", "paper"), ("first", "release"))

app = typer.Typer(add_completion=False, help=__doc__)
Models = Annotated[list[str] | None, typer.Option(help="Embedded models; all by default.")]


def draw(pipe: Any, name: str, seed: int, prompts: tuple[str, ...] = models.PROMPTS) -> list[Image.Image]:
    """A group of four for every prompt, ordered by prompt."""
    generator = torch.Generator().manual_seed(seed)
    call = models.preset(name).call_kwargs(len(prompts))
    return pipe(list(prompts), num_images_per_prompt=GROUP, generator=generator, **call).images


class Study:
    """One model, its classifier, and the measurements over some seeds."""

    def __init__(self, name: str, seeds: list[int]) -> None:
        self.name, self.seeds = name, seeds
        self.pipe = models.load(name)
        self.classifier = models.load_classifier()
        self.labels = torch.arange(len(models.PROMPTS)).repeat_interleave(GROUP)

    def measure(self, settings: negengine.NegToMe | None) -> dict[str, Any]:
        """Means over all groups, and the values of each group for paired comparisons."""
        if settings is not None:
            negengine.apply(self.pipe, settings)
        distance: list[float] = []
        vendi: list[float] = []
        right: list[float] = []
        shares: list[float] = []
        start = time.perf_counter()
        for seed in self.seeds:
            images = draw(self.pipe, self.name, seed)
            if settings is not None:
                shares.append(negengine.status(self.pipe)[negengine.NegToMe].merged_share)
            features = self.classifier.features(images).float()
            for group in features.split(GROUP):
                distance.append(float(metrics.pairwise_distance(group)))
                vendi.append(float(metrics.vendi_score(group)))
            right.append(float(metrics.fidelity(self.classifier.logits(images).float(), self.labels)))
        seconds = time.perf_counter() - start
        negengine.remove(self.pipe)
        return {
            "distance": mean(distance),
            "vendi": mean(vendi),
            "fidelity": mean(right),
            "merged_share": mean(shares) if shares else 0.0,
            "groups": len(distance),
            "seconds": seconds,
            "per_group": {"distance": distance, "vendi": vendi},
        }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paired(with_: list[float], without: list[float]) -> dict[str, float]:
    """Mean difference of paired values and its standard error."""
    difference = torch.tensor(with_, dtype=torch.float64) - torch.tensor(without, dtype=torch.float64)
    return {"mean": float(difference.mean()), "standard_error": float(difference.std() / len(difference) ** 0.5)}


def save(what: str, name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {"what": what, "model": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions()}
    path = RESULTS / f"{what}-{name}.json"
    path.write_text(json.dumps(about | {"call": models.preset(name).call_kwargs()} | result, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


@app.command()
def curve(model: Models = None, seeds: int = 2) -> None:
    """Diversity and fidelity over alpha, for every reference mode and matching; twenty groups a point."""
    for name in model or models.NAMES:
        study = Study(name, list(range(seeds)))
        base = models.negtome_preset(name)
        points = [{"reference": None, "matching": None, "alpha": 0.0, **study.measure(None)}]
        cases = [(r, m, a) for r, m in VARIANTS for a in ALPHAS[name]]
        for reference, matching, alpha in track(cases, description=name):
            settings = dataclasses.replace(base, reference=reference, matching=matching, alpha=alpha)
            points.append({"reference": reference, "matching": matching, "alpha": alpha, **study.measure(settings)})
        save("curve", name, {"group_size": GROUP, "settings": dataclasses.asdict(base), "points": points})
    plot(ROOT / "docs" / "alpha.png")


def plot(path: Path) -> None:
    """Every curve that was measured, a column a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    files = {name: RESULTS / f"curve-{name}.json" for name in models.NAMES}
    result = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    rows = (("vendi", "Vendi score in a group of 4"), ("distance", "pairwise feature distance"), ("fidelity", "read as prompted"))
    figure, axes = plt.subplots(len(rows), len(result), figsize=(5.2 * len(result), 8), sharex="col", squeeze=False)
    for column, (name, study) in enumerate(result.items()):
        plain, *points = study["points"]
        for row, (key, label) in enumerate(rows):
            axis = axes[row][column]
            for reference, matching in VARIANTS:
                line = [p for p in points if (p["reference"], p["matching"]) == (reference, matching)]
                style = "--" if matching == "release" else "-"
                xs, ys = [0.0, *(p["alpha"] for p in line)], [plain[key], *(p[key] for p in line)]
                axis.plot(xs, ys, style, marker=".", label=f"{reference}, {matching}")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            if key == "fidelity":
                axis.axhline(plain[key] - 0.02, color="grey", linewidth=0.8)
        axes[0][column].set_title(name)
        axes[-1][column].set_xlabel("alpha")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@app.command()
def preset(model: Models = None, seeds: int = 3, batches: int = 3) -> None:
    """The presets against no NegToMe: ten groups of four a batch."""
    for name in model or models.NAMES:
        plain: list[dict[str, Any]] = []
        merged: list[dict[str, Any]] = []
        for seed in track(range(seeds), description=name):
            study = Study(name, [1000 * (seed + 1) + batch for batch in range(batches)])
            plain.append(study.measure(None))
            merged.append(study.measure(models.negtome_preset(name)))
        pooled = {
            key: paired(
                [v for part in merged for v in part["per_group"][key]], [v for part in plain for v in part["per_group"][key]]
            )
            for key in ("distance", "vendi")
        }
        settings = dataclasses.asdict(models.negtome_preset(name))
        save("preset", name, {"group_size": GROUP, "settings": settings, "without": plain, "with": merged, "difference": pooled})
        for key in ("distance", "vendi", "fidelity"):
            values = [f"{a[key]:.4f} -> {b[key]:.4f}" for a, b in zip(plain, merged, strict=True)]
            print(f"{name:12} {key:9} by seed: {',  '.join(values)}")
        print(f"{name:12} difference: {pooled}")


@app.command()
def pictures(model: Models = None, seeds: int = 3) -> None:
    """Similarity to a given held-out digit, drawn by a prompt for its class, without, with, and with half of it masked."""
    digits, labels = models.heldout_digits()

    for name in model or models.NAMES:
        pipe, classifier = models.load(name), models.load_classifier()
        base = models.negtome_preset(name)
        rows = []
        for digit in track(range(10), description=name):
            picture = to_picture(digits[int((labels == digit).nonzero()[0])])
            target = classifier.features([picture]).float()
            mask = Image.new("L", picture.size, 0)
            mask.paste(255, (0, 0, picture.width, picture.height // 2))
            references = {
                "without": None,
                "picture": negengine.ReferenceImage(picture),
                "upper half": negengine.ReferenceImage(picture, mask),
            }
            row: dict[str, Any] = {"digit": digit}
            for case, reference in references.items():
                if reference is not None:
                    negengine.apply(pipe, dataclasses.replace(base, reference=reference))
                images = [i for seed in range(seeds) for i in draw(pipe, name, seed, (models.PROMPTS[digit],))]
                negengine.remove(pipe)
                similarity = metrics.feature_similarity(classifier.features(images).float(), target)
                row[case] = {
                    "similarity": float(similarity.mean()),
                    "pixel_correlation": float(metrics.pixel_correlation(as_tensor(images), as_tensor([picture])).mean()),
                    "fidelity": float(metrics.fidelity(classifier.logits(images).float(), torch.full((len(images),), digit))),
                }
            rows.append(row)
        settings = dataclasses.asdict(base) | {"reference": "a held-out digit of the prompted class"}
        save("pictures", name, {"images_per_case": GROUP * seeds, "settings": settings, "digits": rows})
        for case in ("without", "picture", "upper half"):
            for key in ("similarity", "pixel_correlation", "fidelity"):
                print(f"{name:12} {case:11} {key:18} {mean([row[case][key] for row in rows]):.4f}")


def to_picture(digit: Tensor) -> Image.Image:
    return Image.fromarray((digit.permute(1, 2, 0) * 255).round().byte().numpy())


def as_tensor(images: list[Image.Image]) -> Tensor:
    stacked = [
        torch.frombuffer(bytearray(i.convert("RGB").tobytes()), dtype=torch.uint8).view(i.height, i.width, 3) for i in images
    ]
    return torch.stack(stacked).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    app()
