"""The Triton backend on a GPU as production uses it: in compiled graphs, in CUDA graphs, and without a wait of the host."""

import dataclasses
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from negengine.kernels.triton import launch

import negengine
from negengine import models, ops
from negengine.reference import group_references

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from contract import same_bits, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def searches():
    device = torch.device("cuda")
    return [s for s in launch.architecture(device).searches if s != "auto"] if torch.cuda.is_available() else ["exact"]


SEARCHES = pytest.mark.parametrize("search", searches())
SHAPES = [(4, 300, 96), (4, 1024, 640)]


def arguments(B, T, D, dtype=torch.bfloat16, seed=1):
    x = tokens("near", B, T, D, seed, dtype, "cuda")
    settings = {"dtype": torch.float64, "device": "cuda"}
    return x, group_references("first", B, B).cuda(), torch.full((B,), 0.9, **settings), torch.full((1,), 0.3, **settings)


@SEARCHES
@pytest.mark.parametrize("B,T,D", SHAPES)
@pytest.mark.parametrize("disjoint", [True, False])
def test_compiled(B, T, D, search, disjoint):
    """In a graph the kernels take pointers instead of descriptors, so sums are made in another order: of tokens that resemble
    one of the reference clearly, the same is chosen."""
    x, table, alpha, threshold = arguments(B, T, D)
    x[1:] = x[0][torch.randperm(T, device="cuda")] + 0.01 * torch.randn_like(x[1:])

    def function(x, table, alpha, threshold):
        stats = torch.zeros(3, dtype=torch.int64, device=x.device)
        y = x * 2
        ops.negtome_(y, table, alpha, threshold, stats=stats, search=search, backend="triton", disjoint=disjoint)
        return y + 1, stats

    with torch.no_grad():
        expected = function(x, table, alpha, threshold)
        torch._dynamo.reset()
        found = torch.compile(function, fullgraph=True)(x, table, alpha, threshold)
    assert expected[1].tolist() == found[1].tolist() == [(B - 1) * T, (B - 1) * T, 1]
    torch.testing.assert_close(found[0], expected[0])


@SEARCHES
@pytest.mark.parametrize("B,T,D", SHAPES)
def test_captured_in_a_cuda_graph(B, T, D, search):
    x, table, alpha, threshold = arguments(B, T, D)
    static = x.clone()

    def call():
        return ops.negtome_(static, table, alpha, threshold, search=search, backend="triton", disjoint=True)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in (1, 2):
        x, *_ = arguments(B, T, D, seed=seed)
        static.copy_(x)
        graph.replay()
        expected = ops.negtome_(x.clone(), table, alpha, threshold, search=search, backend="triton", disjoint=True)
        assert same_bits(static, expected)


@SEARCHES
def test_a_call_does_not_wait(search):
    x, table, alpha, threshold = arguments(4, 300, 96)
    stats = torch.zeros(3, dtype=torch.int64, device="cuda")
    call = {"stats": stats, "search": search, "backend": "triton", "disjoint": True}
    ops.negtome_(x, table, alpha, threshold, **call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.negtome_(x, table, alpha, threshold, **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", models.DIGITS)
def test_a_denoising_loop_waits_no_more_than_without(name):
    pytest.importorskip("diffusers.pipelines")  # a folder of tests has the shorter name
    preset, call = models.negtome_preset(name), models.preset(name).call_kwargs(2)

    def waits(pipe):
        """Between the end of the first step and that of the last."""
        last = call["num_inference_steps"] - 1

        def stepped(pipe, step, timestep, tensors):
            torch.cuda.set_sync_debug_mode("warn" if step < last else "default")
            return tensors

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                pipe(list(models.PROMPTS[:2]), num_images_per_prompt=4, callback_on_step_end=stepped, **call)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    pipe = models.load(name, device="cuda")
    waits(pipe)
    without = waits(pipe)
    negengine.apply(pipe, dataclasses.replace(preset, backend="triton"))
    waits(pipe)  # compiles
    assert waits(pipe) == without
    assert negengine.status(pipe)[negengine.NegToMe].merged_tokens > 0
