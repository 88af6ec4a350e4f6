"""What the contract does not see of the Triton kernels: schedules, variants, copies, launches.

On a GPU they run as they are, elsewhere under Triton's interpreter: test_interpreter.py starts them.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton.language as tl
from negengine.kernels.call import Call
from negengine.kernels.triton import launch, match, merge, occupancy, plan, schedule, tuning
from triton_cases import (
    DEVICE,
    GPU,
    INTERPRETED,
    MARKS,
    RUNS,
    SHORT,
    batch,
    change,
    check_match,
    needs,
    needs_descriptors,
    outcome,
    same_bits,
    table_of,
)

from negengine import ops
from negengine.reference import group_references

pytestmark = MARKS
HALF = pytest.param(torch.float16, marks=pytest.mark.exhaustive)
SINGLE = pytest.param(torch.float32, marks=pytest.mark.exhaustive)
DTYPES = pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, SINGLE], ids=str)


@RUNS
@DTYPES
@pytest.mark.parametrize("matching", ["paper", pytest.param("release", marks=pytest.mark.exhaustive)])
def test_every_split_gives_the_same_bits(dtype, matching, monkeypatch):
    x, table = batch(dtype, D=24), table_of([[-1, -1], [2, 0], [0, 1]] if matching == "paper" else [[-1], [0], [0]])
    found = []
    for splits in (1, 2, 3):
        monkeypatch.setattr(tuning, "splits", lambda *_, splits=splits: splits)
        found.append(outcome(x, table, matching))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@RUNS
@pytest.mark.parametrize(
    "variant",
    [
        {"descriptors": True},
        {"halvings": 2},
        {"flatten": True},
        *(pytest.param(other, marks=pytest.mark.exhaustive) for other in ({"persistent": True}, {"group": 1})),
    ],
    ids=str,
)
def test_variants_give_the_same_bits(variant, monkeypatch):
    if "descriptors" in variant:
        needs_descriptors()
    plain = usual_outcome()
    change(monkeypatch, **variant)
    assert all(same_bits(a, b) for a, b in zip(plain, usual_outcome.__wrapped__(), strict=True))


@functools.cache
def usual_outcome():
    return outcome(batch(torch.float16, T=SHORT), table_of([[-1, -1], [2, -1], [0, 1]]))


@RUNS
@pytest.mark.parametrize("splits", [1, 3])
def test_of_equal_rows_the_first_slot_and_token_win(splits, monkeypatch):
    monkeypatch.setattr(tuning, "splits", lambda *_: splits)
    x = torch.ones(3, 70, 16, device=DEVICE)
    _, index = torch.ops.negengine.match(x, None, table_of([[-1, -1], [-1, 0], [2, 0]]), None, "paper", "auto", "triton")
    assert index.unique(dim=1).tolist() == [[-1], [70], [0]]


@RUNS
@DTYPES
@pytest.mark.parametrize("matching", ["paper", "release"])
def test_magnitudes_mixed_in_one_image(dtype, matching):
    x, r = batch(dtype, 1, 70, 33, "normal"), batch(dtype, 1, 70, 33, "normal", 2)[0]
    exponents = [-12, 0, 6] if dtype == torch.float16 else [-100, -50, -40, 0, 40, 50, 100]
    for t, step in ((x[0], 1), (r, 3)):
        for i in range(0, 70, step):
            t[i] *= 2.0 ** exponents[i % len(exponents)]
    cosine, index = ops.match(x, r, matching=matching, backend="triton")
    check_match(x[0].cpu(), r.cpu(), None, matching, cosine[0].cpu(), index[0].cpu(), 1e-6)


@RUNS
@pytest.mark.parametrize("mode,moved", [("first", [0, 0, 0]), ("previous", [0, 1, 0]), ("others", [1, 1, 1])])
def test_only_images_that_are_read_and_written_are_copied(mode, moved):
    x, table = batch(), group_references(mode, 3, 3).to(DEVICE)

    def prepared(y):
        call = Call(x, x, table, None, "paper", "exact", y)
        roles = launch.roles_of(call)
        space = launch.workspace(call, roles)
        launch._norms(call, roles, space)()
        return roles, space

    roles, space = prepared(x)
    assert roles.keys is x
    assert space.moved.tolist() == moved
    for image in range(3):
        if moved[image]:
            assert same_bits(space.snapshot[image], x[image])
    assert prepared(torch.empty_like(x))[1].snapshot is x


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format, torch.ops.aten.clone.default):
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("disjoint", [True, False])
def test_workspace_at_the_sizes_of_flux(disjoint, monkeypatch):
    """On the meta device, with kernels that do nothing: what a call reserves beyond its tensors."""

    monkeypatch.setattr(plan.Launch, "__call__", lambda self: None)
    monkeypatch.setattr(launch, "architecture", lambda device: tuning.ARCHITECTURES["sm_90"])
    monkeypatch.setattr(launch, "_described", lambda tensor, *_: tensor)
    x = torch.empty(4, 4096, 3072, dtype=torch.bfloat16, device="meta")
    references = group_references("first", 4, 4).to("meta")
    alpha, threshold = (torch.empty(n, dtype=torch.float64, device="meta") for n in (4, 1))
    stats = torch.empty(3, dtype=torch.int64, device="meta")
    with Allocations() as made:
        launch.negtome(Call(x, x, references, None, "paper", "exact", x, alpha, threshold, None, stats, disjoint))
    assert made.bytes < 4e6 if disjoint else made.bytes > x.nbytes


@RUNS
def test_a_promise_to_be_disjoint():
    """Kept, it changes no bit. Broken, an image that is both read and overwritten is not matched; the others are."""
    x, first = batch(T=SHORT), table_of([[-1], [0], [0]])
    expected = ops.negtome_(x.clone(), first, 0.9, 0.3, backend="triton")
    assert same_bits(ops.negtome_(x.clone(), first, 0.9, 0.3, backend="triton", disjoint=True), expected)
    chain = table_of([[-1], [0], [1]])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="disjoint=True, but an image of the table both has a reference and is one"):
            ops.negtome_(x.clone(), chain, 0.9, 0.3, backend="triton", disjoint=True)
    y, alpha = x.clone(), torch.full((3,), 0.9, dtype=torch.float64, device=DEVICE)
    threshold = torch.full((1,), 0.3, dtype=torch.float64, device=DEVICE)
    launch.negtome(Call(y, y, chain, None, "paper", "exact", y, alpha, threshold, disjoint=True))
    assert same_bits(y[1], expected[1])
    assert same_bits(y[2], x[2])


@RUNS
def test_at_most_three_launches(monkeypatch):
    launches, launched = [], plan.Launch.__call__

    def counted(self):
        launches.append(self.kernel.__name__)
        return launched(self)

    monkeypatch.setattr(plan.Launch, "__call__", counted)
    launch._plans.clear()  # what is planned already, Triton is not asked to launch
    x, stats = batch(T=9, D=8), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for mode in ("first", "others"):
        launches.clear()
        ops.negtome_(x, group_references(mode, 3, 3).to(DEVICE), 0.9, 0.3, stats=stats, backend="triton")
        assert launches == ["norms_kernel", "match_kernel", "merge_kernel"]
    launches.clear()
    ops.negtome_(x, table_of([[-1], [0], [1]]), 0.9, 0.3, matching="release", backend="triton")
    assert len(launches) == 3


@launch.triton.jit
def _schedule(out, references, B, K, R):
    schedule.write_schedule(out, references, B, K, R)


def schedule_of(table, R):
    B, K = table.shape
    out = torch.full((schedule.length(B, K),), -7, dtype=torch.int32, device=DEVICE)
    _schedule[(1,)](out, table, B, K, R)
    images, order, counts = out[0].item(), out[1 : 1 + B].tolist(), out[1 + B : 1 + 2 * B].tolist()
    slots, references = out[1 + 2 * B :].view(2, B, K).tolist()
    return order[:images], [list(zip(s[:n], r[:n], strict=True)) for s, r, n in zip(slots, references, counts, strict=True)]


@RUNS
def test_the_schedule_of_a_table():
    """Images without references take no part, empty slots are closed up, and what names no image is as if it were empty."""
    table = table_of([[-1, -1], [-1, 3], [7, 0]] * 100 + [[2, 6]])
    order, references = schedule_of(table, 7)
    assert order == [b for b in range(301) if b % 3 or b == 300]
    assert references == [[], [(1, 3)], [(1, 0)]] * 100 + [[(0, 2), (1, 6)]]


@launch.triton.jit
def _deal(out, schedule, B, row_tiles, key_tiles, splits, GROUP: tl.constexpr):
    """Tiles of every program, as ``match_kernel`` counts them."""
    images = match.updated_images(schedule)
    tiles = 0
    for unit in range(tl.program_id(0), images * row_tiles * splits, tl.num_programs(0)):
        work = match.work_of(unit, schedule, images, B, row_tiles, key_tiles, splits, GROUP)
        tiles += work[4] - work[3]
    tl.store(out + tl.program_id(0), tiles)


@RUNS
@pytest.mark.parametrize("row_tiles,key_tiles,splits,programs", [(5, 7, 3, 11), (9, 9, 9, 20), (32, 4, 4, 13)])
def test_work_is_dealt_as_it_is_planned(row_tiles, key_tiles, splits, programs):
    """The kernel deals every tile once, and its longest program is as long as the plan says."""
    table = table_of([[-1], [0], [0], [-1], [3]])
    schedule_on_device = torch.empty(schedule.length(5, 1), dtype=torch.int32, device=DEVICE)
    _schedule[(1,)](schedule_on_device, table, 5, 1, 5)
    loads = torch.empty(programs, dtype=torch.int32, device=DEVICE)
    _deal[(programs,)](loads, schedule_on_device, 5, row_tiles, key_tiles, splits, 8)
    assert loads.sum() == 3 * row_tiles * key_tiles
    assert loads.max() == occupancy.longest(occupancy.Work(3 * row_tiles, key_tiles, 8, programs), splits)


@RUNS
@pytest.mark.parametrize("search", ["exact", pytest.param("fp8", marks=pytest.mark.exhaustive)])
def test_a_wrong_table_on_the_device_changes_nothing(search):
    """The host never reads the table there: entries that name no image of the bank are as if they were empty."""
    needs(search)
    x, bank = batch(T=SHORT, D=24), batch(B=2, T=50, D=24, seed=3)
    alpha, threshold = (torch.full((n,), 0.5, dtype=torch.float64, device=DEVICE) for n in (3, 1))

    def outcome_of(rows):
        y, table = torch.empty_like(x), table_of(rows)
        launch.negtome(Call(x, bank, table, None, "paper", search, y, alpha, threshold))
        return y, *launch.match(Call(x, bank, table, None, "paper", search))

    wrong = outcome_of([[2, 99], [1, 2147483647], [-5, 0]])
    right = outcome_of([[-1, -1], [1, -1], [-1, 0]])
    assert all(same_bits(a, b) for a, b in zip(wrong, right, strict=True))
    assert same_bits(wrong[0][0], x[0])
    release = table_of([[9], [-4], [3]])
    y = x.clone()
    launch.negtome(Call(y, y, release, None, "release", "exact", y, alpha, threshold))
    assert same_bits(y, x)


@RUNS
@pytest.mark.skipif(DEVICE == "cuda", reason="looks into a kernel while it is interpreted")
def test_a_huge_key_sends_no_other_row_to_the_exact_search(monkeypatch):
    x, r = batch(B=1, kind="normal"), batch(B=1, T=50, kind="normal", seed=2)[0]
    r[7] *= 1e30
    r[9], x[0, 4] = r[7], r[7]
    seen, corrected = [], merge.corrected.fn

    def watched(queries, everything, *rest):
        seen.append(everything.handle.data.sum())
        return corrected(queries, everything, *rest)

    monkeypatch.setattr(merge, "corrected", watched)
    cosine, index = ops.match(x, r, backend="triton")
    check_match(x[0], r, None, "paper", cosine[0], index[0], 1e-6)
    assert index[0, 4] == 7
    assert sum(seen) == 1  # row 4, which is huge itself


@RUNS
@pytest.mark.skipif(DEVICE == "cuda", reason="takes too much memory there")
def test_offsets_beyond_32_bits():
    """Two images over 2**31 elements apart; the memory between them is never touched."""
    x = torch.empty(2**31 + 2**12, dtype=torch.float16).as_strided((2, 20, 16), (2**31, 16, 1))
    x.copy_(batch(torch.float16, 2, 20, 16))
    near = x.contiguous()
    ops.negtome_(x, table_of([[-1], [0]]), 0.9, 0.0, backend="triton")
    assert same_bits(x.contiguous(), ops.negtome_(near, table_of([[-1], [0]]), 0.9, 0.0, backend="triton"))


@RUNS
def test_rows_that_are_not_contiguous():
    x, r = batch(T=SHORT), batch(T=SHORT, seed=2)[0].T.contiguous().T
    found, expected = (ops.match(x, t, backend="triton") for t in (r, r.contiguous()))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@RUNS
def test_in_place_where_channels_do_not_lie_side_by_side():
    x, table = batch(T=SHORT), table_of([[-1], [0], [1]])
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    ops.negtome_(apart, table, 0.9, 0.3, backend="triton")
    assert same_bits(apart, ops.negtome_(x, table, 0.9, 0.3, backend="triton"))


@RUNS
@pytest.mark.parametrize("B,T,D", [(1, 1, 8), (1, 70, 8), (2, 1, 8), (1, 70, 1), (2, 3, 513)])
def test_single_images_tokens_and_channels(B, T, D, monkeypatch):
    x, table = batch(torch.float16, B, T, D), table_of([[0]] * B)
    plain = outcome(x, table)
    torch.testing.assert_close(plain[0], ops.match(x, x[0], backend="torch")[0], rtol=0, atol=2e-6)
    if D % 8 == 0:
        needs_descriptors()
        change(monkeypatch, descriptors=True)
        assert all(same_bits(a, b) for a, b in zip(plain, outcome(x, table), strict=True))


@RUNS
def test_tuning_measures_once_and_changes_no_bit(tmp_path, monkeypatch):
    x, table = batch(T=SHORT, D=24), table_of([[-1], [0], [0]])
    expected, measured = outcome(x, table), []

    def milliseconds(call):
        call()
        measured.append(call)
        return -len(measured)  # the last is the fastest

    monkeypatch.setattr(launch, "milliseconds", milliseconds)
    monkeypatch.setattr(launch, "versions", lambda device: tuning.Versions("a device", "1", "2", "3"))
    monkeypatch.setattr(launch, "_tuned", {})
    monkeypatch.setenv("NEGENGINE_TUNE", str(tmp_path / "cache.json"))
    assert all(same_bits(a, b) for a, b in zip(expected, outcome(x, table), strict=True))
    count = len(measured)
    assert count > 1
    launch._tuned.clear()  # as another process would
    assert all(same_bits(a, b) for a, b in zip(expected, outcome(x, table), strict=True))
    assert len(measured) == count


@pytest.mark.parametrize(
    "error", [launch.triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"), RuntimeError("ptxas failed")], ids=repr
)
def test_tuning_leaves_out_what_does_not_run_and_says_so(error, monkeypatch, caplog):
    def broken(call, **_):
        raise error

    monkeypatch.setattr(launch.triton.testing, "do_bench", broken)
    assert launch.milliseconds(lambda: None) == float("inf")
    assert str(error) in caplog.text


def test_tuning_does_not_hide_a_full_device(monkeypatch):
    def full(call, **_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(launch.triton.testing, "do_bench", full)
    with pytest.raises(torch.OutOfMemoryError):
        launch.milliseconds(lambda: None)


@RUNS
def test_what_it_refuses():
    with pytest.raises(RuntimeError, match=r"triton: takes float16, bfloat16 and float32, not torch.float64"):
        ops.match(batch(torch.float64), batch(torch.float64)[0], backend="triton")
    with pytest.raises(RuntimeError, match=r"triton: has no search='bf16' on interpreter, only"):
        ops.match(batch(), batch()[0], backend="triton", search="bf16")


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above run by themselves")
def test_without_a_gpu_it_says_so():
    assert ops.backends()["triton"] == "needs a GPU, and torch finds none"
