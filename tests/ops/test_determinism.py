"""The same input gives the same bits: run to run, and with any number of threads."""

import pytest
import torch
from contract import cases, same_bits, tokens

from negengine import ops
from negengine.reference import group_references

FURTHER = [pytest.param(*shape, marks=pytest.mark.exhaustive) for shape in ((64, 100, 65), (100, 100, 33), (256, 256, 64))]
SHAPES = [(7, 33, 5), (100, 33, 128), (257, 301, 40), *FURTHER]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("T,M,D", SHAPES)
@pytest.mark.parametrize("matching", ["paper", "release"])
def test_threads_and_runs(case, T, M, D, matching, threads):
    M = T if matching == "release" else M
    x, r = tokens("near", 2, T, D, 1, case.dtype, case.device), tokens("near", 2, M, D, 2, case.dtype, case.device)
    results = []
    for count in (1, 1, 2, 3):
        threads(count)
        y = ops.negtome(x, r, 0.9, 0.5, matching=matching, **case.names)
        results.append((*ops.match(x, r, matching=matching, **case.names), y))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_images_do_not_depend_on_the_rest_of_the_batch(case):
    x = tokens("near", 6, 50, 24, 1, case.dtype, case.device)
    table = group_references("others", 6, 3).to(case.device)
    whole = ops.negtome_(x.clone(), table, 0.9, 0.5, **case.names)
    half = ops.negtome_(x[:3].clone(), table[:3], 0.9, 0.5, **case.names)
    assert same_bits(whole[:3], half)
