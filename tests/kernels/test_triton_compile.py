"""Every kernel compiles for every device of interest without spills, within its shared memory, and on its matrix units."""

import os

import pytest

pytest.importorskip("triton")

import gates
from negengine.kernels.triton import norms, tuning

pytestmark = pytest.mark.skipif(norms.INTERPRETED.value, reason="the interpreter replaces the compiler")


@pytest.mark.parametrize("architecture", tuning.ARCHITECTURES)
def test_gates(architecture):
    everything = os.environ.get("NEGENGINE_GATES") == "all"
    wrong = {}
    for variant in dict.fromkeys(gates.variants(architecture, everything)):
        if found := gates.complaints(variant, gates.compiled(variant)):
            wrong[str(variant)] = found
    assert not wrong


@pytest.mark.parametrize("kernel", gates.KERNELS)
def test_no_size_is_a_constant(kernel):
    """Neither batch, resolution nor stride is compiled in, nor whether 16 divides it: only the addresses' alignment is."""
    function = gates.KERNELS[kernel]
    pointers = {*gates.POINTERS, *gates.TENSORS}
    sizes = [p for p in function.params if not p.is_constexpr and p.name not in pointers]
    assert sizes
    assert all(p.do_not_specialize for p in sizes)


def test_the_table_in_the_docs_is_of_these_configurations():
    text = gates.DOCUMENT.read_text().split(gates.BEGIN)[1]
    for architecture in tuning.ARCHITECTURES:
        for variant in gates.variants(architecture, False):
            if variant.kernel == "match":
                tile = " x ".join(str(variant.settings[f"BLOCK_{n}"]) for n in "MNK")
                assert f"| match | {architecture} | {variant.dtype} | {tile} | {variant.num_warps} |" in text
