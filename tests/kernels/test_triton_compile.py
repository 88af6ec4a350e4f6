"""Every kernel compiles for every device of interest without spills, within its shared memory, and on its matrix units."""

import dataclasses
import os
import re

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import gates
import triton
from negengine.kernels.triton import launch, rows, tuning

from negengine.ops import registry, verdicts
from negengine.ops import triton as backend

pytestmark = pytest.mark.skipif(rows.INTERPRETED.value, reason="the interpreter replaces the compiler")


GUARDED = ("sm_90",)  # every change is compiled for it; each architecture takes half a minute


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a in GUARDED else pytest.mark.exhaustive) for a in tuning.ARCHITECTURES]
)
def test_gates(architecture):
    everything = os.environ.get("NEGENGINE_GATES") == "all"
    wrong = {}
    for variant in dict.fromkeys(gates.variants(architecture, everything)):
        if found := gates.complaints(variant, gates.compiled(variant)):
            wrong[str(variant)] = found
    assert not wrong


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a in GUARDED else pytest.mark.exhaustive) for a in tuning.ARCHITECTURES]
)
def test_gates_of_guidance(architecture):
    """Without all of them, aligned bfloat16 alone: a sixth of the time."""
    found = [*gates.guidance_variants(architecture)]
    if architecture in GUARDED and os.environ.get("NEGENGINE_GATES") != "all":
        found = [variant for variant in found if variant.dtype == "bf16" and variant.settings["VECTOR"] > 1]
    wrong = {str(variant): gates.complaints(variant, gates.compiled(variant)) for variant in found}
    assert wrong
    assert not {name: said for name, said in wrong.items() if said}


@pytest.mark.parametrize("kernel", gates.KERNELS)
def test_no_size_is_a_constant(kernel):
    """Neither batch, resolution nor stride is compiled in, nor whether 16 divides it: only the addresses' alignment is."""
    function = gates.KERNELS[kernel]
    pointers = {*gates.POINTERS, *gates.TENSORS, *gates.CODED}
    sizes = [p for p in function.params if not p.is_constexpr and p.name not in pointers]
    assert sizes
    assert all(p.do_not_specialize for p in sizes)


def ptx(kernel, **settings):
    """Of the first bfloat16 variant on sm_90 with these constants."""
    variants = (v for v in gates.variants("sm_90", True) if v.kernel == kernel and v.dtype == "bf16")
    return gates.assembled(next(v for v in variants if settings.items() <= v.settings.items())).asm["ptx"]


def count(operation, text):
    return len(re.findall(rf"\t{re.escape(operation)}", text))


ROUNDED = r"fma\.rn\.f32 \t%\w+, %\w+, %\w+, 0f00000000;"  # a product that nothing is fused with


def test_scores_are_rounded_before_they_are_compared():
    """Else the largest would lack something to itself, and some other column would be chosen."""
    text = ptx("match", QUANTISED=0, DESCRIPTORS=True, HALVINGS=0)
    scores = len(re.findall(ROUNDED, text))
    assert scores >= 64
    assert count("sub.f32", text) == scores
    assert count("neg.f32", text) == 0  # as a fused difference has it


def test_the_merge_rounds_as_written_and_waits_for_no_counter():
    """Products are not fused with the difference, as the other backends do not either; counters need no order among accesses."""
    text = ptx("merge", QUANTISED=0, MERGE=True, RELEASE=False)
    written = count("cvt.rn.bf16", text)
    assert written > 0
    assert len(re.findall(ROUNDED, text)) >= 2
    assert count("sub.f32", text) * 2 >= len(re.findall(ROUNDED, text))
    counters = [line for line in text.splitlines() if re.search(r"\b(atom|red)\.", line)]
    assert counters
    assert all("relaxed" in line for line in counters)


@pytest.mark.parametrize("guided,products", [(0, 1), (1, 2), (2, 3)])
def test_guide_rounds_as_written(guided, products):
    """As the other backends do, for the same bits: no product is fused with the sum that it enters."""
    variants = (v for v in gates.guidance_variants("sm_90") if v.kernel == "guide" and v.dtype == "fp32")
    text = gates.assembled(next(v for v in variants if v.settings["GUIDED"] == guided)).asm["ptx"]
    elements = 8  # of a thread
    assert len(re.findall(ROUNDED, text)) == products * elements
    assert count("fma.rn.f32", text) == products * elements


def test_the_table_in_the_docs_is_of_these_kernels():
    """All variants take half an hour: here the defaults are compiled, `make gates` does all and signs the table."""
    found = gates.DOCUMENT.read_text().split(gates.BEGIN)[1]
    assert gates.fingerprint() in found, "the kernels or their configurations changed: run `make gates`"
    found = gates.GUIDANCE_DOCUMENT.read_text().split(gates.BEGIN)[1]
    assert gates.guidance_fingerprint() in found, "the kernels of guidance changed: run `make gates`"


# --- graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """A device of capability 9.0 to trace for; nothing is compiled for it and nothing runs."""

    class Driver:
        def get_current_target(self):
            return gates.target_of("sm_90")

    found = dataclasses.replace(registry._BACKENDS["triton"], missing=lambda: None)
    monkeypatch.setitem(registry._BACKENDS, "triton", found)
    monkeypatch.setattr(backend, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "architecture", lambda device: tuning.ARCHITECTURES["sm_90"])
    monkeypatch.setattr(verdicts, "find", lambda subject: None)  # nobody has proven anything on it
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())  # reading a kernel's mutations asks it for the target


def arguments(T=256, D=640, B=4):
    sizes = {"x": ((B, T, D), torch.bfloat16), "references": ((B, 1), torch.int32), "alpha": ((B,), torch.float64)}
    sizes |= {"threshold": ((1,), torch.float64), "stats": ((3,), torch.int64)}
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in sizes.values()]


class Block(torch.nn.Module):
    """Calls of the operators as they are, since outside of a device not even an index table can be made on it."""

    def __init__(self, *operators, backend="triton", search="auto", disjoint=False):
        super().__init__()
        self.operators, self.disjoint, self.names = operators, disjoint, ("paper", search, backend)

    def forward(self, x, references, alpha, threshold, stats):
        x, stats = x * 2, stats + 1
        if "negtome_" in self.operators:
            names = (*self.names, self.disjoint)
            torch.ops.negengine.negtome_(x, None, references, alpha, threshold, None, stats, None, *names)
        if "negtome" in self.operators:
            x = torch.ops.negengine.negtome(x, x, references, alpha, threshold, None, None, *self.names)
        if "match" in self.operators:
            x = torch.ops.negengine.match(x, x, references, None, *self.names)[0]
        return (x + 1,)


def nodes(graph):
    return [node for node in graph.nodes if node.op == "call_function"]


OPERATORS = ("negtome_", "negtome", "match")
NORMS = ["weight", "apart", "schedule"]
CODES = ["inverse", "key_codes", "key_error", "query_error", "query_weight"]


@pytest.mark.parametrize("search", ["exact", "fp8"])
@pytest.mark.parametrize("disjoint", [True, False])
def test_a_compiled_graph_shows_the_kernels(hopper, search, disjoint):
    """And what each of them writes, which is nothing large but its outputs: anything else would be copied at every call."""
    with FakeTensorMode():
        block = Block("negtome_", search=search, disjoint=disjoint)
        graph = aot_export_module(block, arguments(), trace_joint=False)[0].graph
    launches = [node.kwargs for node in nodes(graph) if "triton_kernel_wrapper" in str(node.target)]
    for launch_ in launches:  # of one tensor under two names, the copy that nothing was written to would win
        targets = [launch_["kwargs"][name] for name in launch_["tensors_to_clone"]]
        assert len(set(targets)) == len(targets)
    moved = [] if disjoint else ["snapshot", "moved"]
    norms_writes, match_writes, merge_writes = (set(launch_["tensors_to_clone"]) for launch_ in launches)
    assert norms_writes == {*NORMS, *moved, *(CODES if search == "fp8" else [])}
    # the schedule counts as written, since through the loop its entries reach the address of a store; it is some bytes large
    assert match_writes == {"candidate_score", "candidate_index", "flags", "schedule"}
    assert merge_writes == {"y", "stats"}
    assert not any("negengine" in str(node.target) for node in nodes(graph))


def test_every_operator_of_a_graph_is_open_or_whole(hopper):
    for name, expected in (("triton", 9), ("torch", 0)):
        with FakeTensorMode():
            graph = aot_export_module(Block(*OPERATORS, backend=name), arguments(), trace_joint=False)[0].graph
        targets = [str(node.target) for node in nodes(graph)]
        assert sum("triton_kernel_wrapper" in target for target in targets) == expected
        assert any("negengine" in target or "auto_functionalized" in target for target in targets) == (name == "torch")


def test_a_graph_of_any_size(hopper):
    """One graph for every number of tokens: sizes are symbols that reach the kernels."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    block = Block(*OPERATORS)
    with FakeTensorMode():
        x, *rest = arguments()
        torch._dynamo.mark_dynamic(x, 1)
        compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        with torch.no_grad():
            compiled(x, *rest)
    assert sum("triton_kernel_wrapper" in str(node.target) for node in nodes(graphs[0])) == 9
    sizes = [node.kwargs["kwargs"]["T"] for node in nodes(graphs[0]) if "T" in node.kwargs.get("kwargs", {})]
    assert all(not isinstance(size, int) for size in sizes)


def test_an_exported_program_keeps_one_operator(hopper):
    """What is in it is decided by whoever compiles the program."""
    with FakeTensorMode():
        program = torch.export.export(Block(*OPERATORS), tuple(arguments()))
    targets = [str(node.target) for node in nodes(program.graph) if "negengine" in str(node.target)]
    assert targets == [f"negengine.{name}.default" for name in OPERATORS]
