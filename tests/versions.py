"""The plug-in's tests on other versions of diffusers: ``python tests/versions.py --diffusers 0.37.0 0.42.1``.

Each version goes to a folder of its own, which comes before the installed packages. What passed is written to docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD, PAGE = ROOT / "build" / "versions", ROOT / "docs" / "versions.md"
TESTS = ("tests/diffusers", "tests/test_compat.py")
HEAD = ("date", "Python", "torch", "diffusers", "transformers", "result")


def folder_of(diffusers: str) -> Path:
    """Where a version of diffusers lies, which is put there if it is not."""
    folder = BUILD / f"diffusers-{diffusers}"
    if not folder.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
            f"diffusers=={diffusers}",
        ]
        subprocess.run(command, check=True)
    about = next(distributions(path=[str(folder)]))
    needed = {re.split(r"[^\w.-]", requirement)[0] for requirement in about.requires or () if ";" not in requirement}
    lacking = sorted(name for name in needed if not any(distributions(name=name)))
    if lacking:
        raise SystemExit(f"diffusers {diffusers} needs what this environment lacks: pip install {' '.join(lacking)}")
    return folder


def tested(diffusers: str, further: Sequence[str]) -> tuple[str, bool]:
    """What pytest says at its end, and whether all passed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder_of(diffusers)), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-m", "not exhaustive", "-p", "no:cacheprovider", "-n", "logical", *TESTS, *further]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    print(done.stdout)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode} on diffusers {diffusers}")
    last = done.stdout.strip().splitlines()[-1]
    return ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last)), done.returncode == 0


def write(rows: Sequence[Sequence[str]]) -> None:
    """Put rows into the page's table, in the place of those of the same versions."""
    text = PAGE.read_text()
    begin, end = (text.index(mark) for mark in ("<!-- versions: written by tests/versions.py -->", "<!-- end -->"))
    lines = [line.strip("| ").split(" | ") for line in text[begin:end].splitlines() if line.startswith("| 2")]
    kept = [line for line in lines if line[1:5] not in [list(row[1:5]) for row in rows]]
    table = sorted([*kept, *map(list, rows)], key=lambda row: [row[2], row[1], [int(n) for n in re.findall(r"\d+", row[3])]])
    shown = ["| " + " | ".join(row) + " |" for row in (HEAD, ["---"] * len(HEAD), *table)]
    PAGE.write_text(text[:begin] + "\n".join(["<!-- versions: written by tests/versions.py -->", *shown, ""]) + text[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--diffusers", nargs="+", required=True, metavar="VERSION")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    given = parser.parse_args()
    rows, passed = [], True
    for diffusers in given.diffusers:
        told, right = tested(diffusers, given.pytest)
        passed &= right
        about = (datetime.date.today().isoformat(), platform.python_version(), version("torch"), diffusers, version("transformers"))
        rows.append([*about, told])
        write(rows)  # after each, so that an interrupt loses nothing
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
