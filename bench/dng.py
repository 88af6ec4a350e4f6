"""What dynamic negative guidance does to the embedded SDXL: is what is to be avoided gone, and what became of the rest?

    python bench/dng.py run      # every cell of docs/dng.md, into bench/results/cpu/dng.json, and the plots
    python bench/dng.py plots    # docs/dng.png and docs/dng-posterior.png, from the JSON and the pictures of the last run
    python bench/tables.py       # the tables of docs/dng.md, from the JSON

Image ``i`` of every cell is drawn from a generator of its own with seed ``i``: cells are compared image by image. The pictures
of a cell are kept in ``out/dng`` and not drawn again: an interrupted run goes on; delete the folder for a fresh one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import negengine
from negengine import metrics, models
from negengine.environment import machine, versions
from negengine.models.prompts import WORDS

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "cpu" / "dng.json"
DOCS = ROOT / "docs"
KEPT = ROOT / "out" / "dng"
MODEL, OPEN, UNRELATED, THREE = "mnist-sdxl", "a digit", "a handwritten seven", 3
STEPS, CFG, BATCH = 15, 3.0, 25
SAMPLERS = {"Euler": None, "Euler ancestral": "EulerAncestralDiscreteScheduler"}
EXACT, SURROGATE = "Euler ancestral", "Euler"
Away = negengine.NegativePrompting | negengine.DynamicNegativeGuidance

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Cell:
    """One row of the tables.

    Attributes:
        sampler: of ``SAMPLERS``.
        avoid: the class to avoid. None: images with an even seed avoid the class that they show without guidance, those with an odd
            seed another one.
        method: None: without guidance away from anything. Its prompt is filled in.
        prompt, guidance: of the call.
    """

    sampler: str
    avoid: int | None
    method: Away | None
    prompt: str = OPEN
    guidance: float = CFG

    @property
    def plain(self) -> Cell:
        """The same images without."""
        return dataclasses.replace(self, method=None, avoid=None)

    @property
    def settings(self) -> str:
        if self.method is None:
            return "without"
        names = ("scale",) if isinstance(self.method, negengine.NegativePrompting) else ("scale", "prior", "tau")
        return f"{self.method.title}, {', '.join(f'{name} {getattr(self.method, name):g}' for name in names)}"

    @property
    def file(self) -> Path:
        about = f"{self.sampler} {self.prompt} cfg {self.guidance:g} {self.avoid} {self.settings}"
        return KEPT / f"{''.join(c if c.isalnum() or c == '.' else '-' for c in about)}.pt"


def constant(sampler: str, scale: float, avoid: int | None = None, **call: Any) -> Cell:
    return Cell(sampler, avoid, negengine.NegativePrompting(prompt="", scale=scale), **call)


def dynamic(sampler: str, scale: float, avoid: int | None = None, prior: float = 0.1, tau: float = 0.5, **call: Any) -> Cell:
    """DNG: exact where the sampler's steps have a density, with the surrogate of the ancestral step where not."""
    surrogate = "ancestral" if SAMPLERS[sampler] is None else None
    method = negengine.DynamicNegativeGuidance(prompt="", scale=scale, prior=prior, tau=tau, surrogate=surrogate)
    return Cell(sampler, avoid, method, **call)


def cells() -> list[Cell]:
    """Every row, in the order of docs/dng.md."""
    found: list[Cell] = []
    for sampler, guidance, constants, scales in (
        (EXACT, 1.0, (0.25, 0.5, 1.0), (2.0, 5.0, 10.0)),
        (EXACT, CFG, (0.25, 0.5, 1.0), (2.0, 5.0, 10.0)),
        (SURROGATE, CFG, (0.25, 0.5), (10.0,)),
    ):
        group = [constant(sampler, scale, guidance=guidance) for scale in constants]
        group += [dynamic(sampler, scale, guidance=guidance) for scale in scales]
        found += [group[0].plain, *group]
    found += [dynamic(EXACT, 0.0), constant(EXACT, 0.5, THREE), dynamic(EXACT, 10.0, THREE)]
    found += [constant(EXACT, 0.5, THREE, prompt=UNRELATED), dynamic(EXACT, 10.0, THREE, prompt=UNRELATED)]
    return [*found, found[-1].plain]


class Study:
    """The pipeline with each sampler in turn, and the classifier that reads what it draws."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.pipe, self.classifier = models.load(MODEL), models.load_classifier()
        self._euler = self.pipe.scheduler
        real, self._labels = models.heldout_digits()
        self._real = self.classifier.features(real).double()

    def draw(self, cell: Cell) -> dict[str, Any]:
        """Pictures ``[N, 32, 32]`` uint8, the posterior ``[steps + 1, N]`` of DNG, and the processor's seconds."""
        if cell.file.exists():
            found = torch.load(cell.file)
            if len(found["pictures"]) == self.images:
                return found
        found = self._draw(cell)
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cell.file)
        return found

    def _draw(self, cell: Cell) -> dict[str, Any]:
        import diffusers

        method = cell.method
        avoid = None if method is None else self.avoid(cell)
        name = SAMPLERS[cell.sampler]
        self.pipe.scheduler = self._euler if name is None else getattr(diffusers, name).from_config(self._euler.config)
        call = models.preset(MODEL).call_kwargs() | {"num_inference_steps": STEPS, "guidance_scale": cell.guidance}
        images: list[Any] = []
        posterior: list[Tensor] = []
        start = time.process_time()
        for at in range(0, self.images, BATCH):
            seeds = range(at, min(at + BATCH, self.images))
            if method is not None and avoid is not None:
                texts = tuple(avoiding(digit) for digit in avoid[at : at + BATCH].tolist())
                negengine.apply(self.pipe, dataclasses.replace(method, prompt=texts))
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
            images += self.pipe([cell.prompt] * len(seeds), generator=generator, **call).images
            if isinstance(method, negengine.DynamicNegativeGuidance):
                posterior.append(torch.tensor(negengine.status(self.pipe)[type(method)].p))
            negengine.remove(self.pipe)
        seconds = time.process_time() - start
        pictures = torch.stack([grey(image) for image in images])
        return {"pictures": pictures, "posterior": torch.cat(posterior, 1) if posterior else None, "seconds": seconds}

    def read(self, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
        """Features, logits and pictures in [0, 1]."""
        pictures = self.draw(cell)["pictures"][:, None].float() / 255
        return self.classifier.features(pictures).double(), self.classifier.logits(pictures).double(), pictures

    def avoid(self, cell: Cell) -> Tensor:
        """The class that each image is to avoid, int64 ``[N]``."""
        return assign(self.read(cell.plain)[1].argmax(-1), cell.avoid)

    def row(self, cell: Cell) -> dict[str, Any]:
        """A cell beside the same seeds without guidance."""
        drawn, avoid = self.draw(cell), self.avoid(cell)
        before, after = self.read(cell.plain), self.read(cell)
        real = self._labels != (-1 if cell.avoid is None else cell.avoid)
        about = {"sampler": cell.sampler, "cfg": cell.guidance, "prompt": cell.prompt, "cell": cell.settings}
        aim = "by seed: even its own class, odd another" if cell.avoid is None else avoiding(cell.avoid)
        method = None if cell.method is None else {"name": cell.method.name, **dataclasses.asdict(cell.method), "prompt": aim}
        row = about | {"avoid": aim, "method": method, "images": self.images, "seconds": drawn["seconds"]}
        row |= compare(before, after, avoid)
        row["frechet"] = frechet(after[0], self._real[real]) if cell.prompt == OPEN else None
        if drawn["posterior"] is not None:
            row["posterior"] = told(drawn["posterior"], before[1].argmax(-1) == avoid)
        return row


def avoiding(digit: int) -> str:
    return f"a handwritten {WORDS[digit]}"


def assign(classes: Tensor, avoid: int | None, total: int = 10) -> Tensor:
    """What each image is to avoid: ``avoid``, or for None its own class at even places, at odd ones each other class in turn."""
    if avoid is not None:
        return torch.full_like(classes, avoid)
    odd = torch.arange(len(classes)) % 2
    turn = 1 + torch.arange(len(classes)) // 2 % (total - 1)
    return (classes + odd * turn) % total


def grey(image: Any) -> Tensor:
    """A PIL picture as uint8 ``[H, W]``; the models draw in grey."""
    return torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(image.height, image.width)


def compare(before: Sequence[Tensor], after: Sequence[Tensor], avoid: Tensor) -> dict[str, Any]:
    """What guidance did to images of the same seeds.

    Args:
        before, after: features ``[N, F]``, logits ``[N, classes]`` and pictures ``[N, ...]``.
        avoid: the class that each was to avoid, int64 ``[N]``.

    Returns:
        avoided: images that are read as what they were to avoid. members, stayed: those that were so before, and still are.
        others, became: the rest, and how many of it became what they were to avoid. kept: how many of the rest are read as before.
        change, pixel_change: of the rest to what they were, mean cosine distance of the features (``change_error`` its standard
        error) and mean absolute difference of the pixels.
        confidence: mean probability of the class read. vendi: of all images together. read: class of each image, by seed.
    """
    (features, logits, pictures), (features2, logits2, pictures2) = before, after
    was, now = logits.argmax(-1), logits2.argmax(-1)
    member, other = was == avoid, was != avoid
    change = (1 - torch.nn.functional.cosine_similarity(features, features2))[other].double()
    moved = (pictures2 - pictures).abs().flatten(1).mean(1)[other].double()
    return {
        "avoided": int((now == avoid).sum()),
        "members": int(member.sum()),
        "stayed": int((now == avoid)[member].sum()),
        "others": int(other.sum()),
        "became": int((now == avoid)[other].sum()),
        "kept": int((now == was)[other].sum()),
        "change": float(change.mean()),
        "change_error": float(change.std() / len(change) ** 0.5),
        "pixel_change": float(moved.mean()),
        "confidence": float(logits2.softmax(-1).amax(-1).mean()),
        "vendi": float(metrics.vendi_score(features2)),
        "read": "".join(map(str, now.tolist())),
    }


def frechet(features: Tensor, target: Tensor) -> float:
    """Fréchet distance of the normal densities fitted to two sets of features, float64 ``[N, F]`` each."""
    means, covariances = zip(*((x.mean(0), torch.cov(x.T)) for x in (features, target)), strict=True)
    # the trace of (A B)^1/2 is that of the symmetric (A^1/2 B A^1/2)^1/2
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross)


def told(posterior: Tensor, member: Tensor) -> dict[str, Any]:
    """Quantiles of p over the images, before the first step and after each: of those that showed what to avoid, and of the rest.

    Args:
        posterior: ``[steps + 1, N]``. member: bool ``[N]``.
    """
    levels = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    groups = {"members": posterior[:, member], "others": posterior[:, ~member]}
    return {
        name: {level: torch.quantile(group.double(), at, dim=1).tolist() for level, at in levels.items()}
        for name, group in groups.items()
        if group.shape[1]
    }


@app.command()
def run(images: int = 200) -> None:
    """Draw and measure every cell, then the plots."""
    study, rows = Study(images), []
    about: dict[str, Any] = {
        "what": "dng",
        "model": MODEL,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
    }
    about |= {"steps": STEPS, "seeds": [0, images - 1], "batch": BATCH}
    for cell in cells():
        row = study.row(cell)
        rows.append(row)
        print(line(row), flush=True)
        RESULT.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    plots()


def line(row: dict[str, Any]) -> str:
    where = f"{row['sampler']}, cfg {row['cfg']:g}, {row['prompt']}, {row['avoid'][:18]}"
    left = f"{row['stayed']}/{row['members']} stayed, {row['became']}/{row['others']} became, {row['kept']}/{row['others']} kept"
    return f"{where:62} {row['cell']:34} {left}, change {row['change']:.3f}, confidence {row['confidence']:.3f}"


@app.command()
def plots() -> None:
    """What is left against what is changed, with pictures; and the posterior over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    document = json.loads(RESULT.read_text())
    trade_off(document, DOCS / "dng.png")
    posterior(document, DOCS / "dng-posterior.png")


PANELS = (
    ("Euler ancestral, no CFG (as in the paper)", EXACT, 1.0),
    ("Euler ancestral, CFG 3: exact", EXACT, CFG),
    ("Euler, CFG 3: with the surrogate", SURROGATE, CFG),
)
COLOURS = {"negative prompting": ("#D55E00", "s"), "DNG": ("#0072B2", "o")}


def trade_off(document: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 5.9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3.6, 1.9))
    axes = upper.subplots(1, len(PANELS), sharex=True, sharey=True)
    for axis, (title, sampler, guidance) in zip(axes, PANELS, strict=True):
        rows = [r for r in document["rows"] if (r["sampler"], r["cfg"]) == (sampler, guidance) and r["avoid"].startswith("by seed")]
        for name, (colour, mark) in COLOURS.items():
            points = [r for r in rows if r["cell"].startswith(name) and r["method"]["scale"]]
            left = [100 * r["stayed"] / r["members"] for r in points]
            axis.errorbar(left, [r["change"] for r in points], [r["change_error"] for r in points], fmt=mark + "-", color=colour)
            axis.plot([], [], mark + "-", color=colour, label=f"{name} (at each mark: scale)")
            for x, r in zip(left, points, strict=True):
                side = 1 if name == "negative prompting" else -1
                axis.annotate(f"{r['method']['scale']:g}", (x, r["change"]), (11 * side, 6 * side), textcoords="offset points",
                              color=colour, fontsize=8, ha="center", va="center")  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("still show the digit to avoid, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("change of the images that\nnever showed it (feature distance)")
    axes[0].set_ylim(bottom=0)
    axes[-1].legend(fontsize=8, loc="upper right")
    upper.suptitle(f"Avoiding a digit that “{OPEN}” would draw: lower left is better", fontsize=12)
    strip(lower.subplots(), document)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def strip(axis: Any, document: dict[str, Any], threes: int = 6, rest: int = 14) -> None:
    """The same seeds in three rows: those that draw a three without guidance first."""
    study = Study(document["seeds"][1] + 1)
    shown = [c for c in cells() if c.avoid == THREE and c.prompt == OPEN]
    shown.insert(0, shown[0].plain)
    is_three = study.read(shown[0])[1].argmax(-1) == THREE
    seeds = torch.cat((is_three.nonzero()[:threes, 0], (~is_three).nonzero()[:rest, 0]))
    gap = torch.full((32, 12), 255, dtype=torch.uint8)
    lines = []
    for cell in shown:
        pictures = list(study.draw(cell)["pictures"][seeds])
        lines.append(torch.cat([*pictures[:threes], gap, *pictures[threes:]], 1))
    axis.imshow(torch.cat(lines), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    names = [cell.settings.replace(", prior", ",\nprior") for cell in shown]
    axis.set_yticks([16 + 32 * place for place in range(len(shown))], names, fontsize=8)
    axis.set_xticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    title = (
        f"“{OPEN}”, away from “{avoiding(THREE)}”, Euler ancestral, CFG 3: the same seed in each column\n"
        f"left: the first {threes} that draw a three without guidance; right: the first {rest} that do not"
    )
    axis.set_title(title, fontsize=10)


def posterior(document: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    def found(sampler: str, watched: bool) -> dict[str, Any]:
        return next(
            r for r in document["rows"]
            if (r["sampler"], r["cfg"]) == (sampler, CFG) and r["avoid"].startswith("by seed") and r.get("posterior")
            and (r["method"]["scale"] == 0) == watched and r["method"]["scale"] in (0, 10)
        )  # fmt: skip

    panels = (
        ("Euler ancestral (exact)\nwatched only: scale 0", EXACT, True),
        ("Euler ancestral (exact)\nguided: scale 10", EXACT, False),
        ("Euler (surrogate)\nguided: scale 10", SURROGATE, False),
    )
    groups = {"members": ("#D55E00", "show it without guidance"), "others": ("#0072B2", "show another digit")}
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.3), sharex=True, sharey=True, layout="constrained")
    for axis, (title, sampler, watched) in zip(axes, panels, strict=True):
        row = found(sampler, watched)
        for name, (colour, label) in groups.items():
            of = row["posterior"][name]
            steps = range(len(of["p50"]))
            axis.fill_between(steps, of["p10"], of["p90"], color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, of["p50"], color=colour, label=label)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("after step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("p, the estimate that the\nimage shows what to avoid")
    unrelated = next(r for r in document["rows"] if r["prompt"] == UNRELATED and r.get("posterior"))["posterior"]["others"]
    axes[1].plot(unrelated["p50"], color="#555555", linestyle="--", label=f"“{UNRELATED}”, away from “{avoiding(THREE)}”")
    axes[0].set_ylim(5e-7, 1)
    axes[0].set_xticks(range(0, STEPS + 1, 5))
    handles, labels = axes[1].get_legend_handles_labels()
    title = "median, and 10th to 90th percentile, of the images that"
    figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=3, title=title, title_fontsize=9)
    row = found(EXACT, False)["method"]
    about = f"prior {row['prior']:g}, tau {row['tau']:g}; {document['rows'][0]['images']} images a panel"
    figure.suptitle(f"The posterior over the steps: {about}")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    app()
