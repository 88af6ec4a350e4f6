"""Stands in for the child that proves the kernels: does what ``play.json`` in its folder says, without torch."""

import json
import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
play = json.loads((folder / "play.json").read_text())
if play["flood"]:
    for stream in (sys.stdout, sys.stderr):
        stream.write("x" * 10_000_000)
(folder / "answer.json").write_bytes(bytes.fromhex(play["answer"]))
Path(play["pid"]).write_text(str(os.getpid()))
time.sleep(play["seconds"])
if play["signal"]:
    os.kill(os.getpid(), play["signal"])
sys.exit(play["status"])
