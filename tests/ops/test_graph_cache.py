"""Compiled graphs that torch keeps on disk: one of another backend, or of other kernels, must not be taken for this one."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import dataclasses, sys
import torch
from negengine import ops
from negengine.ops import registry

number = float(sys.argv[1])
backend = registry._BACKENDS["torch"]
if number:  # a backend that opens in a graph into kernels of version `number`
    opened = lambda x, *rest, **others: x + number
    changes = {"traced": {"negtome": opened}, "fingerprint": lambda: str(number)}
    registry._BACKENDS["torch"] = dataclasses.replace(backend, **changes)
x, r = torch.zeros(2, 4, 8), torch.ones(4, 8)
with torch.no_grad():
    y = torch.compile(lambda x, r: ops.negtome(x, r, backend="torch") * 1)(x, r)
print("got", float(y.max()))
"""


@pytest.mark.exhaustive  # three processes that compile; what it guards changes with a release of torch
def test_what_was_chosen_is_part_of_the_name_of_a_kept_graph(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def result(number):
        done = subprocess.run([sys.executable, "-c", SCRIPT, number], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()[-1]

    assert result("1") == "1.0"
    assert result("2") == "2.0"  # other kernels
    assert result("0") == "0.0"  # none: the operator itself
