"""The way of the torch backend on GPUs: its search in 16 bits and its merge in chunks, here with an emulated product."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from negengine.kernels.call import Call
from negengine.kernels.eager import half, match, merge, product
from torch.utils._python_dispatch import TorchDispatchMode

from negengine import ops
from negengine.bench.shapes import SHAPES
from negengine.ops import registry
from negengine.reference import group_references

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from contract import KINDS, check_match, check_merge, same_bits, tokens

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BACKEND = registry._BACKENDS["torch"]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """A product that sums in float64, so that equal rows tie however a library cuts it; the queries that it was given."""
    seen = []

    def emulation(a, b, out):
        seen.append(tuple(a.shape))
        out.copy_(torch.bmm(a.double(), b.double())) if a.device.type != "meta" else out.zero_()

    monkeypatch.setattr(product, "widening", lambda device, dtype: emulation if dtype in product.DTYPES else None)
    return seen


@pytest.fixture(params=[None, 700], ids=["whole", "chunks"])
def chunks(request, monkeypatch):
    if request.param:
        for module in (half, merge):
            monkeypatch.setattr(module, "entries", lambda channels: request.param)
        monkeypatch.setattr(merge, "NARROWEST", 3)


@pytest.fixture
def device_table(monkeypatch):
    """As on a GPU: the host has only what the caller told."""
    monkeypatch.setattr(Call, "entries", lambda call: call.table)


def in_place(x, references, known=True, **changes):
    """A call as the operator makes it, on a copy; returns what became of it."""
    y = x.clone()
    given = {"alpha": torch.full((len(x),), 0.9, dtype=torch.float64), "threshold": torch.zeros(1, dtype=torch.float64)}
    given |= {"matching": "paper", "search": "auto", "mask": None} | changes
    bank = given.pop("bank", None)
    table = references.flatten().tolist() if known else None
    BACKEND.run(Call(y, y if bank is None else bank, references, **given, y=y, table=table))
    return y


# --- the numeric contract ----------------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize("kind", KINDS)
def test_match(dtype, kind, chunks):
    mask = torch.rand(2, 65) > 0.3
    for other in {kind, "normal"}:
        x, r = tokens(kind, 2, 21, 33, 1, dtype), tokens(other, 2, 65, 33, 2, dtype)
        for m in (None, mask, torch.zeros_like(mask)):
            cosine, index = ops.match(x, r, m, backend="torch")
            assert (cosine.dtype, index.dtype) == (torch.float32, torch.int32)
            for b in range(2):
                check_match(x[b], r[b], None if m is None else m[b], "paper", cosine[b], index[b], 1e-6)


@HALF
@pytest.mark.parametrize("kind", KINDS)
def test_match_release(dtype, kind, chunks):
    mask = torch.rand(31) > 0.3
    for other in {kind, "normal"}:
        x, r = tokens(kind, 2, 31, 33, 1, dtype), tokens(other, 1, 31, 33, 2, dtype)[0]
        cosine, index = ops.match(x, r, mask, "release", backend="torch")
        for b in range(2):
            check_match(x[b], r, mask, "release", cosine[b], index[b], 1e-6)


@pytest.mark.parametrize("exponent", [-120, -60, -41, 0, 20, 59, 61, 100, 127])
def test_rows_of_any_magnitude(exponent):
    """Up to rows full of the largest number; the norms of both factors are far apart."""
    row = torch.tensor([[1.0, -1.5, 1.25, 1.75]], dtype=torch.float64)
    largest = torch.full((1, 3, 4), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    for other in (-100, 0, 127):
        x, r = (torch.stack([row * 2.0**e, -row * 2.0**e], 1).bfloat16() for e in (exponent, other))
        for sources, keys in ((x, r), (x, largest[..., :4]), (largest, r)):
            cosine, index = ops.match(sources, keys, backend="torch")
            check_match(sources[0], keys[0], None, "paper", cosine[0], index[0], 1e-6)


@HALF
@pytest.mark.parametrize("kind", ["near", "nan", "duplicates"])
@pytest.mark.parametrize("own", [True, False])
def test_the_whole_call(dtype, kind, own, chunks, device_table):
    """Several references padded anywhere, masks, dropout, own or other bank; the same bits if the host knows no table."""
    x = tokens(kind, 4, 21, 33, 5, dtype)
    bank = None if own else tokens("near", 3, 17, 33, 6, dtype)
    pool = x if own else bank
    references = torch.tensor([[-1, -1, -1], [0, -1, 2], [-1, 1, 0], [2, 2, -1]], dtype=torch.int32)
    R, M = pool.shape[:2]
    mask, keep, stats = torch.rand(R, M) > 0.2, torch.rand(4, 21) > 0.2, torch.zeros(3, dtype=torch.int64)
    given = {"bank": bank, "mask": mask, "keep": keep}
    y = in_place(x, references, stats=stats, **given)
    assert same_bits(in_place(x, references, **given), y)  # every time
    assert same_bits(in_place(x, references, known=False, **given), y)
    found = Call(x, pool, references, mask, "paper", "auto")
    for table in (None, references.flatten().tolist()):
        call = Call(x, pool, references, mask, "paper", "auto", table=table)
        found = [*BACKEND.match(call)]
        assert (found[1][0] == -1).all()
    merged = 0
    for b, row in enumerate(references.tolist()):
        images = [image for image in row if image >= 0]
        if not images:
            assert same_bits(y[b], x[b])
            continue
        r, m = torch.cat([pool[i] for i in images]), torch.cat([mask[i] for i in images])
        slot = torch.tensor([sum(i >= 0 for i in row[:k]) for k in range(3)])
        index = found[1][b]
        index = torch.where(index < 0, -1, slot[index.clamp_min(0) // M] * M + index.clamp_min(0) % M).int()
        check_match(x[b], r, m, "paper", found[0][b], index, 1e-6)
        merged += check_merge(x[b], r, index, 0.9, 0.0, keep[b], y[b])
    assert stats[0] == merged > 0
    assert stats[1:].tolist() == [3 * 21, 1]


@HALF
@pytest.mark.parametrize("mode", ["first", "others", "previous"])
@pytest.mark.parametrize("known", [True, False])
def test_all_reads_are_of_old_values(dtype, mode, known, chunks, device_table):
    x, references = tokens("near", 4, 21, 33, 3, dtype), group_references(mode, 4, 2 if mode == "first" else 4)
    expected = in_place(x, references, bank=x.clone())
    assert same_bits(in_place(x, references, known), expected)
    storage = x.clone()  # a bank that is the same memory in another place
    view = Call(
        storage, storage[:, 4:], references, None, "paper", "auto", storage, torch.full((4,), 0.9).double(), torch.zeros(1).double()
    )
    BACKEND.run(view)
    assert same_bits(storage, in_place(x, references, bank=x.clone()[:, 4:]))


@HALF
def test_rows_that_are_not_merged_keep_their_bits(dtype):
    x = tokens("normal", 2, 8, 16, 3, dtype)
    x[1, 0] = -0.0
    x[1, 1].view(torch.int16)[:] = x.new_tensor([torch.nan]).view(torch.int16)[0] | 5
    references = torch.tensor([[-1], [0]], dtype=torch.int32)
    keep = torch.zeros(2, 8, dtype=torch.bool)
    for changes in ({"keep": keep}, {"threshold": torch.ones(1).double()}, {"mask": keep}):
        assert same_bits(in_place(x, references, **changes), x)
    y = in_place(x, references, alpha=torch.full((2,), -1.5).double(), threshold=torch.full((1,), -1.0).double())
    assert same_bits(y[1, 1], x[1, 1])
    assert (y[1, 2:] != x[1, 2:]).any(-1).all()


def test_entries_that_the_bank_lacks_change_nothing(device_table):
    x = tokens("near", 3, 9, 8, 3, torch.bfloat16)
    bad = torch.tensor([[-1], [7], [0]], dtype=torch.int32)
    good = torch.tensor([[-1], [-1], [0]], dtype=torch.int32)
    assert same_bits(in_place(x, bad, known=False), in_place(x, good))
    merged = []
    for references in (bad, good):  # the search of wider inputs
        y = x.float()
        alpha, threshold = torch.full((3,), 0.9).double(), torch.zeros(1).double()
        call = Call(y, y, references, None, "paper", "auto", y, alpha, threshold)
        merge.push(call, *match.match(call, torch.float32))
        merged.append(y)
    assert same_bits(*merged)
    assert not same_bits(merged[0], x.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["first", "others"])
def test_wider_inputs_merge_in_chunks(dtype, mode, chunks):
    x, references = tokens("near", 4, 21, 33, 3, dtype), group_references(mode, 4, 4)
    expected, stats = x.clone(), torch.zeros(3, dtype=torch.int64)
    ops.negtome_(expected, references, 0.9, 0.3, stats=stats, backend="torch")
    y, counted = x.clone(), torch.zeros(3, dtype=torch.int64)
    alpha, threshold = torch.full((4,), 0.9, dtype=torch.float64), torch.full((1,), 0.3, dtype=torch.float64)
    call = Call(y, y, references, None, "paper", "auto", y, alpha, threshold, None, counted)
    merge.push(call, *match.match(call, dtype))
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert torch.equal((y == x).all(-1), (expected == x).all(-1))
    assert torch.equal(counted, stats)


# --- what it costs -----------------------------------------------------------------------------------------------


class Cost(TorchDispatchMode):
    """Launches, a product one of them, and the most bytes that were alive beyond the arguments."""

    VIEWS = ("view", "slice", "select", "expand", "t.default", "transpose", "permute", "squeeze", "empty", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.launches, self.alive, self.peak, self.known = 0, 0, 0, set()

    def free(self, key, size):
        self.alive -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        results = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor)]
        self.launches += bool(results) and not any(name in str(function) for name in self.VIEWS)
        for tensor in results:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known | before:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


def cost(shape, mode="first", matching="paper", dtype=torch.bfloat16, known=True, images=4):
    x = torch.empty(images, shape.tokens, shape.channels, dtype=dtype, device="meta")
    references = group_references(mode, images, images)
    alpha, threshold = (torch.empty(n, dtype=torch.float64, device="meta") for n in (images, 1))
    stats = torch.empty(3, dtype=torch.int64, device="meta")
    table = references.flatten().tolist() if known else None
    call = Call(x, x, references.to("meta"), None, matching, "auto", x, alpha, threshold, None, stats, mode == "first", table)
    with Cost() as spent:
        BACKEND.run(call)
    return spent


LAUNCHES = {"sdxl-32": (29, 21), "sdxl-64": (38, 30), "flux-768": (61, 48), "flux-1024": (83, 68)}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    """The figures of docs/fallback.md."""
    found = tuple(cost(SHAPES[name], dtype=dtype).launches for dtype in (torch.bfloat16, torch.float16))
    assert found == LAUNCHES[name]
    if name.startswith("sdxl"):
        assert max(found) <= 40


@pytest.mark.parametrize("mode,matching", [("first", "paper"), ("first", "release"), ("others", "paper"), ("previous", "paper")])
def test_workspace(mode, matching):
    """At flux-1024 no more than 40 MB, whatever is read and overwritten."""
    assert 20e6 < cost(SHAPES["flux-1024"], mode, matching).peak <= 40e6


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("known", [True, False])
def test_the_host_reads_nothing(name, known):
    """A tensor without data cannot be read: `.item()`, `bool()` and the like raise."""
    assert cost(SHAPES[name], known=known).launches
    x, reference = torch.empty(2, 64, 32, dtype=torch.bfloat16, device="meta"), torch.zeros(2, 1, dtype=torch.int32, device="meta")
    mask = torch.ones(2, 64, dtype=torch.bool, device="meta")
    for matching in ("paper", "release"):
        BACKEND.match(Call(x, x, reference, mask, matching, "auto", table=[0, 0] if known else None))


def test_images_without_a_reference_cost_nothing(emulated, device_table):
    """Those that share one are searched together."""
    x = tokens("near", 8, 21, 33, 3, torch.bfloat16)
    in_place(x, group_references("first", 8, 4))
    assert emulated == [(3, 21, 33), (3, 21, 33)]
    emulated.clear()
    in_place(x, group_references("first", 8, 4), known=False)
    assert emulated == [(1, 21, 33)] * 8


# --- which way is gone -------------------------------------------------------------------------------------------


def test_where_the_product_is_used(monkeypatch):
    monkeypatch.undo()
    decide = product.widening.__wrapped__
    for dtype in product.DTYPES:
        assert decide("cuda", dtype) is product.batched
        assert decide("cpu", dtype) is None
    assert decide("cuda", torch.float32) is decide("cuda", torch.float64) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert decide("cuda", torch.bfloat16) is None
    monkeypatch.undo()
    monkeypatch.setattr(torch.ops.aten.bmm, "overloads", lambda: ["default", "out"])
    assert decide("cuda", torch.bfloat16) is None


def test_the_product_asks_for_float32(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch, "bmm", lambda a, b, **names: asked.update(names))
    a, b, out = torch.empty(1, 2, 3).half(), torch.empty(1, 3, 4).half(), torch.empty(1, 2, 4)
    product.batched(a, b, out)
    assert asked == {"out_dtype": torch.float32, "out": out}
    schema = torch.ops.aten.bmm.dtype_out._schema
    assert [argument.name for argument in schema.arguments] == ["self", "mat2", "out_dtype", "out"]


def test_settings_of_the_user_do_not_reach_the_product_and_come_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = True
    try:
        with product.as_written(torch.device("cpu")):
            assert not matmul.allow_fp16_accumulation
        assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = before
