"""The comparison of tiles takes the tiles that it says, and counts those that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from negengine.kernels.triton import tuning

from negengine.bench import tiles

ROOT = Path(__file__).parents[2]


def test_one_tile_of_each_size_and_every_one():
    device = tuning.ARCHITECTURES["sm_90"]
    some, every = tiles.tiles(device, False), tiles.tiles(device, True)
    assert set(some) < set(every)
    sizes = [(tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.halvings) for tile in some]
    assert len(set(sizes)) == len(sizes) > 1


def test_the_tile_holds_within_and_not_after():
    usual, other = tuning.match_config, tuning.MatchConfig(16, 16, 16, 4, 1)
    with tiles.every_call_takes(other):
        assert tuning.match_config("whatever", 2, "whatever", True) is other
    assert tuning.match_config is usual


@pytest.mark.exhaustive
def test_a_call_runs_with_the_tile(tmp_path):
    """In the interpreter: rows of 16 queries are searched by a tile of 16 rows, and the result is that of the usual tile."""
    code = (
        "import sys; from pathlib import Path; from negengine.kernels.triton import tuning; from negengine.bench import tiles\\n"
        "other = tuning.MatchConfig(16, 16, 16, 4, 1)\\n"
        "bad = tuning.MatchConfig(24, 16, 16, 4, 1)\\n"
        "tuning.candidates = lambda *a: [other, bad]\\n"
        "sys.exit(tiles.main(['2x17x16', '--device', 'cpu', '--every', '--rounds', '1', '--results', sys.argv[1]]))"
    ).replace("\\n", "\n")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    usual, other, bad = json.loads((tmp_path / "tiles.json").read_text())["rows"]
    assert usual["usual"]
    assert other["tile"]["block_m"] == 16
    assert other["rows_equal"] == usual["rows_equal"] == 1.0
    assert other["ratio"] > 0
    assert "24" in done.stdout
    assert "error" in bad
