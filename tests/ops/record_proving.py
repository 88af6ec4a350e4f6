"""Writes the terminal log in docs/proven.md, recorded under Triton's interpreter: python tests/ops/record_proving.py"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "proven.md"
BEGIN, END = "<!-- log: written by tests/ops/record_proving.py -->", "<!-- end -->"
VERIFY = ["verify", "--dtype", "float32", "--shape", "2,16,16,16"]
RUN = "from negengine.cli import app; app()"
LIAR = """\
from negengine.ops import establish
establish.CHILD = '''
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
said = [{"nonce": request["nonce"], "key": {"device": "a faster one"}}, {"running": "the kernels"}]
said += [{"case": name} for name in request["cases"]] + [{"done": True}]
(folder / "answer.json").write_text("".join(json.dumps(part) + chr(10) for part in said))
'''
"""


def terminal(shown: str, checkout: Path, cache: Path, *arguments: str, before: str = "") -> str:
    """A command as one types it, and what it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "XDG_CACHE_HOME": str(cache),
        "TRITON_INTERPRET": "1",
        "COLUMNS": "110",
    }
    command = [sys.executable, "-c", before + RUN, *VERIFY, *arguments]
    done = subprocess.run(command, env=environment, cwd=cache, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    return f"$ {shown}\n{lines}\n[exit status {done.returncode}]\n"


def main() -> None:
    shown = "TRITON_INTERPRET=1 negengine " + " ".join(VERIFY)
    with tempfile.TemporaryDirectory() as name:
        copy, cache = Path(name, "checkout"), Path(name, "cache")
        cache.mkdir()
        for package in ("negengine", "kernels"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        log = ["# a verdict is established", terminal(shown, copy, cache)]
        log += ["# and found again", terminal(shown, copy, cache)]
        with open(copy / "kernels" / "triton" / "merge.py", "a") as kernel:
            kernel.write("# a change\n")
        log += ["# a changed kernel makes it void", "$ echo '# a change' >> kernels/triton/merge.py", terminal(shown, copy, cache)]
        log += ["# the answer of a child that lies is refused", terminal(f"{shown} --force", copy, cache, "--force", before=LIAR)]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n```\n" + "\n".join(log) + f"```\n{END}{after}")


if __name__ == "__main__":
    main()
