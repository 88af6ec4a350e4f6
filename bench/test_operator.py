"""The operator beside its rivals: a table a shape, dtype, matching and gate share, all its variants in one interleaved run.

What pytest-benchmark itself reports is how long a table took to measure.
"""

import dataclasses

import pytest
import torch

from negengine.bench import suite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = suite.cases(DEVICE, metafunc.config.getoption("--all-cases"))
    metafunc.parametrize("case", found, ids=[case.name.replace(" ", "-") for case in found])


def test_call(benchmark, study, case):
    file = study.file("operator")
    for name in suite.left_out(DEVICE, study.everything):
        file.document["left_out"][name] = "takes minutes on a CPU; --all-cases has it"
    measured = benchmark.pedantic(suite.measure, (case, DEVICE), {"rounds": study.rounds(15)}, rounds=1)
    suite.record(case, measured, file)
    benchmark.extra_info.update(dataclasses.asdict(measured.rows[0]))
