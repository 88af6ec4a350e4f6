"""Compile the library with nothing but a C++ compiler. No import of the package: ``setup.py`` runs this before it exists."""

from __future__ import annotations

import concurrent.futures
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAME = "libnegengine_cpu" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
FAILURE = "libnegengine_cpu.failure.txt"  # why there is no library; read by `negengine doctor`
X86 = platform.machine().lower() in ("x86_64", "amd64")


def flags() -> dict[str, list[str]]:
    """File -> its flags, from flags.txt."""
    lines = [line.split() for line in (FOLDER / "flags.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {name: options for name, *options in lines}


def compiler() -> list[str]:
    """The command of the C++ compiler; raises FileNotFoundError if there is none."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise FileNotFoundError("no C++ compiler found (CXX, c++, g++, clang++)")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")


def compile_library(target: Path) -> None:
    """Compile ``src`` into the shared library ``target``; raises FileNotFoundError or RuntimeError."""
    cxx, options = compiler(), flags()
    with tempfile.TemporaryDirectory() as objects, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        commands, outputs = [], []
        for source in sorted((FOLDER / "src").glob("*.cpp")):
            own = options.get(source.name, []) if X86 else []
            outputs.append(str(Path(objects, source.stem + ".o")))
            commands.append([*cxx, *options["all"], *own, f"-I{FOLDER / 'include'}", "-c", str(source), "-o", outputs[-1]])
        list(pool.map(_run, commands))
        linked = Path(objects, NAME)
        _run([*cxx, "-shared", "-pthread", *outputs, "-o", str(linked)])
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        shutil.copyfile(linked, part)
        part.replace(target)  # a process that has the old one open keeps it


def build(folder: Path) -> str | None:
    """Put the library into ``folder``, or a file that says why not; returns the reason."""
    failure = folder / FAILURE
    try:
        compile_library(folder / NAME)
    except (OSError, RuntimeError) as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAME).unlink(missing_ok=True)
        failure.write_text(f"{error}\n")
        return str(error)
    failure.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    reason = build(FOLDER)
    if reason is not None:
        sys.exit(reason)
