"""What a wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import negengine
from negengine import kernels

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("wheel")  # one process builds it


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree without what git ignores; building in place would leave a build folder behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
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
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield path.name, archive.namelist()


def test_kernels_are_installed_inside_the_package_only(wheel):
    _, names = wheel
    assert "negengine/kernels/__init__.py" in names
    assert "negengine/kernels/eager/match.py" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"negengine"}


def test_every_module_of_the_tree_is_in_the_wheel(wheel):
    _, names = wheel
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "negengine").rglob("*.py")}
    modules |= {"negengine/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= set(names)


def test_checkpoints_travel(wheel):
    _, names = wheel
    files = [p for p in (ROOT / "negengine/models/checkpoints").rglob("*") if p.is_file()]
    assert files
    assert {p.relative_to(ROOT).as_posix() for p in files} <= set(names)


def test_the_version_is_said_once(wheel):
    name, _ = wheel
    assert name.startswith(f"negengine-{negengine.__version__}-")


def test_kernels_are_the_folder_at_the_top():
    assert Path(kernels.__file__).parent == ROOT / "kernels"
