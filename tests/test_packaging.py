"""What a wheel holds."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from negengine.kernels.cpu import build

import negengine
from negengine import kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel of a copy of the tree without what git ignores; building in place would leave a build folder behind.

    Its library is compiled without optimisation, which takes a third of the time: what installs this checkout does it in earnest.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    plain = out.with_name("compiler")
    with contextlib.suppress(FileNotFoundError):  # no compiler: a wheel without the library
        plain.write_text(f'#!/bin/sh\nexec {shlex.join(build.compiler())} "$@" -O0\n')
        plain.chmod(0o755)
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tree = subprocess.run(command, check=True, capture_output=True).stdout
    for name in tree.decode().rstrip("\0").split("\0"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-q",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CXX": str(plain)})
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built) as archive:
        return built.name, archive.namelist()


@pytest.mark.long  # the first builds the wheel
def test_kernels_are_installed_inside_the_package_only(wheel):
    _, names = wheel
    assert "negengine/kernels/__init__.py" in names
    assert "negengine/kernels/eager/match.py" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"negengine"}


def test_every_module_of_the_tree_is_in_the_wheel(wheel):
    _, names = wheel
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "negengine").rglob("*.py")} - {"negengine/kernels.py"}
    modules |= {"negengine/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= set(names)


def test_checkpoints_travel(wheel):
    _, names = wheel
    files = [p for p in (ROOT / "negengine/models/checkpoints").rglob("*") if p.is_file()]
    assert files
    assert {p.relative_to(ROOT).as_posix() for p in files} <= set(names)


def test_the_pictures_of_people_travel_with_their_licences(wheel):
    folder = "negengine/models/people/data"
    assert {f"{folder}/{name}" for name in ("people.webp", "people.json", "LICENCES.txt")} <= set(wheel[1])


def test_what_the_benchmarks_read_travels(wheel):
    assert {"negengine/bench/report.html.j2", "negengine/bench/schema.json"} <= set(wheel[1])


def test_the_version_is_said_once(wheel):
    name, _ = wheel
    assert name.startswith(f"negengine-{negengine.__version__}-")


def test_kernels_are_the_folder_at_the_top():
    assert [Path(folder) for folder in kernels.__path__] == [ROOT / "kernels"]


def test_kernels_are_found_in_an_installation(built, tmp_path):
    """By the package alone: the file that finds them in a checkout is not there."""
    with zipfile.ZipFile(built) as archive:
        assert "negengine/kernels.py" not in archive.namelist()
        archive.extractall(tmp_path)
    assert runs_in(tmp_path) == str(tmp_path / "negengine" / "kernels")


def test_kernels_are_found_in_a_checkout_that_was_never_installed(tmp_path):
    for folder in ("negengine", "kernels"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "checkpoints", "libnegengine*")
        )
    assert runs_in(tmp_path) == str(tmp_path / "kernels")


def runs_in(folder):
    """Where a Python that knows this folder, and of what is installed all but negengine, finds the kernels that it runs."""
    code = (
        "import torch as t; from negengine import kernels, ops; ops.match(t.ones(1, 4, 3), t.ones(5, 3)); print(*kernels.__path__)"
    )
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", "-c", code]  # -S: without the finder of an editable installation
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
