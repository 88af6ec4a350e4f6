"""Write the tables of README.md and docs from the files of bench/results: ``python bench/tables.py``.

A table lies between two marks, so that no figure is copied by hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evidence_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
SHAPES = ("sdxl-32", "sdxl-64", "flux-768", "flux-1024")
Row = Mapping[str, Any]
BEST = "best plain PyTorch"  # whichever of lean and lean + compile was faster

OPERATOR = (  # label, file, dtype, variant
    ("bfloat16, `auto` (int8, best scored again exactly)", "operator", "bf16", "cpu auto"),
    ("bfloat16, `exact`", "operator", "bf16", "cpu exact"),
    ("float32, `auto` (exact)", "operator", "fp32", "cpu auto"),
    ("float32, `bf16`, best scored again", "operator", "fp32", "cpu bf16"),
    ("float32, `int8`, best scored again", "operator", "fp32", "cpu int8"),
    ("float32, AVX2 only (7 rounds)", "operator-avx2", "fp32", "cpu auto"),
)
TARGETS = (  # what we aim at, measured on 2 cores of Zen 5: label, file, dtype, variant, rival, the aim at each shape
    ("bfloat16, exact / bare product", "operator", "bf16", "cpu exact", "gemm", (1.0, 1.3, 1.05, 1.15)),
    ("bfloat16, exact / release", "operator", "bf16", "cpu exact", "release", (3.5, 5.5, 6.5, 7)),
    ("bfloat16, int8 / release", "operator", "bf16", "cpu auto", "release", (6, 10, 12, 13)),
    ("bfloat16, int8 / lean, compiled", "operator", "bf16", "cpu auto", "lean + compile", (2.2, 3, 2.2, 2.6)),
    ("float32, exact / bare product", "operator", "fp32", "cpu auto", "gemm", (2.1, 2.1, 2.1, 2.1)),
    ("float32, exact / release", "operator", "fp32", "cpu auto", "release", (4.2, 8.5, 7.1, 5.8)),
    ("float32, bf16 / bare product", "operator", "fp32", "cpu bf16", "gemm", (4.2, 4.2, 4.2, 4.2)),
    ("float32, bf16 / release", "operator", "fp32", "cpu bf16", "release", (8, 15, 14, 11)),
    ("float32, int8 / release", "operator", "fp32", "cpu int8", "release", (14, 28, 26, 22)),
    ("float32, AVX2 only / release", "operator-avx2", "fp32", "cpu auto", "release", (2.3, 4.2, 3.7, 3.1)),
    ("bfloat16, exact: share of the peak", "operator", "bf16", "cpu exact", "peak", (None, 0.95, 0.95, 0.95)),
)
MEMORY = (
    ("bfloat16, exact, MB at flux-1024", "bf16", "cpu exact", 26),
    ("float32, exact, MB at flux-1024", "fp32", "cpu auto", 40),
)


@functools.cache
def document(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


@functools.cache
def on_gpus() -> dict[str, list[Row]]:
    """Rows of the operator benchmark of each GPU that has results: folder -> rows."""
    found = sorted(RESULTS.parent.glob("*/operator.json"))
    return {path.parent.name: json.loads(path.read_text())["rows"] for path in found if path.parent != RESULTS}


def case(name: str, dtype: str, variant: str, matching: str = "paper", gate: str = "half") -> list[Row]:
    """A variant's rows at the four shapes."""
    wanted = {"dtype": dtype, "variant": variant, "matching": matching, "gate": gate}
    found = {row["shape"]: row for row in document(name)["rows"] if wanted.items() <= row.items()}
    return [found[shape] for shape in SHAPES]


def across(rows: Sequence[Row], value: Callable[[Row], float], form: str = ".2f") -> str:
    return " / ".join(format(value(row), form) for row in rows)


def ratio(rival: str) -> Callable[[Row], float]:
    if rival == "peak":
        return lambda row: row["peak_reached"]
    if rival == BEST:
        return lambda row: min(value for name, value in row["ratio"].items() if name.startswith("lean"))
    return lambda row: row["ratio"][rival]


def operator() -> str:
    lines = [
        f"| tokens, search | ours, ms | release / ours | {BEST} / ours | bare matrix product / ours | of peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, *which in OPERATOR:
        rows = case(*which)
        ratios = [across(rows, ratio(rival)) for rival in ("release", BEST, "gemm", "peak")]
        lines.append(f"| {label} | {across(rows, lambda row: 1e3 * row['median'], ',.0f')} | {' | '.join(ratios)} |")

    def megabytes(dtype: str, variant: str) -> str:
        return across(case("operator", dtype, variant), lambda row: row["extra_bytes"] / 1e6, ",.0f")

    bare = [across(case("operator", dtype, "gemm"), ratio("peak")) for dtype in ("bf16", "fp32")]
    auto, exact, single = (megabytes(*which) for which in (("bf16", "cpu auto"), ("bf16", "cpu exact"), ("fp32", "cpu auto")))
    release = [megabytes(dtype, "release") for dtype in ("bf16", "fp32")]
    return "\n".join(lines) + (
        f"\n\nThe bare product of the library reaches {bare[0]} of the peak in bfloat16 and {bare[1]} in float32:\n"
        "an exact search cannot be faster than one over that.\n"
        f"Memory that a call adds, MB: bfloat16 {auto} (`auto`), {exact} (`exact`), release {release[0]};\n"
        f"float32 {single}, release {release[1]}.\n"
        f"{drift()}\n"
    )


def drift() -> str:
    """How steady the machine was."""
    cases = {row["case"]: row for row in document("operator")["rows"]}
    moved = [row["peak_drift"] for row in cases.values() if row["warning"]]
    if not moved:
        return "The loop of the bare instruction moved by less than 10 % in each table."
    return (
        f"The machine is shared: in {len(moved)} of {len(cases)} tables the loop of the bare instruction moved by"
        f" {min(moved):.0%} to {max(moved):.0%} from before to after,\n"
        "so trust the ratios, which are of one interleaved run, more than the rates."
    )


def end_to_end() -> str:
    lines = ["| | without, s | ours | published algorithm | noise |", "| --- | ---: | ---: | ---: | ---: |"]
    cases: dict[str, dict[str, Row]] = {}
    for row in document("pipelines")["rows"]:
        cases.setdefault(f"{row['pipeline']}, {row['images']} images, {row['steps']} steps", {})[row["variant"]] = row
    for row in document("stacks")["rows"]:
        dtype = {"bf16": "bfloat16", "fp32": "float32"}[row["dtype"]]
        name = f"a transformer block of SDXL at its width, {row['batch']} x {row['tokens']} x {row['channels']}, {dtype}"
        cases.setdefault(name, {})[row["variant"]] = row
    for name, found in cases.items():
        without, ours, published = found["without"], found["cpu auto"], found["published"]
        shares = " | ".join(f"{value:+.1%}" for value in (ours["overhead"], published["overhead"]))
        lines.append(f"| {name} | {without['median']:.2f} | {shares} | {without['noise']:.1%} |")
    return "\n".join(lines) + "\n"


def methods() -> str:
    head = ("", "method", "seconds", "replaces", "share of its time", "in our own code, ms per step")
    lines = [f"| {' | '.join(head)} |", "| --- | --- | ---: | --- | ---: | ---: |"]
    for row in document("methods")["rows"]:
        without = row["method"] == "without"
        name = f"{row['pipeline']}, {row['images']} images, {row['steps']} steps" if without else ""
        inside = "" if row["inside"] is None else f"{1e3 * row['inside']:.2f}"
        replaces = "" if row["inside"] is None else row["replaces"]
        spread = (row["p90"] - row["p10"]) / 2 / row["median"]
        share = f"rounds ±{spread:.0%}" if without else f"{row['overhead']:+.1%}"
        lines.append(f"| {name} | {row['method']} | {row['median']:.2f} | {replaces} | {share} | {inside} |")
    return "\n".join(lines) + "\n"


def targets() -> str:
    lines = ["| | aim | measured |", "| --- | ---: | ---: |"]
    for label, name, dtype, variant, rival, aims in TARGETS:
        values = [ratio(rival)(row) for row in case(name, dtype, variant)]
        shown = [f"**{v:.2f}**" if aim is not None and v >= aim else f"{v:.2f}" for v, aim in zip(values, aims, strict=True)]
        lines.append(f"| {label} | {' / '.join('–' if aim is None else f'{aim:g}' for aim in aims)} | {' / '.join(shown)} |")
    for label, dtype, variant, most in MEMORY:
        used = case("operator", dtype, variant)[-1]["extra_bytes"] / 1e6
        lines.append(f"| {label} | at most {most} | {f'**{used:.0f}**' if round(used) <= most else f'{used:.0f}'} |")
    bf16, fp32 = (across(case("operator", dtype, "release"), lambda row: 1 / row["peak_reached"]) for dtype in ("bf16", "fp32"))
    return "\n".join(lines) + (
        f"\n\nThe release itself takes {bf16} times the time at the peak in bfloat16 and {fp32} in float32:\n"
        "here no exact kernel can be faster than it by more.\n"
    )


HOST = (  # of a merging block: label, part, and the part before it, which it holds as well
    ("inactive step: the hook, which reads one attribute", "inactive", "empty"),
    ("active step: the hook, its rows and image tokens", "hook", "empty"),
    ("NegToMe: grid, plan, arguments", "effect", "hook"),
    ("the operator: checks, choice of the backend", "operator", "effect"),
    ("**a merging block without its backend**", "operator", "empty"),
    ("the backend's arguments, no search", "backend", "operator"),
    ("all of a merging block", "backend", "empty"),
)
IN_A_ROW = (
    "hook, inactive", "hook, active, nothing to do", "negtome_, tensors", "negtome_, numbers", "negtome_, tensors, with kernels",
    "nag_", "guide", "evidence", "NAG, a block", "DNG, the prediction", "DNG, the update",
)  # fmt: skip


def host() -> str:
    """Microseconds: median, and the least."""
    whole = document("host")
    found = {(row["case"], row["part"]): row for row in whole["rows"]}

    def shown(case: str, part: str, less: str | None = None) -> str:
        figures = [found[case, part][of] - (found[case, less][of] if less else 0) for of in ("median", "least")]
        return " / ".join(f"{1e6 * figure:.1f}" for figure in figures)

    machine = whole["machine"]
    rounds = whole["rows"][0]["rounds"]
    lines = ["| in a model, us: median / least | FLUX | SDXL |", "| --- | ---: | ---: |"]
    lines += [f"| {label} | {shown('flux', part, less)} | {shown('sdxl', part, less)} |" for label, part, less in HOST]
    lines += ["", "| calls in a row, us: median / least | |", "| --- | ---: |"]
    lines += [f"| {part} | {shown('calls in a row', part)} |" for part in IN_A_ROW]
    return "\n".join(lines) + (
        f"\n\n{machine['processor']}, {machine['cores']} cores, python {whole['versions']['python']}, torch"
        f" {whole['versions']['torch']}, {whole['date']}; {rounds} rounds.\n"
    )


GPU, OTHER = "h200", "h100-80gb-hbm3"  # whose results the docs show, and whose beside them


def on_a_gpu(name: str, gpu: str = GPU) -> dict[str, Any]:
    return json.loads((RESULTS.parent / gpu / f"{name}.json").read_text())


def gpu_operator() -> str:
    """In microseconds: ours, fallback, rivals, at the four shapes."""
    lines = ["| | sdxl-32 | sdxl-64 | flux-768 | flux-1024 |", "| --- | ---: | ---: | ---: | ---: |"]
    rows, other = ({(row["shape"], row["variant"]): row for row in on_a_gpu("operator", gpu)["rows"]} for gpu in (GPU, OTHER))
    for label, variant in (
        ("**ours, default (Triton, exact)**", "triton auto"),
        ('ours, `search="fp8"`', "triton fp8"),
        ("ours, where Triton is not to be had (`torch`)", "torch auto"),
        ("the release", "release"),
        ("best plain PyTorch, not compiled", "lean"),
        ("bare matrix product, no merge", "gemm"),
    ):
        lines.append(f"| {label} | " + " | ".join(f"{1e6 * rows[shape, variant]['median']:,.0f}" for shape in SHAPES) + " |")
    for label, rival in (("release / ours", "release"), ("bare product / ours", "gemm")):
        for where, found in (("", rows), (", H100", other)):
            shown = " | ".join(f"{found[shape, 'triton auto']['ratio'][rival]:.2f}" for shape in SHAPES)
            lines.append(f"| {label}{where} | {shown} |")
    return "\n".join(lines) + "\n"


def gpu_denoisers() -> str:
    lines = [
        "| 1024 x 1024, 4 images | without, ms | ours | published algorithm | ours in PyTorch "
        "| scaled to the loop: ours | published | ours in PyTorch | the same without, again |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {(row["model"], row["compiled"], row["variant"]): row for row in on_a_gpu("denoisers")["rows"]}
    for model, compiled, label in (
        ("flux-dev", False, "FLUX.1-dev, 7 of 25 steps merge"),
        ("sdxl-base", False, "SDXL, 13 of 50 steps merge"),
        ("sdxl-base", True, "SDXL, its blocks compiled"),
    ):
        variants = [rows[model, compiled, variant] for variant in ("triton auto", "published", "torch auto")]
        shown = " | ".join(f"{row[share]:+.1%}" for share in ("overhead", "loop_overhead") for row in variants)
        without, again = (rows[model, compiled, variant] for variant in ("without", "without (again)"))
        lines.append(f"| {label} | {1e3 * without['median']:.0f} | {shown} | {again['overhead']:+.1%} |")
    return "\n".join(lines) + "\n"


def gpu_guidance() -> str:
    """Microseconds in bfloat16."""
    rows = [row for row in on_a_gpu("guidance")["rows"] if row["dtype"] == "bf16" and row["variant"] == "triton"]
    lines = ["| operator, shape | floor, us | ours, us | plain / ours | plain + compile / ours |", "| --- |" + " ---: |" * 4]
    for row in rows:
        times = f"{1e6 * row['floor']:.1f} | {1e6 * row['median']:.1f}"
        ratios = " | ".join(f"{row['ratio'][rival]:.1f}" for rival in ("plain", "plain + compile"))
        lines.append(f"| {row['operator']}, {' x '.join(map(str, row['shape']))} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


BESIDE = ((8, 256, 4), (4, 1024, 4), (1, "all", 2))  # what was there before, and whole rows in registers


def gpu_rows() -> str:
    """Microseconds of norms and merge by rows, channels at once and warps."""
    document = on_a_gpu("rows", OTHER)
    lines = ["| kernel | rows x channels, warps | " + " | ".join(SHAPES) + " |", "| --- | --- |" + " ---: |" * len(SHAPES)]
    for row in (row for row in document["rows"] if row["chosen"] or (row["rows"], row["channels"], row["warps"]) in BESIDE):
        chosen = "**" if row["chosen"] else ""
        figures = " | ".join(f"{row['us'][shape]:.1f}" for shape in SHAPES)
        lines.append(f"| {row['kernel']} | {chosen}{row['rows']} x {row['channels']}, {row['warps']}{chosen} | {figures} |")
    return "\n".join(lines) + "\n"


PREDICTED = "predicted.json"


@functools.cache
def predictions() -> dict[str, Any]:
    return json.loads((RESULTS.parent / PREDICTED).read_text())


def measured(row: Row) -> tuple[str, str]:
    """Milliseconds of the exact search with its merge, and bare product over it, on a GPU of a prediction."""
    for folder, rows in on_gpus().items():
        if row["results"] in folder:
            wanted = {"shape": row["shape"], "dtype": row["dtype"], "matching": "paper", "gate": "half", "backend": "triton"}
            for found in rows:
                if wanted.items() <= found.items() and found["search"] in ("auto", "exact"):
                    return f"{1e3 * found['median']:.3f}", f"{found['ratio']['gemm']:.2f}"
    return ("not yet measured",) * 2


def predicted() -> str:
    columns = ["GPU", "shape", "tile, warps", "registers", "instructions: step, prologue, epilogue", "exposed cycles of a tile"]
    columns += ["fill", "norms + match + merge, us", "product, ms: predicted", "whole call, ms: predicted", "measured"]
    columns += ["product / whole: predicted", "measured"]
    lines = [
        f"Predicted from the sources {predictions()['fingerprint']}, Triton {predictions()['triton']}: bfloat16, matching `paper`,"
        " mode `first`, 4 images, half of the tokens merged.\n",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for row in predictions()["rows"]:
        seconds, counts = row["seconds"], row["instructions"]
        parts = " + ".join(f"{1e6 * seconds[name]:.0f}" for name in ("norms", "match", "merge"))
        cells = [
            row["machine"], row["shape"], f"{' x '.join(map(str, row['tile']))}, {row['warps']}", row["registers"],
            ", ".join(str(counts[name]) for name in ("step", "prologue", "epilogue")), f"{row['cycles']['exposed']:,.0f}",
            f"{row['fill']:.2f}", parts, f"{1e3 * seconds['product']:.3f}", f"{1e3 * seconds['whole']:.3f}", measured(row)[0],
            f"{row['ratio']:.2f}", measured(row)[1],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def sensitivity() -> str:
    names = list(predictions()["rows"][0]["sensitivity"])
    lines = [f"| GPU | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for row in predictions()["rows"]:
        if row["shape"] == "flux-1024":
            moved = (f"{row['sensitivity'][name]:+.2f}" for name in names)
            lines.append(f"| {row['machine']} | {' | '.join(moved)} |")
    return "\n".join(lines) + "\n"


def guidance() -> str:
    """Milliseconds of ours and ratios, one row an operator and shape, its dtypes side by side."""
    dtypes = ("fp32", "bf16", "fp16")
    found = {(row["operator"], tuple(row["shape"]), row["dtype"], row["variant"]): row for row in document("guidance")["rows"]}
    columns = ["operator, shape", "floor, MB", "ours, ms", "plain / ours", "predicted", "plain + compile / ours", "predicted"]
    columns.append("floor / ours")
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for operator, shape in dict.fromkeys(key[:2] for key in found):
        rows = [found[operator, shape, dtype, "cpu"] for dtype in dtypes]
        guesses = [f"{rows[0]['predicted'][rival]:.1f}" for rival in ("plain", "plain + compile")]
        cells = [
            f"{operator}, {' x '.join(map(str, shape))}", across(rows, lambda row: row["bytes"] / 1e6, ".1f"),
            across(rows, lambda row: 1e3 * row["median"]), across(rows, ratio("plain"), ".1f"), guesses[0],
            across(rows, ratio("plain + compile"), ".1f"), guesses[1], across(rows, lambda row: row["floor_reached"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    whole = document("guidance")
    copies = [row["copy"] / 1e9 for row in whole["rows"]]
    noise = sorted(row["noise"] for row in whole["rows"])
    machine = whole["machine"]
    return "\n".join(lines) + (
        f"\n\n{machine['processor']}, {machine['threads']} threads, {whole['isa']}, torch {whole['versions']['torch']},"
        f" {whole['date']}.\nA copy of 256 MB reached {min(copies):.1f} to {max(copies):.1f} GB/s from case to case; the same"
        f" variant timed twice differed by {noise[len(noise) // 2]:.0%}\nin the median case and by {noise[-1]:.0%} in the worst.\n"
    )


def guidance_measured(prediction: Row) -> str:
    """Microseconds on a GPU of a prediction."""
    folder = next(row["results"] for row in predictions()["rows"] if row["machine"] == prediction["machine"])
    wanted = {"operator": prediction["operator"], "shape": prediction["shape"], "dtype": "bf16", "variant": "triton"}
    for path in sorted(RESULTS.parent.glob("*/guidance.json")):
        if folder in path.parent.name:
            for found in json.loads(path.read_text())["rows"]:
                if wanted.items() <= found.items():
                    return f"{1e6 * found['median']:.1f}"
    return "not yet measured"


def guidance_predicted() -> str:
    rows = predictions()["guidance"]
    lines = [
        f"Predicted from the sources {predictions()['fingerprint']}, Triton {predictions()['triton']}: bfloat16, and a launch.\n",
        "| GPU | operator, shape | floor, MB | floor, us | predicted, us | measured |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        name = f"{row['operator']}, {' x '.join(map(str, row['shape']))}"
        figures = f"{row['bytes'] / 1e6:.1f} | {1e6 * row['floor']:.1f} | {1e6 * row['seconds']:.1f}"
        lines.append(f"| {row['machine']} | {name} | {figures} | {guidance_measured(row)} |")
    return "\n".join(lines) + "\n"


BY_SEED = "by seed"  # images with an even seed avoid the digit that they show without guidance, the others another one
GROUPS = (  # of DNG's study: label, sampler, scale of classifier-free guidance
    ("Euler ancestral, CFG 3", "Euler ancestral", 3.0),
    ("Euler ancestral, no CFG", "Euler ancestral", 1.0),
    ("Euler, CFG 3, surrogate", "Euler", 3.0),
)
PAIRS = (  # of its rows that leave about as many: label, group, scale of DNG, of negative prompting
    ("CFG 3, scales 10 and 0.5", GROUPS[0], 10, 0.5),
    ("CFG 3, scales 5 and 0.25", GROUPS[0], 5, 0.25),
    ("no CFG, scales 5 and 0.25", GROUPS[1], 5, 0.25),
)
AWAY = "a handwritten three"


def dng_rows(sampler: str, cfg: float, prompt: str = "a digit", avoid: str = BY_SEED) -> list[Row]:
    """Of one group, without its run that only reports."""
    wanted = {"sampler": sampler, "cfg": cfg, "prompt": prompt}
    rows = [row for row in document("dng")["rows"] if wanted.items() <= row.items() and row["avoid"].startswith(avoid)]
    return [row for row in rows if not row["cell"].startswith("DNG, scale 0,")]


def short(row: Row) -> str:
    """``DNG, scale 10`` of a cell that names all settings."""
    return re.sub(r"(scale [\d.]+),.*", r"\1", row["cell"])


def change(row: Row) -> str:
    return "0" if row["cell"] == "without" else f"{row['change']:.3f} ± {row['change_error']:.3f}"


def pixels(row: Row) -> str:
    return "0" if row["cell"] == "without" else f"{row['pixel_change']:.3f}"


def dng() -> str:
    lines = [
        "| | still show it, of 100 | keep their digit, of 100 | change of these 100 | pixels | confidence | Fréchet |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, sampler, cfg in GROUPS:
        for row in dng_rows(sampler, cfg):
            name = f"**{label}**" if row["cell"] == "without" else short(row)
            figures = (
                f"{row['stayed']} | {row['kept']} | {change(row)} | {pixels(row)} | {row['confidence']:.3f} | {row['frechet']:.0f}"
            )
            lines.append(f"| {name} | {figures} |")
    return "\n".join(lines) + "\n"


def kept_alone(one: Row, other: Row, plain: Row) -> tuple[int, int]:
    """Of the images with an odd seed, how many keep the digit of ``plain`` in the first row only, and in the second only."""
    read = [(a == c, b == c) for a, b, c in zip(one["read"], other["read"], plain["read"], strict=True)][1::2]
    return sum(a and not b for a, b in read), sum(b and not a for a, b in read)


def dng_alone() -> str:
    lines = ["| keep their digit, of 100, | with DNG alone | with negative prompting alone |", "| --- | ---: | ---: |"]
    for label, (_, sampler, cfg), dynamic, constant in PAIRS:
        rows = {short(row): row for row in dng_rows(sampler, cfg)}
        names = f"DNG, scale {dynamic:g}", f"negative prompting, scale {constant:g}", "without"
        ours, theirs = kept_alone(*(rows[name] for name in names))
        lines.append(f"| {label} | {ours} | {theirs} |")
    return "\n".join(lines) + "\n"


def dng_three() -> str:
    plain = dng_rows("Euler ancestral", 3.0)[0]
    rows = dng_rows("Euler ancestral", 3.0, avoid=AWAY)
    others = rows[0]["others"]
    lines = [
        f'| "a digit", away from "{AWAY}" (Euler ancestral, CFG 3) | threes of {rows[0]["images"]} | others that keep their digit,'
        f" of {others} | change | Vendi |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| without | {rows[0]['members']} | {others} | 0 | {plain['vendi']:.2f} |",
    ]
    lines += [f"| {short(row)} | {row['avoided']} | {row['kept']} | {change(row)} | {row['vendi']:.2f} |" for row in rows]
    return "\n".join(lines) + "\n"


def dng_seven() -> str:
    rows = dng_rows("Euler ancestral", 3.0, "a handwritten seven", AWAY)
    lines = [
        f'| "a handwritten seven", away from "{AWAY}" | sevens of {rows[0]["images"]} | change | pixels |',
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {short(row)} | {row['read'].count('7')} | {change(row)} | {pixels(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


TABLES = {
    "dng": (ROOT / "docs" / "dng.md", dng),
    "dng alone": (ROOT / "docs" / "dng.md", dng_alone),
    "dng three": (ROOT / "docs" / "dng.md", dng_three),
    "dng seven": (ROOT / "docs" / "dng.md", dng_seven),
    "guidance": (ROOT / "docs" / "guidance-kernels.md", guidance),
    "guidance predicted": (ROOT / "docs" / "guidance-kernels.md", guidance_predicted),
    "predicted": (ROOT / "docs" / "predicted.md", predicted),
    "sensitivity": (ROOT / "docs" / "predicted.md", sensitivity),
    "operator": (ROOT / "docs" / "measured.md", operator),
    "methods": (ROOT / "docs" / "measured.md", methods),
    "end to end": (ROOT / "docs" / "measured.md", end_to_end),
    "targets": (ROOT / "docs" / "kernels.md", targets),
    "host": (ROOT / "docs" / "host-cost.md", host),
    "gpu operator": (ROOT / "docs" / "measured.md", gpu_operator),
    "gpu denoisers": (ROOT / "docs" / "measured.md", gpu_denoisers),
    "gpu guidance": (ROOT / "docs" / "guidance-kernels.md", gpu_guidance),
    "gpu rows": (ROOT / "docs" / "kernels-triton.md", gpu_rows),
    **evidence_tables.TABLES,
}


def with_table(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: written by bench/tables.py -->\n", "<!-- end -->"
    if begin not in text:
        raise ValueError(f"no table named {name!r}: {begin!r} is missing")
    return re.sub(f"({re.escape(begin)}).*?(?={end})", lambda found: found[1] + table, text, count=1, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not that of the results")
    check, stale = parser.parse_args().check, []
    for name, (path, make) in TABLES.items():
        old = path.read_text()
        new = with_table(old, name, make())
        if old != new:
            stale.append(f"{path.relative_to(ROOT)}: {name}")
            if not check:
                path.write_text(new)
    print("\n".join(stale) or "all tables are those of the results")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
