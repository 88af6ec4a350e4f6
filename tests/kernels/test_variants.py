"""How many variants of each kernel a process compiles, counted with a driver that compiles for a device and launches nothing.

A variant costs seconds when it is first met, and one that is first met while a CUDA graph is captured fails to load.
"""

import pytest
import torch

pytest.importorskip("triton")

import triton
from negengine.kernels.call import Call
from negengine.kernels.triton import guidance_launch, launch, prepared, rows, tuning

from negengine.bench.launches import _Device
from negengine.kernels import guidance
from negengine.reference import group_references, is_disjoint

pytestmark = pytest.mark.skipif(rows.INTERPRETED.value, reason="the interpreter compiles nothing")
MOST = 3


class Counted(_Device):
    def get_current_device(self):
        return f"{self.architecture}, counted"  # where no other test has compiled anything


@pytest.fixture(params=["sm_80", "sm_90", "sm_100"])
def seen(request, monkeypatch):
    """Kernel's name -> the keys under which Triton would have compiled it."""
    found = {}

    def asked(*, key, fn, **_):
        found.setdefault(fn.name.rpartition(".")[2], set()).add(key)
        return True  # and nothing is compiled

    monkeypatch.setattr(triton.runtime.driver, "_active", Counted(request.param))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", asked)
    monkeypatch.setattr(launch, "architecture", lambda device: tuning.ARCHITECTURES[request.param])
    return found


def run(B, T, D, site, position, mode="first", text=0, search="exact", positions=30, sites=60):
    """One call as the plug-in makes it: in place, behind the text, with a row of all counters and one of all alphas."""
    x = torch.empty(B, text + T, D, dtype=torch.bfloat16)[:, text:]
    table = group_references(mode, B, B)
    launch.negtome(
        Call(
            x, x, table, None, "paper", search, x,
            alpha=torch.zeros(positions, B, dtype=torch.float64)[position], threshold=torch.zeros(1, dtype=torch.float64),
            stats=torch.zeros(sites, 3, dtype=torch.int64)[site], disjoint=is_disjoint(table), table=table.flatten().tolist(),
        )
    )  # fmt: skip


def counted(seen):
    return {name: len(keys) for name, keys in seen.items()}


def test_sdxl_at_many_sizes(seen):
    for B in range(1, 9):
        for site, (T, D) in enumerate([(4096, 640), (1024, 1280), (1023, 1280), (3999, 640), (77, 1280), (1, 640)]):
            for position in (0, 1, 7):
                run(B, T, D, site, position)
    assert set(seen) == {"norms_kernel", "match_kernel", "merge_kernel"}
    assert all(n <= MOST for n in counted(seen).values()), counted(seen)


def test_flux_at_many_sizes_and_modes(seen):
    for mode in ("first", "others", "previous"):
        for B in range(1, 9):
            for site, T in enumerate([4096, 2304, 4095, 1517]):
                for text in (0, 512, 77):
                    run(B, T, 3072, site, B % 3, mode, text)
    assert set(seen) == {"norms_kernel", "match_kernel", "merge_kernel"}
    assert all(n <= MOST for n in counted(seen).values()), counted(seen)


def test_a_quantised_search(seen):
    search = {"sm_80": "int8"}.get(triton.runtime.driver._active.architecture, "fp8")
    for B in range(1, 9):
        for site, T in enumerate([4096, 1023]):
            run(B, T, 1280, site, B % 2, search=search)
    assert all(n <= MOST for n in counted(seen).values()), counted(seen)


def test_the_count_sees_a_variant(seen):
    """Another dtype is another variant of every kernel, so a count of one would say that nothing was counted."""
    run(4, 64, 640, 0, 0)
    one = counted(seen)
    x = torch.empty(4, 64, 640)
    numbers = {"alpha": torch.zeros(4, dtype=torch.float64), "threshold": torch.zeros(1, dtype=torch.float64)}
    launch.negtome(Call(x, x, group_references("first", 4, 4), None, "paper", "exact", x, **numbers))
    assert all(n > one[name] for name, n in counted(seen).items())


@pytest.fixture
def variants(seen, monkeypatch):
    """(kernel's name, what we tell variants apart by) -> the keys under which Triton would have compiled it."""
    found = Variants()

    def asked(*, key, fn, **_):
        found.keys.setdefault((fn.name, found.latest), set()).add(key)
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", asked)
    return found


class Variants:
    def __init__(self):
        self.latest, self.keys = None, {}


@pytest.mark.parametrize(
    "seen", [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("sm_80", "sm_90", "sm_100")], indirect=True
)
def test_calls_alike_take_one_variant(variants):
    """The signature of a call tells variants apart at least as finely as Triton's own look at all arguments."""
    quantised = {"sm_80": "int8"}.get(triton.runtime.driver._active.architecture, "fp8")
    for search in ("exact", quantised):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for B, T, D, start in ((3, 70, 640, 0), (2, 33, 3072, 1), (4, 64, 37, 0), (1, 1, 8, 2), (5, 300, 1280, 3)):
                for matching, mode in (("paper", "others"), ("paper", "first"), ("release", "first")):
                    for given in [*range(8)] * 2:
                        x = torch.empty(B, start + T, D + given % 2, dtype=dtype)[:, start:, given % 2 :]
                        table = group_references(mode, B, B)
                        mask, keep = torch.ones(B, T, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
                        call = Call(
                            x, x, table, mask if given & 1 else None, matching, search, x if given & 2 else torch.empty_like(x),
                            alpha=torch.zeros(B, dtype=torch.float64), threshold=torch.zeros(1, dtype=torch.float64),
                            keep=keep if given & 4 else None,
                            stats=torch.zeros(3, dtype=torch.int64) if given & 4 else None,
                        )  # fmt: skip
                        variants.latest = call.signature()
                        launch.negtome(call)
                        search_alone = call._replace(y=None, alpha=None, threshold=None, keep=None, stats=None)
                        variants.latest = search_alone.signature()
                        launch.match(search_alone)
    assert len(variants.keys) > 100
    assert all(len(keys) == 1 for keys in variants.keys.values())


def test_a_prepared_launch_takes_the_variant_that_triton_would(variants, monkeypatch):
    """What tells variants of guidance apart does so at least as finely as Triton's own look at all arguments."""
    key = prepared.variant_key

    def watched(*arguments):
        variants.latest = key(*arguments)
        return variants.latest

    monkeypatch.setattr(prepared, "variant_key", watched)
    strengths = {dtype: torch.zeros(4, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    means = torch.zeros(4, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, size, start in ((1, 64, 0), (2, 1024, 1), (3, 1, 0), (4, 16384, 8), (4, 37, 0)):
            rows = [torch.empty(n, start + size, dtype=dtype)[:, start:] for _ in range(3)]
            for guided in (False, True):
                branches = guidance.Branches(
                    *rows[:2], rows[2] if guided else None, strengths[torch.float32][:1] if guided else None, False
                )
                for copies in (1, 2):
                    guidance_launch.guide(
                        guidance.Guide(branches, strengths[torch.float32][:n], copies, torch.empty(copies * n, size, dtype=dtype))
                    )
                for clip in (None, 1.0, 2.5):
                    guidance_launch.evidence(guidance.Evidence(branches, *rows[:2], means, clip))
            tokens = [torch.empty(n, 3, start + size, dtype=dtype)[..., start:] for _ in range(2)]
            for scale in (1.0, 5.0):
                guidance_launch.nag(guidance.Nag(*tokens, scale, 2.5, 0.25, tokens[0], tokens[1] if n > 1 else None))
    assert len(variants.keys) > 20
    assert all(len(keys) == 1 for keys in variants.keys.values())


def test_a_known_variant_is_launched_without_triton(monkeypatch):
    """And one that is new, or whose sizes 32 bits do not hold, with it."""
    asked, launched = [], []

    class Variant(triton.compiler.CompiledKernel):
        def __init__(self):
            pass

        def __getitem__(self, grid):
            return lambda *arguments, stream: launched.append((grid, arguments, stream))

    class Kernel:
        arg_names = ("x", "T", "M", "ROWS", "OWN")

        def __getitem__(self, grid):
            return lambda *arguments, **settings: asked.append((grid, arguments, settings)) or Variant()

    class Driver:
        class active:
            get_current_stream = staticmethod(lambda device: 7)

    monkeypatch.setattr(triton.runtime, "driver", Driver)
    kernel, x = prepared.Prepared(Kernel()), torch.empty(8)
    calls = (
        ((5, 2**31), True, 4),
        ((1, 2), True, 4),
        ((5, 6), True, 4),
        ((5, 6), False, 4),
        ((5, 2**31), True, 4),
        ((5, 6), True, 8),
    )
    for sizes, own, warps in calls:
        kernel.launch(9, x, (x,), sizes, {"OWN": own, "ROWS": 16}, num_warps=warps)
    assert [call[1][1:] for call in asked] == [(5, 2**31), (1, 2), (5, 6), (5, 2**31), (5, 6)]
    assert [call[0] for call in asked] == [(9,)] * 5
    assert asked[0][2] == {"OWN": True, "ROWS": 16, "num_warps": 4}
    assert launched == [((9, 1, 1), (x.data_ptr(), 5, 6, 16, True), 7)]
    monkeypatch.setattr(torch.version, "hip", "7")  # there the memory behind a tensor decides, too
    kernel.launch(9, x, (x,), (5, 6), {"OWN": True, "ROWS": 16}, num_warps=4)
    assert len(asked) == 6
