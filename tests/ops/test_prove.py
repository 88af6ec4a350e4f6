"""The proof itself: it passes what is right and finds what is wrong; the real child, under Triton's interpreter."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from negengine.kernels.triton import launch  # before TRITON_INTERPRET is set: other tests want the kernels as they are

from negengine import ops
from negengine.ops import establish, prove, registry, verdicts
from negengine.ops import triton as triton_backend

CPU = torch.device("cpu")
SMALL = (2, 16, 16, 16)
HALF = pytest.param(torch.float16, marks=pytest.mark.exhaustive)


@pytest.fixture
def broken(monkeypatch):
    """Registers the torch backend, changed: ``match(call, cosine, index)`` and ``run(call, before)`` come after its own."""
    torch_backend = registry._BACKENDS["torch"]

    def add(match=lambda call, cosine, index: None, run=lambda call, before: None, into_new_memory=False):
        def matched(call):
            found = torch_backend.match(call)
            return match(call, *found) or found

        def ran(call):
            before = call.x.clone()
            torch_backend.run(call)
            if into_new_memory == (call.y is not call.x):
                run(call, before)

        changed = dataclasses.replace(torch_backend, name="broken", match=matched, run=ran)
        monkeypatch.setattr(registry, "_BACKENDS", registry._BACKENDS | {"broken": changed})

    return add


def faults(backend, dtype=torch.float32, search="auto", matching="paper"):
    found = {case.name: prove.fault(case, backend, CPU, dtype, search, matching) for case in prove.cases_for("any", matching)}
    return {name: text for name, text in found.items() if text is not None}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("matching", ["paper", "release"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF], ids=str)
def test_right_backends_pass(backend, matching, dtype):
    if ops.backends()[backend] is not None:
        pytest.skip(ops.backends()[backend])
    assert faults(backend, dtype, matching=matching) == {}
    device = [CPU, dtype, "auto", matching]
    assert prove.computed_witness("n", backend, *device) == prove.witness("n", matching)
    assert prove.witness("n", matching) != prove.witness("m", matching)


def test_new_memory_is_tried_too(broken):
    broken(run=lambda call, before: call.y.add_(1), into_new_memory=True)
    assert set(faults("broken").values()) == {"into new memory, the result is another one"}


def test_a_full_card_blames_no_kernel():
    for text in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: out of memory"):
        assert not prove.blames_kernels(RuntimeError(text))
    assert prove.blames_kernels(RuntimeError("CUDA error: an illegal memory access was encountered"))


def wrong_row(call, cosine, index):
    return cosine, torch.where(index >= 0, call.bank.shape[1] - 1, index).int()


def last_of_equal(call, cosine, index):
    if call.references.shape[1] > 1:
        return None
    equal = (call.bank[0][:, None] == call.bank[0]).all(-1)
    last = equal.shape[1] - 1 - equal.flip(1).int().argmax(1)
    return cosine, torch.where(index >= 0, last[index.clamp_min(0).long()], index).int()


def masked_row(call, cosine, index):
    if call.mask is not None:
        return cosine, torch.where(index >= 0, int((~call.mask[0]).nonzero()[0]), index).int()
    return None


def beside_the_tokens(call, before):
    call.y.as_strided((1,), (1,), call.y.storage_offset() + call.y.shape[1] * call.y.stride(1)).fill_(1)


def beside_the_counts(call, before):
    call.stats.as_strided((1,), (1,), call.stats.storage_offset() + 3).add_(1)


def into_the_bank(call, before):
    if call.bank is not call.x:
        call.bank[1, 0, 0] += 1


def at_random(call, before):
    call.y[-1].add_(1e-6 * torch.rand(()))


def dropped_tokens(call, before):
    if call.keep is not None:
        call.y[1:] = torch.where(call.keep[1:, :, None], call.y[1:], 1.001 * call.y[1:])


def rounded_twice(call, before):
    merged = (call.y != before).any(-1, keepdim=True)
    call.y[:] = torch.where(merged, call.y.bfloat16().float(), call.y)


def stale_reference(call, before):  # as if in-place results had been read as references
    if call.references.shape[1] > 1 and call.bank is call.x:
        call.y[-1] += 1e-3 * (call.y[0] - before[0])


MATCH = {
    "a wrong row": (wrong_row, "below the best"),
    "the last of equal rows": (last_of_equal, "of equal tokens the first was not chosen"),
    "a masked row": (masked_row, "a token was chosen that must not be"),
    "a row out of range": (lambda call, cosine, index: (cosine, torch.where(index >= 0, 10**6, index).int()), "must not be"),
    "another cosine": (lambda call, cosine, index: (cosine - 1e-5, index), "a cosine is not that of the chosen token"),
    "a row where there is none": (lambda call, cosine, index: (cosine, index.clamp_min(0)), "has no reference and changed"),
}
RUN = {
    "memory beside the tokens": (beside_the_tokens, "memory beside the tokens was written"),
    "memory beside the counts": (beside_the_counts, "memory beside the counts was written"),
    "the bank": (into_the_bank, "the bank was written"),
    "random bits": (at_random, "gave different results"),
    "tokens that were dropped": (dropped_tokens, "a token changed that must not"),
    "results in bfloat16": (rounded_twice, "further from the oracle than torch's arithmetic"),
    "stale references": (stale_reference, "further from the oracle"),
    "counts": (lambda call, before: call.stats.add_(1), "counted"),
    "nothing": (lambda call, before: call.y.copy_(before), "further from the oracle than torch's arithmetic"),
}


@pytest.mark.parametrize("fault", MATCH)
def test_wrong_matches_are_found(fault, broken):
    change, text = MATCH[fault]
    broken(match=change)
    found = faults("broken")
    assert found
    assert any(text in reason for reason in found.values()), found


@pytest.mark.parametrize("fault", RUN)
def test_wrong_merges_are_found(fault, broken):
    change, text = RUN[fault]
    broken(run=change)
    found = faults("broken")
    assert found
    assert any(text in reason for reason in found.values()), found


@pytest.mark.parametrize("M", [64, 40])
def test_large_shapes_are_sampled(broken, M):
    case = prove.large_case((3, 64, M, 32))
    assert prove.fault(case, "torch", CPU, torch.float32, "auto", "paper") is None
    broken(match=wrong_row)
    assert "below the best" in prove.fault(case, "broken", CPU, torch.float32, "auto", "paper")


def test_what_an_error_says():
    class CompilationError(Exception):
        __module__ = "triton.compiler.errors"

    for text in ("CUDA error: an illegal memory access", "Triton Error [CUDA]: misaligned"):
        assert prove.blames_kernels(RuntimeError(text))
    assert prove.blames_kernels(CompilationError())
    for text in ("Triton Error [CUDA]: out of memory", "Failed to find C compiler"):
        assert not prove.blames_kernels(RuntimeError(text))
    assert not prove.blames_kernels(torch.OutOfMemoryError("no memory"))
    assert not prove.blames_kernels(FileNotFoundError("ptxas"))


def answer(folder, monkeypatch, **changes):
    request = {"nonce": "n", "device": "cpu", "uuid": "", "dtype": "float32", "search": "auto", "matching": "paper"}
    request |= {"cases": ["one token"], "shapes": []} | changes
    (folder / "request.json").write_text(json.dumps(request))
    prove.main(folder)
    return [json.loads(line) for line in (folder / "answer.json").read_text().splitlines()]


def test_an_answer_of_wrong_kernels(tmp_path, monkeypatch, broken):
    broken(match=lambda call, cosine, index: (cosine - 1, index))
    monkeypatch.setattr(registry, "_BACKENDS", {"triton": registry._BACKENDS["broken"]})
    parts = answer(tmp_path, monkeypatch)
    assert parts[1] == {"running": "the kernels"}
    assert parts[-2:] == [{"wrong": "one token: image 1: a cosine is not that of the chosen token"}, {"done": True}]


@pytest.mark.parametrize("error,part", [
    (RuntimeError("CUDA error: an illegal memory access"), "wrong"), (torch.OutOfMemoryError("none left"), "unknown"),
])  # fmt: skip
def test_an_answer_of_kernels_that_fail(tmp_path, monkeypatch, broken, error, part):
    def fails(call, before):
        raise error

    broken(run=fails)
    monkeypatch.setattr(registry, "_BACKENDS", {"triton": registry._BACKENDS["broken"]})
    assert answer(tmp_path, monkeypatch)[-2] == {part: f"{type(error).__name__}: {error}"}


def test_timings_end_with_their_budget(tmp_path, monkeypatch, broken):
    broken()
    monkeypatch.setattr(registry, "_BACKENDS", {"triton": registry._BACKENDS["broken"], "torch": registry._BACKENDS["torch"]})
    monkeypatch.setattr(prove, "BUDGET", 0.0)
    parts = answer(tmp_path, monkeypatch, cases=[], shapes=[SMALL, (2, 8, 8, 16)])
    assert [part["speed"]["shape"] for part in parts if "speed" in part] == [list(SMALL)]


def test_an_answer_without_the_device(tmp_path, monkeypatch):
    (part,) = answer(tmp_path, monkeypatch, device="cuda", uuid="GPU-of-another-machine")
    assert part == {"unknown": "RuntimeError: the device GPU-of-another-machine is not visible to a new process", "done": True}


@pytest.mark.exhaustive
def test_the_real_child_proves_the_kernels_under_the_interpreter(monkeypatch, tmp_path, caplog):
    """It runs them on this CPU: right, and far slower than the fallback."""
    caplog.set_level("INFO", "negengine")
    assert launch.architecture(CPU).name == "interpreter"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(verdicts.VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(establish, "LIMIT", 600.0)  # a busy machine
    triton_backend._missing.cache_clear()
    try:
        verdicts.forget()
        verdict = ops.verify("cpu", torch.float32, shapes=[SMALL])
        assert (verdict.kind, verdict.cases) == ("slower", len(prove.INTERPRETED) + 1), verdict
        assert [speed.shape for speed in verdict.speeds] == [SMALL]
        assert "Triton's interpreter in float32: slower (" in caplog.messages[-1]
        verdicts.forget()
        assert ops.verify("cpu", torch.float32, shapes=[SMALL]) == verdict
    finally:
        triton_backend._missing.cache_clear()
        verdicts.forget()
