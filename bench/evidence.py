"""What each method does to the embedded models that draw people: the numbers, plots and gallery of docs/evidence.md.

    python bench/evidence.py                  # every part whose results are not there, are of other weights or of other settings
    python bench/evidence.py --part a         # one part anew, if it is not there
    python bench/evidence.py --draw people-flux   # the pictures of one model, to be measured with the rest
    python bench/evidence.py --budget         # what each part will draw, and how long that takes on this machine
    python bench/evidence.py --quick --results out/evidence   # a few pictures in two steps, to try the code

Parts: a NegToMe, rivals, b away from a character, c DNG, d DNP, e two methods at once, gallery. Each writes a JSON under
``bench/results/evidence``; the gallery is its own file. Pictures are kept in ``out/evidence``, so that an interrupted part goes on.
Parts run beside each other, a process with one thread for each core. Then the plots and the tables are written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "evidence"
KEPT = ROOT / "out" / "evidence"
NAMES = {
    "a": "diversity", "rivals": "rivals", "b": "asset", "c": "removal", "d": "pairs", "e": "together", "gallery": "strengths"
}  # fmt: skip


def part_of(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"laboratory.{NAMES[name]}")


def settings_of(name: str, size: Any) -> dict[str, Any]:
    """All that decides what a part draws, as JSON holds it."""
    return json.loads(json.dumps({job.name: job.plain() for job in part_of(name).jobs(size)}, default=str))


def is_there(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a part's results are of these settings, weights included."""
    from laboratory.gallery import data_of

    if not path.exists():
        return False
    told = data_of(path) if path.suffix == ".html" else json.loads(path.read_text())
    return told["settings"] == settings


def budget(names: Sequence[str], size: Any) -> dict[str, float]:
    """Seconds of each part on one thread: its images by the measured seconds an image. Says so."""
    from laboratory.job import Studio

    studio, seconds, found = Studio(), {}, {}
    for name in names:
        jobs = part_of(name).jobs(size)
        for model in {job.model for job in jobs} - seconds.keys():
            seconds[model] = studio.seconds(model)
        found[name] = sum(job.cost * seconds[job.model] for job in jobs)
        images = sum(job.images for job in jobs)
        print(f"part {name}: {images} images, about {found[name] / 60:.1f} minutes on one thread", flush=True)
    print(", ".join(f"{model}: {one:.2f} s an image" for model, one in seconds.items()), flush=True)
    return found


def draw(names: Sequence[str], model: str, size: Any, folder: Path) -> None:
    """The pictures of one model, kept for the parts."""
    import torch
    from laboratory.job import Studio

    from negengine.cli.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    studio = Studio(folder)
    for name in names:
        for job in part_of(name).jobs(size):
            if job.model == model and not job.name.startswith(tuple(part_of(name).WATCHED)):
                begun = time.perf_counter()
                studio.draw(job)
                print(f"part {name}, {job.name}: {job.images} images, {time.perf_counter() - begun:.0f} s", flush=True)


def measure(name: str, size: Any, path: Path, kept: Path | None = None) -> None:
    """Draw and measure one part, and write its file.

    Args:
        kept: folder of pictures that were drawn before.
    """
    import torch
    from laboratory.gallery import page
    from laboratory.job import Studio
    from rich.progress import Progress

    from negengine.cli.quiet import quiet_libraries
    from negengine.environment import machine, versions

    torch.set_num_threads(1)
    quiet_libraries()
    part, studio, begun = part_of(name), Studio(kept), time.perf_counter()
    jobs = part.jobs(size)
    told: dict[str, Any] = {"what": "evidence", "part": name, "title": part.TITLE, "date": time.strftime("%Y-%m-%d")}
    told |= {"machine": machine(), "versions": versions(), "settings": settings_of(name, size), "rows": []}
    with Progress(disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"part {name}", total=sum(job.images for job in jobs))
        part.measure(studio, jobs, told, lambda images: progress.advance(bar, images))
    told["images"] = sum(job.images for job in jobs)
    told["seconds"] = round(time.perf_counter() - begun, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(page(told) if path.suffix == ".html" else json.dumps(told, separators=(",", ":")) + "\n")
    unfinished.replace(path)
    print(f"part {name}: {told['images']} images in {told['seconds'] / 60:.1f} minutes, {path}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=NAMES, help="repeatable; all by default")
    parser.add_argument("--quick", action="store_true", help="a few pictures in two steps; needs --results")
    parser.add_argument("--budget", action="store_true", help="draw nothing but what tells how long it takes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the plots and the gallery")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of pictures that are kept")
    parser.add_argument("--draw", metavar="MODEL", choices=("people-flux", "people-sdxl"), help="only draw, of one model")
    parser.add_argument("--no-documents", action="store_true", help="leave plots and tables as they are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parts at once")
    given = parser.parse_args()
    if given.quick and given.results == RESULTS:
        parser.error("--quick draws what is no evidence; give --results another folder")
    from laboratory.job import FULL, QUICK

    size, names = QUICK if given.quick else FULL, given.part or list(NAMES)
    if given.draw:
        draw(names, given.draw, size, given.kept)
        return 0
    files = {name: given.docs / "gallery.html" if name == "gallery" else given.results / f"{name}.json" for name in names}
    missing = [name for name in names if not is_there(files[name], settings_of(name, size))]
    for name in names:
        if name not in missing:
            print(f"part {name}: {files[name]} is of these settings and weights, and stays")
    if given.budget:
        budget(names, size)
        return 0
    if len(missing) == 1:
        measure(missing[0], size, files[missing[0]], given.kept)
    elif missing:
        seconds = budget(missing, size)
        if not side_by_side(sorted(missing, key=lambda name: -seconds[name]), given):
            return 1
    if given.no_documents:
        return 0
    from laboratory import documents

    documents.write(given.results, given.docs, given.results == RESULTS)
    return 0


def side_by_side(names: Sequence[str], given: argparse.Namespace) -> bool:
    """A process for each part, the longest first; whether all went well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = {"--results": given.results, "--docs": given.docs, "--kept": given.kept}
    usual = [sys.executable, __file__, "--no-documents", *["--quick"] * given.quick]
    usual += [text for flag, folder in folders.items() for text in (flag, str(folder))]

    def run(name: str) -> int:
        return subprocess.run([*usual, "--part", name], env=environment).returncode

    with ThreadPoolExecutor(max(1, given.jobs)) as pool:
        failed = [name for name, code in zip(names, pool.map(run, names), strict=True) if code]
    if failed:
        print(f"part {', '.join(failed)} failed; what is there stays, and the same command goes on", file=sys.stderr)
    return not failed


if __name__ == "__main__":
    sys.exit(main())
