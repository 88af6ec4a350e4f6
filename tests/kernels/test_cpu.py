"""What the contract does not see of the native kernels: instruction sets, threads, memory, error codes, large sizes, builds."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from negengine.kernels.call import Call
from negengine.kernels.cpu import build, library

from negengine import ops
from negengine.ops import cpu, registry
from negengine.reference import group_references

ROOT = Path(__file__).resolve().parents[2]
MISSING = library.missing()
native = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ERROR_ARGUMENT, ERROR_SHAPE, ERROR_REFERENCE, ERROR_INDEX, ERROR_UNSUPPORTED = 1, 2, 3, 4, 5


@pytest.fixture
def isa():
    before = library.isa()
    yield library.set_isa
    library.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def isas():
    return library.ISAS[: library.ISAS.index(library.isa()) + 1] if MISSING is None else ()


def searches(dtype):
    refuses = registry._BACKENDS["cpu"].refuses
    return [s for s in ("auto", "exact", "bf16", "int8") if refuses(torch.device("cpu"), dtype, s) is None]


def data(kind, T, D, seed=0, dtype=torch.float32):
    """Tokens ``[1, T, D]`` of which nothing resembles anything: the hardest for a search in low precision."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, T, D, generator=g)
    if kind == "outlier":
        x[..., torch.randperm(D, generator=torch.Generator().manual_seed(1))[: max(3, D // 64)]] *= 20
    elif kind == "student":
        x = x / (torch.randn(3, 1, T, D, generator=g).square().mean(0)).sqrt()  # 3 degrees of freedom
    elif kind == "related":
        x = x + 3 * torch.randn(1, 1, D, generator=torch.Generator().manual_seed(2))
    return x.to(dtype)


def shortfall(x, r, index):
    """How far the chosen cosine is below the best, in float64."""
    x, r = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (x, r))
    s = x @ r.T
    return s.amax(1) - s.gather(1, index.long()[:, None])[:, 0]


# --- precision -----------------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("search", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "outlier", "student", "related"])
@pytest.mark.parametrize("D", [128, 640])
def test_quantised_search_finds_the_best(search, dtype, kind, D):
    if search not in searches(dtype):
        pytest.skip(f"{library.isa()} has no such search")
    x, r = data(kind, 2500, D, 3, dtype), data(kind, 1500, D, 4, dtype)[0]
    short = shortfall(x[0], r, ops.match(x, r, search=search, backend="cpu")[1][0])
    assert short.max() <= 1e-2
    assert (short <= 1e-6).double().mean() >= 0.9999


@native
def test_int8_search_of_tokens_that_share_most_of_themselves():
    """Cosines of 0.999 and more: without centring eight bits find the best for about half of the tokens."""
    if "int8" not in searches(torch.float32):
        pytest.skip(f"{library.isa()} has no such search")
    common = 30 * torch.randn(640, generator=torch.Generator().manual_seed(2))
    x, r = data("normal", 2500, 640, 3) + common, data("normal", 1500, 640, 4)[0] + common
    short = shortfall(x[0], r, ops.match(x, r, search="int8", backend="cpu")[1][0])
    assert (short <= 1e-6).double().mean() >= 0.9999


@native
@pytest.mark.parametrize("size", [100.0, 500.0, 1000.0])
@pytest.mark.parametrize("where", ["source", "reference", "both"])
def test_int8_search_of_rows_with_a_huge_channel(size, where):
    """One channel of some tokens dwarfs all others, of which eight bits then keep nothing: those tokens are searched exactly."""
    if "int8" not in searches(torch.float32):
        pytest.skip(f"{library.isa()} has no such search")
    x, r = data("normal", 400, 8192, 3), data("normal", 300, 8192, 4)[0]
    x[0, :300] = r + 0.5 * x[0, :300]
    if where != "reference":
        x[0, ::5, 7] = size
    if where != "source":
        r[::7, 7] = size
    assert shortfall(x[0], r, ops.match(x, r, search="int8", backend="cpu")[1][0]).max() <= 1e-2


@native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [4099, 9000])
def test_exact_search_over_many_channels(dtype, D):
    """Sums of thousands of products, and cosines that differ in the sixth digit."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(1, D, generator=g)
    r = (base + 2e-3 * torch.randn(200, D, generator=g)).to(dtype)
    x = (base + 2e-3 * torch.randn(1, 60, D, generator=g)).to(dtype)
    assert shortfall(x[0], r, ops.match(x, r, search="exact", backend="cpu")[1][0]).max() <= 1e-6


@native
@pytest.mark.parametrize("name", isas())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("matching", ["paper", "release"])
def test_every_instruction_set(name, dtype, matching, isa):
    isa(name)
    x, r = data("normal", 150, 100, 0, dtype), data("normal", 150, 100, 1, dtype)
    for search in searches(dtype):
        _, index = ops.match(x, r, matching=matching, search=search, backend="cpu")
        short = shortfall(r[0], x[0], index[0]) if matching == "release" else shortfall(x[0], r[0], index[0])
        assert short.max() <= 1e-6
        y = ops.negtome(x, r, 0.9, -1.0, matching=matching, search=search, backend="cpu")
        expected = 1.9 * x.float() - 0.9 * r[0][index.long()].float()
        assert torch.equal(y, expected.to(dtype))  # one rounding, the same for every instruction set


@native
def test_searches_that_an_instruction_set_lacks(isa):
    isa("portable")
    for search in ("bf16", "int8"):
        with pytest.raises(RuntimeError, match=f"cpu: has no search='{search}' with portable; it needs AVX-512"):
            ops.match(torch.randn(1, 3, 4), torch.randn(5, 4), search=search, backend="cpu")


@native
def test_instruction_set_from_the_environment():
    code = "from negengine.kernels.cpu import library; print(library.missing() or library.isa())"
    for name, seen in (("portable", "portable"), ("sse9", "NEGENGINE_CPU_ISA='sse9' is unknown")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "NEGENGINE_CPU_ISA": name}, capture_output=True, text=True
        )
        assert done.stdout.startswith(seen), done.stderr


@native
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_very_different_sizes(scale, dtype):
    """Rows that are scaled for the search stand beside rows that are not."""
    x, r = data("normal", 700, 65, 0), data("normal", 300, 65, 1)[0]
    x[0, ::3] *= scale
    r[1::2] *= min(scale, 1e30)
    x, r = x.to(dtype), r.to(dtype)
    wide = r.double()
    if scale == 1e-38:  # below eps: such a row has cosine almost 0 with everything
        norms = wide.norm(dim=-1).clamp_min(1e-12)
        s = (x[0].double() / x[0].double().norm(dim=-1, keepdim=True).clamp_min(1e-12)) @ (wide / norms[:, None]).T
        for search in searches(dtype):
            index = ops.match(x, r, search=search, backend="cpu")[1][0].long()
            assert (s.amax(1) - s.gather(1, index[:, None])[:, 0]).max() <= 1e-6
    else:
        for search in searches(dtype):
            assert shortfall(x[0], r, ops.match(x, r, search=search, backend="cpu")[1][0]).max() <= 1e-6


# --- determinism, memory, aliasing ---------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["first", "others"])
def test_the_same_bits_with_any_number_of_threads(dtype, mode, threads):
    x = torch.cat([data("related", 500, 72, seed, dtype) for seed in range(3)])
    for search in searches(dtype):
        results = []
        for count in (1, 2, 4, 2):
            threads(count)
            results.append(ops.negtome_(x.clone(), group_references(mode, 3, 3), 0.9, 0.3, search=search, backend="cpu"))
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert not torch.equal(results[0], x)


@native
def test_rows_that_read_each_other_in_place(threads):
    """Mutual matches form cycles, others chains: either way every read is of the value before the update."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 300, 16, generator=g)
    x[1] = x[0] + 0.01 * torch.randn(300, 16, generator=g)  # nearest to each other: cycles of two
    for count in (1, 3):
        threads(count)
        for mode in ("others", "previous"):
            table = group_references(mode, 5, 5)
            expected = ops.negtome_(x.clone(), table, 0.9, -1.0, bank=x.clone(), backend="cpu")
            assert torch.equal(ops.negtome_(x.clone(), table, 0.9, -1.0, backend="cpu"), expected)


@native
@pytest.mark.parametrize("shift", [1, 3, 7])
def test_a_bank_that_overlaps_askew(shift):
    """Tokens of the bank that lie across those of x: they are copied first."""
    storage = torch.randn(2 * 40 * 8 + 64)
    x, bank = storage[:640].view(2, 40, 8), storage[shift : shift + 640].view(2, 40, 8)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    expected = ops.negtome_(x.clone(), table, 0.9, -1.0, bank=bank.clone(), backend="cpu")
    assert torch.equal(ops.negtome_(x, table, 0.9, -1.0, bank=bank, backend="cpu"), expected)


@native
@pytest.mark.parametrize("images_inside", [False, True])
@pytest.mark.parametrize("shift", [1, 2, 4, 5, 6, 9, 10])
def test_a_bank_that_overlaps_by_whole_tokens(shift, images_inside, threads):
    """Beyond the last token of an image lies the first of the next, which may be overwritten too."""
    threads(2)
    storage = torch.randn(30, 8)
    shape = (5, 3, 8) if images_inside else (3, 5, 8)
    x, bank = (storage[i : i + 15].view(shape) for i in (0, shift))
    if images_inside:
        x, bank = x.transpose(0, 1), bank.transpose(0, 1)
    for table in (torch.tensor([[1], [2], [0]]), torch.tensor([[0], [1], [2]]), torch.tensor([[2], [2], [1]])):
        saved = storage.clone()
        expected = ops.negtome_(x.clone(), table.int(), 0.9, -1.0, bank=bank.clone(), backend="cpu")
        assert torch.equal(ops.negtome_(x, table.int(), 0.9, -1.0, bank=bank, backend="cpu"), expected)
        storage.copy_(saved)


@native
def test_channels_that_are_not_adjacent():
    x, r = torch.randn(2, 9, 30), torch.randn(30, 12)
    wide = x.transpose(1, 2)
    expected = ops.negtome(wide.contiguous(), r.T[:, :9].contiguous(), 0.9, 0.0, backend="cpu")
    assert torch.equal(ops.negtome(wide, r.T[:, :9], 0.9, 0.0, backend="cpu"), expected)
    z = x.clone().transpose(1, 2)
    ops.negtome_(z, torch.zeros(2, 1, dtype=torch.int32), 0.9, 0.0, bank=r.T[None, :, :9], backend="cpu")
    assert torch.equal(z, expected)


@native
def test_the_workspace_is_kept_bounded_and_given_back():
    space = cpu.workspace()
    space.release()
    assert space.bytes == 0
    ops.match(data("normal", 100, 64), data("normal", 100, 64)[0], backend="cpu")
    kept = space.bytes
    assert 0 < kept < 2**20
    ops.match(data("normal", 100, 64), data("normal", 100, 64)[0], backend="cpu")
    assert space.bytes == kept
    x = torch.randn(1, 4, 40)  # a table of references long enough for a large result
    ops.match(x.expand(1, 4, 40), torch.randn(200_000, 40), backend="cpu")
    assert space.bytes <= cpu.WORKSPACE_BYTES
    space.release()
    assert space.bytes == 0


@native
def test_a_call_takes_no_more_memory_than_promised():
    """At flux-1024, with a quarter of its rows: 26 MB for tokens searched in 16 bits or fewer, 40 MB in 32."""
    for dtype in (torch.bfloat16, torch.float32):
        for search in searches(dtype):
            bound = 40 if dtype == torch.float32 or cpu.precision(dtype, search) == "fp32" else 26
            space = library.Workspace(0)
            x, r = torch.randn(1, 60, 3072).to(dtype), torch.randn(1, 4096, 3072).to(dtype)
            cosine, index = torch.empty(1, 60), torch.empty(1, 60, dtype=torch.int32)
            table = torch.zeros(1, 1, dtype=torch.int32)
            problem = cpu._problem(Call(x, r, table, None, "paper", search), x, r)
            problem.threads = 2
            assert library.library().negengine_match(space.handle, ctypes.byref(problem), cosine.data_ptr(), index.data_ptr()) == 0
            assert space.peak <= bound * 1_000_000, (search, space.peak)


@native
def test_a_forked_child_starts_its_own_threads(threads):
    threads(3)
    x = torch.randn(2, 300, 16)
    ops.negtome(x, x[0], backend="cpu")
    child = os.fork()
    if child == 0:
        try:
            registry._BACKENDS["cpu"].match(Call(x, x, torch.zeros(2, 1, dtype=torch.int32), None, "paper", "auto"))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@native
def test_a_fork_while_another_thread_calls():
    """The child inherits a workspace that is locked, by a thread that it does not have."""
    code = """if True:
        import os, signal, threading, torch
        from negengine import ops
        torch.set_num_threads(1)
        x, busy = torch.randn(4, 512, 64), True
        def work():
            while busy:
                ops.negtome(x, x[0], backend="cpu")
        thread = threading.Thread(target=work, daemon=True)  # else it would keep a process that failed
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                ops.negtome(x[:, :5], x[0, :7], backend="cpu")
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        busy = False
        thread.join()
        print("done")
    """
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr


@native
def test_threads_that_make_the_first_call_share_a_workspace(monkeypatch):
    made = []
    monkeypatch.setattr(cpu, "_workspaces", {})
    monkeypatch.setattr(
        cpu, "Workspace", lambda *arguments: time.sleep(0.02) or made.append(library.Workspace(*arguments)) or made[-1]
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cpu.workspace(), range(8)))
    assert len(made) == 1
    assert all(space is made[0] for space in found)


@native
def test_the_threads_are_those_of_torch():
    """Threads of our own would share the cores with torch's, which spin for a while after every operator."""
    if cpu.parallel_of_torch() is None:
        pytest.skip("torch does not run on an OpenMP runtime that can be asked")
    code = """if True:
        import os, torch
        from negengine import ops
        torch.set_num_threads(3)
        x = torch.randn(4, 512, 64)
        torch.relu(torch.randn(2**21))
        before = len(os.listdir("/proc/self/task"))
        ops.negtome(x, x[0], backend="cpu")
        print(before, len(os.listdir("/proc/self/task")))
    """
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads in /proc")
    before, after = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(before) >= 3
    assert after == before


@native
def test_rows_too_long_for_integer_sums():
    """Equal rows of 400,000 signs have a product of codes beyond 2^31: bfloat16 is then searched exactly."""
    r, order = torch.randn(64, 400_000).sign().bfloat16(), torch.randperm(64)
    cosine, index = ops.match(r[order][None], r, backend="cpu")
    assert torch.equal(index[0], order.int())
    torch.testing.assert_close(cosine, torch.ones(1, 64), rtol=0, atol=2e-6)
    if "int8" in searches(torch.float32):
        with pytest.raises(ValueError, match="131072 for an int8 search"):
            ops.match(r[None], r, search="int8", backend="cpu")


# --- the C interface -----------------------------------------------------------------------------------------------------


@native
def test_wrong_arguments_give_codes():
    c, space = library.library(), library.Workspace(2**20)
    x, bank = torch.randn(2, 5, 8), torch.randn(3, 7, 8)
    cosine, index = torch.empty(2, 5), torch.empty(2, 5, dtype=torch.int32)

    def status(references=(0, 1), **changes):
        table = torch.tensor(references, dtype=torch.int32)[:, None]
        problem = cpu._problem(Call(x, bank, table, None, "paper", "auto"), x, bank)
        for name, value in changes.items():
            setattr(problem, name, value)
        return c.negengine_match(space.handle, ctypes.byref(problem), cosine.data_ptr(), index.data_ptr())

    assert status() == 0
    for changes in (
        {"x": None},
        {"D": 0},
        {"T": -1},
        {"x_token": -8},
        {"dtype": 3},
        {"search": 9},
        {"matching": -1},
        {"threads": 0},
    ):
        assert status(**changes) == ERROR_ARGUMENT, changes
    for changes in ({"matching": 1}, {"M": 2**31}, {"D": 2**25}, {"search": 3, "D": 2**18}):
        assert status(**changes) == ERROR_SHAPE, changes
    assert status(references=(0, 3)) == ERROR_REFERENCE
    assert status(references=(-5, -1)) == 0
    assert (index == -1).all()
    assert c.negengine_match(None, None, None, None) == ERROR_ARGUMENT
    assert c.negengine_match(space.handle, None, None, None) == ERROR_ARGUMENT
    table = torch.tensor([[0], [-1]], dtype=torch.int32)
    problem = cpu._problem(Call(x, bank, table, None, "paper", "auto"), x, bank)
    gate, alpha, y = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, dtype=torch.float64), torch.empty_like(x)
    for wrong in (7, -1, 0):  # 0: in the image that has no reference
        pointers = (torch.full((2, 5), wrong, dtype=torch.int32).data_ptr(), gate.data_ptr(), alpha.data_ptr(), y.data_ptr())
        assert c.negengine_merge(space.handle, ctypes.byref(problem), *pointers, 40, 8) == ERROR_INDEX
    index.zero_()
    before = x.clone()
    pointers = (index.data_ptr(), gate.data_ptr(), alpha.data_ptr(), x.data_ptr())
    table = table.abs()
    problem = cpu._problem(Call(x, bank, table, None, "paper", "auto"), x, bank)
    for strides in ((8, 40), (40, 16), (-40, 8)):  # in place, but not where the tokens are
        assert c.negengine_merge(space.handle, ctypes.byref(problem), *pointers, *strides) == ERROR_ARGUMENT
        merge = cpu.MergeArguments(x.data_ptr(), alpha.data_ptr(), alpha.data_ptr(), None, None, *strides, 1, 0, 0, 0)
        assert c.negengine_negtome(space.handle, ctypes.byref(problem), ctypes.byref(merge)) == ERROR_ARGUMENT
    assert torch.equal(x, before)
    assert c.negengine_merge(space.handle, ctypes.byref(problem), *pointers, 40, 8) == 0
    assert not torch.equal(x, before)
    assert c.negengine_set_isa(77) == c.negengine_set_isa(-1) == ERROR_UNSUPPORTED
    assert c.negengine_isa_name(77) is None
    texts = {c.negengine_status_text(code) for code in range(8)}
    assert len(texts) == 8


@native
def test_a_reference_that_the_bank_lacks():
    with pytest.raises(ValueError, match="not an image of the bank"):
        ops.negtome_(torch.randn(2, 4, 8), torch.tensor([[1], [2]], dtype=torch.int32), 0.9, 0.0, backend="cpu")


# --- builds --------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_reason_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in build.build(tmp_path / "out")
    assert "no C++ compiler" in (tmp_path / "out" / build.FAILURE).read_text()
    monkeypatch.setattr(library, "FOLDER", tmp_path / "out")
    found, reason = library._open.__wrapped__()
    assert found is None
    assert reason.startswith("the native library was not built, calls on CPUs run several times slower")
    assert "no C++ compiler" in reason


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "false -O3" in build.build(tmp_path)
    assert not (tmp_path / build.NAME).exists()


def cmake(folder: Path, *options: str) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(folder), "-j", str(os.cpu_count())], check=True, capture_output=True)
    return folder


@pytest.mark.exhaustive
def test_example_program(tmp_path):
    folder = cmake(tmp_path)
    done = subprocess.run([str(folder / "negengine_negtome")], capture_output=True, text=True, check=True)
    assert "merged 768 of 768 tokens" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    """A short run; ``make fuzz`` runs long."""
    folder = cmake(tmp_path, f"-DNEGENGINE_SANITIZE={sanitizers}")
    for command in (["negengine_driver", "24"], ["negengine_fuzz", "5"]):
        done = subprocess.run([str(folder / command[0]), *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
