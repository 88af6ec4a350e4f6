"""The tables of docs/evidence.md, from ``bench/results/evidence``; ``bench/tables.py`` writes them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from negengine.evaluate.tables import AGREEING, NO_WIDTH

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "evidence"
DOCUMENT = ROOT / "docs" / "evidence.md"
Row = Mapping[str, Any]

LOOKS = {
    "distinct:people-look": "distinct looks of 4 ↑",
    "label-entropy:people-gender": "gender, bits ↑",
    "label-entropy:people-tone": "tone, bits ↑",
    "label-entropy:people-style": "style, bits ↑",
}
COST = {"as-prompted": "profession as prompted ↑", "fid": "FID, all looks ↓", "fid biased": "FID, biased world ↓"}
AWAY = {
    "asset-similarity": "similarity of features ↓",
    "asset-correlation": "correlation of pixels ↓",
    "forbidden:people-look": "very look of the character ↓",
    "as-prompted": "profession as prompted ↑",
    "reference-distance": "distance to real pictures ↓",
}
REMOVED = {
    "forbidden": "forbidden style ↓",
    "kl": "KL of the rest, bits ↓",
    "fid": "FID, allowed ↓",
    "as-prompted": "profession and tone as prompted ↑",
}
STYLES = {f"forbidden {style}": f"{style} where forbidden ↓" for style in ("fluent", "noto", "twemoji")}
PROMPTED = {
    "prompt-probability:people-everything": "probability of all that is named ↑",
    "as-prompted:people-everything": "all as named ↑",
    "profession as prompted": "profession ↑",
    "gender as prompted": "gender ↑",
    "tone as prompted": "tone ↑",
    "style as prompted": "style ↑",
    "reference-distance": "distance to real pictures ↓",
}


@functools.cache
def document(part: str) -> dict[str, Any] | None:
    path = RESULTS / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def measured(part: str) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[], str]]:
    """A table of a part's results, or that there are none."""

    def wrap(make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
        def table() -> str:
            told = document(part)
            if told is None:
                return f"*Not measured yet: `python bench/evidence.py --part {part}`.*\n"
            return make(told)

        return table

    return wrap


def grid(told: Mapping[str, Any], job: str, columns: Mapping[str, str], head: str = "") -> str:
    """Variants by metrics: means, for the base with their interval, for the others with the difference and its interval."""
    rows = [row for row in told["rows"] if row["job"] == job]
    found = {(row["variant"], row["metric"]): row for row in rows}
    there = {key: title for key, title in columns.items() if any(metric == key for _, metric in found)}
    lines = [f"| {' | '.join([head, *there.values()])} |", "| --- |" + " ---: |" * len(there)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        lines.append(f"| {variant} | " + " | ".join(cell(found[variant, metric], metric) for metric in there) + " |")
    return "\n".join(lines) + "\n"


def cell(row: Row, metric: str) -> str:
    """``2.55, +0.30 [+0.11, +0.49]``; bold where the interval of the difference does not hold 0."""
    difference = row["difference"]
    if difference is None:
        return f"{number(row['mean'], metric)}{between(row, metric)}"
    shown = f"{signed(difference['mean'], metric)}{between(difference, metric, sign='+')}"
    return f"{number(row['mean'], metric)}, " + (f"**{shown}**" if sure(difference) else shown)


def sure(difference: Row) -> bool:
    low, high = difference["low"], difference["high"]
    if low is None or low <= 0 <= high:
        return False
    return high - low >= NO_WIDTH or difference.get("units", 0) >= AGREEING


def is_share(metric: str) -> bool:
    return metric.startswith(("forbidden", "as-prompted")) or metric.endswith("as prompted")


def number(value: float, metric: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} %" if is_share(metric) else f"{value:{sign}.{0 if abs(value) >= 100 else 2}f}"


def signed(value: float, metric: str) -> str:
    return number(value, metric, "+")


def between(row: Row, metric: str, sign: str = "") -> str:
    if row["low"] is None:
        return ""
    low, high = (number(row[end], metric, sign).replace(" %", "") for end in ("low", "high"))
    return f" [{low}, {high}]"


def foot(told: Mapping[str, Any], job: str | None = None) -> str:
    """With what a table can be made again; the seeds are those of a job, of the part's first by default."""
    sizes = told["settings"][job or next(iter(told["settings"]))]["size"]
    about = f"{told['machine']['processor']}, torch {told['versions']['torch']}, {told['date']}"
    seeds = ", ".join(map(str, sizes["seeds"]))
    return f"\n`python bench/evidence.py --part {told['part']}`: {told['images']} images, seeds {seeds}; {about}.\n"


def _images(told: Mapping[str, Any], job: str) -> str:
    of_job = told["settings"][job]
    prompts, images, seeds = len(of_job["prompts"]), of_job["size"]["images"], len(of_job["size"]["seeds"])
    return f"{prompts} prompts, groups of {images}, {seeds} seeds: {prompts * images * seeds} images of each variant."


@measured("a")
def modes(told: dict[str, Any]) -> str:
    return grid(told, "flux", LOOKS | COST, "people-flux") + f"\n{_images(told, 'flux')}\n" + foot(told)


@measured("rivals")
def rivals(told: dict[str, Any]) -> str:
    return grid(told, "sdxl", LOOKS | COST, "people-sdxl") + f"\n{_images(told, 'sdxl')}\n" + foot(told)


@measured("a")
def alphas(told: dict[str, Any]) -> str:
    text = "![diversity and fidelity over alpha and over guidance](evidence-diversity.png)\n\n"
    return text + grid(told, "alpha", LOOKS | COST, "reference, matching, alpha") + f"\n{_images(told, 'alpha')}\n" + foot(told)


@measured("a")
def guidance(told: dict[str, Any]) -> str:
    """Each scale with and without NegToMe; differences are from the run without at the same scale."""
    by_scale = regrouped(told["rows"])
    columns = LOOKS | COST
    found = {(row["variant"], row["metric"]): row for row in by_scale}
    lines = [f"| guidance scale | {' | '.join(columns.values())} |", "| --- |" + " ---: |" * len(columns)]
    for variant in dict.fromkeys(row["variant"] for row in by_scale):
        lines.append(f"| {variant} | " + " | ".join(cell(found[variant, metric], metric) for metric in columns) + " |")
    return "\n".join(lines) + f"\n\n{_images(told, 'guidance')} Differences are from the same scale without.\n" + foot(told)


def regrouped(rows: Sequence[Row]) -> list[Row]:
    """Rows of the job ``guidance``, the run without NegToMe at each scale being the base of the one with it."""
    found = []
    of_job = [row for row in rows if row["job"] == "guidance"]
    for row in of_job:
        name, _, scale = row["variant"].partition(", ")
        base = next(one for one in of_job if (one["variant"], one["metric"]) == (f"without, {scale}", row["metric"]))
        difference = None if name == "without" else contrast(row, base)
        found.append({**row, "variant": f"{scale}, {name}", "difference": difference})
    return found


def contrast(row: Row, base: Row) -> dict[str, float | None]:
    """The difference of two rows, paired by what they have in common, with its interval."""
    import dataclasses

    from laboratory.numbers import paired

    return dataclasses.asdict(paired(row["values"], base["values"]))


@measured("b")
def asset(told: dict[str, Any]) -> str:
    text = ""
    for names in ("profession", "everything"):
        for model in models_of(told, f", {names}"):
            text += grid(told, f"{model}, {names}", AWAY, f"{model}, the prompt names {'the ' * (names[0] == 'p')}{names}") + "\n"
    one = next(job for job in told["settings"] if job.startswith(models_of(told, ", profession")[0]))
    characters = len({job.rpartition(", ")[2] for job in told["settings"]})
    return text + f"{characters} characters, each: {_images(told, one)} Intervals hold for these characters.\n" + foot(told)


@measured("c")
def removal(told: dict[str, Any]) -> str:
    plot = "\n![what is left of what is forbidden, against what else changed](evidence-removal.png)\n"
    models = models_of(told, "removal, ")
    text = "\n".join(grid(told, f"removal, {model}", REMOVED | STYLES, model) for model in models)
    return text + f"\n{_images(told, f'removal, {models[0]}')}\n" + foot(told) + plot


@measured("c")
def posterior(told: dict[str, Any]) -> str:
    """DNG's estimate at some steps, as medians."""
    lines = ["| | images | at the start | after 5 steps | after 10 | at the end |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, groups in told["posterior"].items():
        for group, of in groups.items():
            steps = len(of["p50"]) - 1
            shown = " | ".join(f"{of['p50'][min(step, steps)]:.2g}" for step in (0, 5, 10, steps))
            lines.append(f"| {name}, those that {group} | {of['images']} | {shown} |")
    watched = next(job for job in told["settings"] if job.startswith("related"))
    return "\n".join(lines) + "\n" + foot(told, watched) + "\n![DNG's estimate over the steps](evidence-posterior.png)\n"


@measured("d")
def prompted(told: dict[str, Any]) -> str:
    return grid(told, "pairs", PROMPTED, "people-flux") + f"\n{_images(told, 'pairs')}\n" + foot(told)


@measured("d")
def pairs(told: dict[str, Any]) -> str:
    """As the supplement of DNP has them: how often each is chosen."""
    text = ""
    for table in told["pairs"]:
        against = f"without and {table['opponent']}" if table["opponent"] else "without"
        lines = [f"| DNP against {against}: best picture | correctness | quality |", "| --- | ---: | ---: |"]
        for choice in table["choices"]:
            cells = (
                f"{number(one['mean'], 'forbidden')}{between(one, 'forbidden')}"
                for one in (choice["correctness"], choice["quality"])
            )
            lines.append(f"| {choice['who']} | {' | '.join(cells)} |")
        text += "\n".join(lines) + "\n\n"
    return text + f"{told['pairs'][0]['pictures']} pictures of each.\n" + foot(told)


@measured("e")
def together(told: dict[str, Any]) -> str:
    columns = {"forbidden": REMOVED["forbidden"]} | LOOKS | {"as-prompted": REMOVED["as-prompted"], "kl": REMOVED["kl"]}
    text = "\n".join(grid(told, f"DNG, {model}", columns, f"{model}, with DNG") for model in models_of(told, "DNG, "))
    nag = "\n".join(grid(told, f"NAG, {model}", columns, f"{model}, with NAG in four steps") for model in models_of(told, "NAG, "))
    return f"{text}\n{nag}\n{_images(told, next(iter(told['settings'])))}\n" + foot(told)


def models_of(told: Mapping[str, Any], part: str) -> list[str]:
    """The models in the names of jobs, beside ``part``."""
    return list(dict.fromkeys(row["job"].replace(part, "") for row in told["rows"] if part in row["job"]))


def gallery() -> str:
    if not (DOCUMENT.parent / "gallery.html").exists():
        return "*The gallery is not drawn yet: `python bench/evidence.py --part gallery`.*\n"
    shown = "[The gallery](gallery.html) shows the pictures, with a slider for each method's strength."
    return f"{shown} Download it and open it in a browser.\n"


def claims() -> str:
    import evidence_claims

    return evidence_claims.table(document)


TABLES = {
    f"evidence {name}": (DOCUMENT, make)
    for name, make in {
        "claims": claims, "gallery": gallery, "modes": modes, "rivals": rivals, "alphas": alphas, "guidance": guidance,
        "asset": asset, "removal": removal, "posterior": posterior, "prompted": prompted, "pairs": pairs, "together": together,
    }.items()
}  # fmt: skip
