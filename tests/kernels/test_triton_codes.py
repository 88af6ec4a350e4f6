"""Searches in 8 bits: their codes, their candidates, and when they search again."""

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from negengine.kernels.triton import codes, launch, tuning
from triton_cases import DEVICE, MARKS, RUNS, batch, change, check_match, needs, needs_descriptors, outcome, same_bits, table_of

from negengine import ops

pytestmark = MARKS
QUANTISED = pytest.mark.parametrize("search", ["int8", "fp8"])


@RUNS
@QUANTISED
@pytest.mark.parametrize(
    "matching,variant",
    [
        pytest.param("release", {}, marks=pytest.mark.exhaustive),
        ("paper", {"halvings": 1}),
        ("paper", {"descriptors": True, "persistent": True}),
    ],
    ids=str,
)
def test_quantised_variants_choose_as_an_exact_search(search, matching, variant, monkeypatch):
    needs(search)
    if "descriptors" in variant:
        needs_descriptors()
    x, table = batch(torch.bfloat16, 3, 37, 41, "normal"), table_of([[-1, -1], [2, 0], [0, 1]])
    table = table if matching == "paper" else table[:, 1:]
    exact = outcome(x, table, matching)
    change(monkeypatch, **variant)
    assert all(same_bits(a, b) for a, b in zip(exact, outcome(x, table, matching, search=search), strict=True))


@RUNS
@QUANTISED
def test_a_channel_that_dwarfs_the_others(search):
    """In 8 bits nothing else is left of an int8 row; what decides between the tokens must not be lost with it."""
    needs(search)
    x, r = batch(torch.float32, 1, 40, 64, "normal"), batch(torch.float32, 1, 50, 64, "normal", 2)[0]
    x[..., 3], r[..., 3] = 3e4, 3e4 * torch.rand(50, device=DEVICE)
    cosine, index = ops.match(x, r, search=search, backend="triton")
    check_match(x[0].cpu(), r.cpu(), None, "paper", cosine[0].cpu(), index[0].cpu(), 1e-6 if search == "int8" else 1e-2)


@RUNS
def test_a_key_that_two_worse_ones_crowd_out():
    """A lane keeps two whose codes flatter them; the third is better by over 0.01, which only an exact search can see."""
    needs("fp8")
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, generator=g)
    rows = torch.randn(200_000, 4, generator=g)
    rows /= rows.abs().amax(1, keepdim=True)  # so that the kernel's scale is 112 for each
    exact = torch.cosine_similarity(rows, x)
    rows, exact = rows[(exact > 0.4) & (exact < 0.5)], exact[(exact > 0.4) & (exact < 0.5)]
    scale = 2.0 ** -torch.frexp(x.abs().max())[1] * 2 * 112
    coded = torch.cosine_similarity((rows * 112).to(torch.float8_e4m3fn).float(), (x * scale).to(torch.float8_e4m3fn).float())
    best = (coded - exact).argmin()
    worse = ((exact < exact[best] - 0.011) & (coded > coded[best])).nonzero()[:2, 0]
    assert len(worse) == 2
    keys = (-x).repeat(32, 1)
    keys[[0, 8]], keys[16] = rows[worse], rows[best]  # columns of one lane
    cosine, index = ops.match(x[None].to(DEVICE), keys.to(DEVICE), search="fp8", backend="triton")
    assert index.item() == 16
    assert abs(cosine.item() - exact[best]) < 1e-6


@RUNS
@QUANTISED
def test_of_equal_rows_among_many_near_ones_the_first_wins(search):
    """Codes can barely tell the rows apart, so equal ones are crowded out of some lanes and not of others."""
    needs(search)
    g = torch.Generator().manual_seed(1)
    base, near = torch.randn(1, 64, generator=g), torch.randn(41, 64, generator=g)
    keys = (base + 0.02 * near).to(DEVICE)
    x = (base + 0.02 * torch.randn(1, 70, 64, generator=g)).to(DEVICE)
    _, index = ops.match(x, torch.cat([keys, keys]), search=search, backend="triton")
    assert index.max() < 41


@RUNS
def test_where_a_search_is_refused(monkeypatch):
    for name, search, found in (("sm_90", "int8", "'auto', 'exact', 'fp8'"), ("sm_86", "fp8", "'auto', 'exact', 'int8'")):
        monkeypatch.setattr(launch, "architecture", lambda device, name=name: tuning.ARCHITECTURES[name])
        with pytest.raises(RuntimeError, match=f"has no search='{search}' on {name}, only {found}"):
            ops.match(batch(), batch()[0], backend="triton", search=search)


@RUNS
@pytest.mark.skipif(DEVICE == "cuda", reason="reads what the host would write")
@pytest.mark.parametrize("name", ["fp8e4nv", "fp8e4b8"])
def test_rounding_to_fp8_is_to_nearest_even(name):
    if name == "fp8e4b8" and launch.triton.__version__ < "3.8":
        pytest.skip("the interpreter of Triton 3.7 does not know this type")
    dtype = {"fp8e4nv": torch.float8_e4m3fn, "fp8e4b8": torch.float8_e4m3fnuz}[name]
    values = torch.cat([torch.linspace(-224, 224, 4097), torch.logspace(-14, 5, 2000, 2)]).repeat(2)[:4096]
    out = torch.empty(4096, dtype=dtype)
    _round[(1,)](values, out, 4096)
    assert torch.equal(out.float(), values.to(dtype).float())


@launch.triton.jit
def _round(values, out, N: tl.constexpr):
    d = tl.arange(0, N)
    tl.store(out + d, codes.rounded_to_fp8(tl.load(values + d), out.dtype.element_ty)[0])
