"""Establishing a verdict with stand-ins for the child: they prove, crash, hang, lie, flood their output or write half a file."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from negengine.kernels.files import locked
from proofs import FLUX, GPU, NOISY, SDXL, SLOWER, Child, call, honest, imagine_a_gpu

from negengine import ops
from negengine.ops import establish, prove, registry, verdicts

WIDTHS = {"flux": [3072], "sdxl": [1280]}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    imagine_a_gpu(monkeypatch, tmp_path)
    yield tmp_path / "negengine"
    verdicts.forget()
    establish._forced.clear()


@pytest.fixture
def child(monkeypatch, tmp_path):
    return lambda *args, **kwargs: Child(monkeypatch, tmp_path, *args, **kwargs)


def verify(**changes):
    return ops.verify(**{"device": GPU, "shapes": [FLUX]} | changes)


def settle(channels=(3072,)):
    return establish.settle([GPU, torch.device("cpu")], torch.bfloat16, "auto", "paper", channels)


def another_process():
    """What the next process knows: what is on disk."""
    verdicts.forget()
    establish._forced.clear()


def parts_with(change):
    """An honest answer, changed: ``change(part) ->`` another part, or None to leave it out."""
    return lambda request: [part for part in map(change, honest(request)) if part is not None]


# --- what a child finds out --------------------------------------------------------------------------------------


def test_proven_once_and_found_again(child, caplog):
    caplog.set_level("INFO", "negengine")
    runs = child()
    verdict = verify()
    assert verdict.kind == "proven"
    assert verdict.cases == len(prove.CASES) + 1
    assert verdicts.defers(call()) is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]  # users see the first
    assert "proving the Triton kernels on Imaginary H1 in bfloat16, once per machine; this takes seconds" in caplog.messages[0]
    assert verify() == verdict
    another_process()
    assert verify() == verdict
    assert [found.kind for found in settle()] == ["proven"]
    assert verdicts.defers(call()) is None
    assert runs.runs == 1


def test_wrong_is_loud_and_kept(child, caplog):
    runs = child(
        lambda request: [*honest(request)[:4], {"wrong": "one token: a cosine is not that of the chosen token"}, {"done": True}]
    )
    verdict = verify()
    assert (verdict.kind, verdict.cases) == ("wrong", 1)
    assert "wrong (one token: a cosine is not that of the chosen token); the torch backend is used instead" in caplog.messages[-1]
    another_process()
    assert settle() == [verdict]
    assert registry.choose(None, GPU, torch.bfloat16, "auto", call()).name == "torch"
    assert "found wrong (one token" in caplog.messages[-1]
    assert runs.runs == 1


def test_slower_is_kept_for_its_shape(child):
    runs = child(lambda request: honest(request, speeds=[[0.5] * 15, SLOWER]))
    assert verify(shapes=[FLUX, SDXL]).kind == "proven"
    another_process()
    assert verdicts.defers(call(FLUX)) is None
    assert "not faster at B=4 T=1024" in verdicts.defers(call(SDXL))
    child(lambda request: honest(request, speeds=[SLOWER]))
    assert verify(dtype=torch.float16).kind == "slower"
    assert settle(WIDTHS["sdxl"])[0].kind == "proven"
    assert runs.runs == 1


def test_disturbed_timings_are_not_kept_and_asked_again_by_the_next_process(child, folder, caplog):
    runs = child(lambda request: honest(request, speeds=[NOISY] * len(request["shapes"])))
    assert verify().kind == "unknown"
    assert "disturbed" in caplog.messages[-1]
    assert not (folder / "verdicts.json").exists()
    assert settle()[0].kind == "unknown"
    assert settle()[0].kind == "unknown"
    assert runs.runs == 1  # no pause for each pipeline call
    another_process()
    settle()
    assert runs.runs == 2
    verify()  # who asks for it, gets it
    assert runs.runs == 3


def test_only_what_is_missing_is_timed_and_the_rest_stays(child):
    runs = child()
    verify(shapes=[FLUX])
    verify(shapes=[FLUX, SDXL])
    assert [request["shapes"] for request in runs.requests] == [[list(FLUX)], [list(SDXL)]]
    another_process()
    assert {speed.shape for speed in verify(shapes=[FLUX, SDXL]).speeds} == {FLUX, SDXL}
    child(lambda request: honest(request, speeds=[NOISY]))
    assert verify(shapes=[(1, 2, 2, 4)]).kind == "proven"  # one more shape that tells nothing takes nothing away


def test_the_shapes_of_a_pipeline_are_those_of_its_channels(child):
    runs = child()
    settle(WIDTHS["flux"])
    assert {shape[3] for shape in runs.requests[0]["shapes"]} == {3072}
    settle([640, 1280])
    assert {shape[3] for shape in runs.requests[1]["shapes"]} == {640, 1280}
    another_process()
    Path(os.environ["XDG_CACHE_HOME"], "negengine", "verdicts.json").unlink()
    settle([99])
    assert [tuple(shape) for shape in runs.requests[2]["shapes"]] == list(establish.SHAPES)


def test_the_shapes_are_those_of_the_benchmarks():
    from negengine.bench.shapes import SHAPES

    assert tuple((s.images, s.tokens, s.tokens, s.channels) for s in SHAPES.values()) == establish.SHAPES


# --- children that do something else -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_child_that_the_kernels_crash(child, number):
    child(lambda request: honest(request)[:3], signal=number)
    assert str(verify()) == f"wrong (the kernels ended their process with {number.name})"
    another_process()
    assert verify().kind == "wrong"


@pytest.mark.parametrize("parts,number", [(0, signal.SIGSEGV), (1, signal.SIGSEGV), (5, signal.SIGKILL)])
def test_a_child_that_something_else_ends(child, folder, parts, number):
    runs = child(lambda request: honest(request)[:parts], signal=number)
    verdict = verify()
    assert (verdict.kind, verdict.reason) == ("unknown", f"the proof ended early, with exit status {-number}")
    assert not (folder / "verdicts.json").exists()
    another_process()
    settle()
    assert runs.runs == 2


def test_a_child_that_hangs_is_ended(child, monkeypatch):
    monkeypatch.setattr(establish, "LIMIT", 0.5)
    runs = child(lambda request: honest(request)[:5], seconds=60)
    begun = time.monotonic()
    assert verify().reason == "the proof did not end within 0 seconds"
    assert time.monotonic() - begun < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(runs.pid.read_text()), 0)


LIES = {
    "another question": (lambda part: part | {"nonce": "0"} if "nonce" in part else part, "it answers another question"),
    "another key": (
        lambda part: part | {"key": part["key"] | {"kernels": "older"}} if "key" in part else part,
        "it is about something else",
    ),
    "nothing": (lambda part: None if "nonce" in part else part, "it does not say what it is about"),
    "fewer cases": (lambda part: None if part.get("case") == "one token" else part, f"it tried {len(prove.CASES)} of"),
    "another result": (lambda part: {"witness": "0" * 64} if "witness" in part else part, "a result that is known beforehand"),
    "no times": (lambda part: None if "speed" in part else part, "it has no timings"),
    "no result": (lambda part: None if "witness" in part else part, "a result that is known beforehand"),
}
TIMES = {
    "negative": {"kernels": [-1.0] * 15},
    "not numbers": {"fallback": [float("nan")] * 15},
    "words": {"kernels": ["fast"] * 15},
    "few": {"kernels": [0.1]},
    "missing": {"kernels": None},
    "another shape": {"shape": [1, 1, 1, 1]},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_child_that_lies(child, folder, lie, caplog):
    change, why = LIES[lie]
    child(parts_with(change))
    verdict = verify()
    assert verdict.kind == "unknown"
    assert verdict.reason.startswith("the answer of the proof was refused: ")
    assert why in verdict.reason
    assert "the torch backend is used" in caplog.messages[-1]
    assert verdicts.defers(call()) is not None
    assert not (folder / "verdicts.json").exists()


@pytest.mark.parametrize("lie", TIMES)
def test_a_child_that_lies_about_times(child, lie):
    child(parts_with(lambda part: {"speed": part["speed"] | TIMES[lie]} if "speed" in part else part))
    assert "its timings are none" in verify().reason


def test_a_child_that_claims_wrongness_for_another_key(child):
    child(lambda request: [{"nonce": request["nonce"], "key": {"device": "another"}}, {"wrong": "all"}, {"done": True}])
    assert verify().kind == "unknown"


@pytest.mark.parametrize("answer", [b"", b"\xff\x00\x01", b"[1, 2]\n3\n", None], ids=["nothing", "noise", "no objects", "half"])
def test_a_child_that_writes_half_a_file(child, answer, folder):
    def half(request):
        whole = "".join(json.dumps(part) + "\n" for part in honest(request)).encode()
        return whole[:-8] if answer is None else answer

    child(half)
    assert verify().reason == "the proof ended early, with exit status 0"
    assert not folder.joinpath("verdicts.json").exists()


def test_a_child_that_fails_after_a_right_answer(child):
    child(status=1)
    assert verify().reason == "the proof ended early, with exit status 1"


def test_a_child_that_floods_its_output(child):
    child(flood=True)
    assert verify().kind == "proven"


def test_a_full_or_exclusive_device(child, folder):
    child(lambda request: [{"unknown": "OutOfMemoryError: CUDA out of memory", "done": True}])
    assert verify().reason == "OutOfMemoryError: CUDA out of memory"
    assert not folder.joinpath("verdicts.json").exists()


# --- where no child can be run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("executable", ["", None, "/usr/bin/uwsgi", "/usr/bin/blender"])
def test_a_program_that_is_no_interpreter(monkeypatch, executable, tmp_path):
    monkeypatch.setattr(sys, "executable", executable)
    assert "which is not a Python interpreter" in verify().reason


def test_a_frozen_program(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "which is not a Python interpreter" in verify().reason


def test_a_system_without_processes(monkeypatch):
    monkeypatch.setattr(establish, "child_command", lambda folder: ["/nowhere/python"])
    assert "no child process could be run: [Errno 2]" in verify().reason


def test_a_system_without_a_folder_for_temporary_files(monkeypatch):
    def none(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(establish.tempfile, "TemporaryDirectory", none)
    assert "No usable temporary directory" in verify().reason


# --- what makes a verdict void -----------------------------------------------------------------------------------


def test_a_changed_kernel_is_proven_anew(child, monkeypatch, caplog):
    runs = child()
    verify()
    another_process()
    monkeypatch.setattr(verdicts, "fingerprint", lambda: "changed")
    assert verdicts.defers(call()) == verdicts.UNPROVEN
    verify()
    assert runs.runs == 2
    assert any("(since the last time changed: kernels)" in message for message in caplog.messages)


def test_another_device_is_proven_apart(child, monkeypatch, tmp_path):
    runs = child()
    verify()
    imagine_a_gpu(monkeypatch, tmp_path, name="Imaginary A2")
    runs = child()
    assert verify().kind == "proven"
    assert runs.runs == 1


# --- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "trust"])
def test_nothing_is_proven_where_that_is_switched_off(child, monkeypatch, mode):
    runs = child()
    assert verify(mode=mode).kind == "unknown"
    monkeypatch.setenv(verdicts.VARIABLE, mode)
    assert settle()[0].kind == "unknown"
    assert runs.runs == 0
    assert verify(mode="auto").kind == "proven"  # the argument wins
    assert verify().kind == "proven"  # known now


def test_force_proves_anew_once_a_process(child, monkeypatch):
    runs = child()
    verify()
    monkeypatch.setenv(verdicts.VARIABLE, "force")
    another_process()
    settle()
    settle()
    assert runs.runs == 2
    child(lambda request: [*honest(request)[:3], {"wrong": "all of it"}, {"done": True}])
    assert verify(mode="force").kind == "wrong"
    child()
    assert verify(mode="auto").kind == "wrong"
    assert verify(mode="force").kind == "proven"


@pytest.mark.parametrize("changes,error", [
    ({"mode": "on"}, r"mode must be one of 'auto', 'off', 'trust', 'force', got 'on'"),
    ({"matching": "best"}, "matching must be one of"),
    ({"search": "fast"}, "search must be one of"),
    ({"shapes": [(1, 2, 3)]}, r"four positive whole numbers B, T, M, D, got \[1, 2, 3\]"),
    ({"shapes": [(1, 2, 0, 3)]}, "four positive whole numbers"),
    ({"matching": "release", "shapes": [(1, 2, 3, 4)]}, "T == M"),
])  # fmt: skip
def test_bad_arguments(child, changes, error):
    runs = child()
    with pytest.raises(ValueError, match=error):
        verify(**changes)
    assert runs.runs == 0


def test_the_variable_is_checked_by_all(child, monkeypatch):
    monkeypatch.setenv(verdicts.VARIABLE, "yes")
    for asking in (verify, settle):
        with pytest.raises(ValueError, match="NEGENGINE_VERIFY must be one of"):
            asking()


def test_a_device_that_has_no_such_kernels(child, monkeypatch):
    triton = dataclasses.replace(registry._BACKENDS["triton"], refuses=lambda *call: "of another age")
    monkeypatch.setattr(registry, "_BACKENDS", registry._BACKENDS | {"triton": triton})
    runs = child()
    with pytest.raises(RuntimeError, match="triton: of another age"):
        verify()
    assert settle() == []
    assert runs.runs == 0


def test_nothing_is_proven_while_a_graph_is_recorded(child, monkeypatch):
    runs = child()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="while a graph is compiled or captured"):
        verify()
    assert settle()[0].kind == "unknown"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert settle()[0].kind == "unknown"
    assert runs.runs == 0


# --- many workers ------------------------------------------------------------------------------------------------


def test_what_another_process_has_found_out_is_not_proven_again(child):
    runs = child()
    subject = verdicts.Subject(GPU, torch.bfloat16, "auto", "paper")
    assert verdicts.find(subject) is None  # an operator has asked
    verdicts.store().put(subject.key, verdicts.Verdict(False, "found by another"))
    assert settle()[0].reason == "found by another"
    assert runs.runs == 0


def test_between_a_look_and_the_lock_another_process_may_finish(child, monkeypatch):
    runs, alone = child(), establish._alone
    subject = verdicts.Subject(GPU, torch.bfloat16, "auto", "paper")

    def late():
        verdicts.store().put(subject.key, verdicts.Verdict(False, "found by another"))
        return alone()

    monkeypatch.setattr(establish, "_alone", late)
    assert settle()[0].reason == "found by another"
    assert runs.runs == 0


def test_while_another_process_proves_the_fallback_serves(child, folder, caplog):
    runs = child()
    folder.mkdir()
    with locked(folder / "verdicts.proving"):
        for _ in range(2):
            assert settle()[0].reason == "another process is proving the kernels just now"
            assert "another process" in verdicts.defers(call())
        verdicts.store().put(verdicts.Subject(GPU, torch.bfloat16, "auto", "paper").key, verdicts.Verdict(False, "x"))
        assert settle()[0].kind == "wrong"  # it has found out
    folder.joinpath("verdicts.json").unlink()
    another_process()
    with locked(folder / "verdicts.proving"):
        settle()
    assert settle()[0].kind == "proven"  # it has ended without a verdict
    assert runs.runs == 1


def test_of_many_processes_one_proves(child, tmp_path):
    runs = child(seconds=1.0)
    ready, go = os.pipe()
    workers = []
    for _ in range(4):
        worker = os.fork()
        if worker == 0:
            kind = ""
            try:
                os.close(go)
                os.read(ready, 1)  # until all are there
                kind = settle()[0].kind
            finally:
                os._exit({"proven": 10 + runs.runs, "unknown": 20 + runs.runs}.get(kind, 0))
        workers.append(worker)
    os.close(go)
    os.close(ready)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers)
    assert codes == [11, 20, 20, 20]
    another_process()
    assert settle()[0].kind == "proven"
    assert runs.runs == 0


def test_a_lock_does_not_outlive_its_holder(tmp_path):
    """A process that was forked while the lock was held has the file open, too."""
    with locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
    try:
        with locked(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_a_folder_to_meet_in_each_process_proves_for_itself(child, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runs = child()
    assert settle()[0].kind == "proven"
    assert settle()[0].kind == "proven"
    assert verdicts.defers(call()) is None
    another_process()
    settle()
    assert runs.runs == 2


# --- the child's surroundings ------------------------------------------------------------------------------------


def test_how_the_child_is_started(child, monkeypatch, tmp_path):
    """It imports this package whatever lies in the working folder, and proves nothing in its turn."""
    code = "import json, os, sys; json.dump([sys.path, os.environ['NEGENGINE_VERIFY'], os.getcwd()], open('seen.json', 'w'))"
    monkeypatch.setattr(establish, "child_command", lambda folder: [sys.executable, "-c", code])
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert establish.run_child(tmp_path) == 0
    path, mode, cwd = json.loads((tmp_path / "seen.json").read_text())
    assert path[1:3] == [str(Path(establish.__file__).parents[2]), "/somewhere"]
    assert (mode, cwd) == ("trust", str(tmp_path))


def test_the_request_names_the_device_by_its_identity(child):
    runs = child()
    verify(search="exact", dtype=torch.float16)
    request = runs.requests[0]
    assert (request["device"], request["uuid"], request["dtype"], request["search"]) == ("cuda", "GPU-1", "float16", "exact")
    assert len(request["nonce"]) == 32
    verify(search="exact", dtype=torch.float16, mode="force")
    assert runs.requests[1]["nonce"] != request["nonce"]
