"""Time over the number of images, tokens and channels; what is too slow or too large for a rival ends its series."""

import dataclasses

import pytest
import torch

from negengine.bench import suite
from negengine.bench.shapes import SCALING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATIENCE = 10.0  # seconds a call of a rival, with --all-cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    dtypes = suite.DTYPES[DEVICE] if metafunc.config.getoption("--all-cases") else suite.DTYPES[DEVICE][:1]
    metafunc.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])


@pytest.mark.parametrize("axis", SCALING)
def test_scaling(benchmark, study, dtype, axis):
    file = study.file("scaling")
    limit = PATIENCE if study.everything and DEVICE == "cpu" else None

    def series():
        for measured in suite.scaling(DEVICE, dtype, axis, rounds=study.rounds(5), rival_limit=limit):
            rows = [{"axis": axis, **dataclasses.asdict(row)} for row in measured.rows]
            file.add(rows, measured.check, measured.left_out)
        if not study.everything and DEVICE == "cpu":
            file.add([], None, {"scaling in float32": "--all-cases has it"})

    benchmark.pedantic(series, rounds=1)
