"""Verdicts: what follows from them for a call, where they are kept, and what a look-up costs."""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

from proofs import FASTER, FLUX, GPU, NOISY, SDXL, SLOWER, call, imagine_a_gpu

from negengine.ops import registry, verdicts
from negengine.ops.verdicts import Speed, Store, Subject, Verdict

SUBJECT = Subject(GPU, torch.bfloat16, "auto", "paper")
PROVEN = Verdict(True, cases=22, speeds=(Speed(FLUX, 0.5, 1.0, True),))
SLOW = Verdict(True, cases=22, speeds=(Speed(FLUX, 2.0, 1.0, False),))
WRONG = Verdict(False, "equal tokens: the last was chosen")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    imagine_a_gpu(monkeypatch, tmp_path)
    yield tmp_path / "negengine"
    verdicts.forget()


def learn(verdict, subject=SUBJECT):
    verdicts.learn(subject, subject.key, verdict)


def path(folder):
    return folder / "verdicts.json"


# --- what follows for a call -------------------------------------------------------------------------------------


def test_the_kernels_are_chosen_where_they_are_proven_only():
    def chosen(**changes):
        return registry.choose(None, GPU, torch.bfloat16, "auto", call(**changes)).name

    assert chosen() == "torch"
    learn(PROVEN)
    assert chosen() == "triton"
    assert chosen(shape=(8, 2304, 2304, 3072)) == "triton"  # near enough
    assert chosen(shape=(4, 64, 64, 64)) == "torch"
    assert chosen(dtype=torch.float16) == "torch"
    assert chosen(matching="release") == "torch"
    for verdict in (SLOW, WRONG, Verdict(None, "no time")):
        learn(verdict)
        assert chosen() == "torch"


def test_the_nearest_measurement_decides():
    verdict = Verdict(True, speeds=(Speed(FLUX, 0.5, 1.0, True), Speed(SDXL, 2.0, 1.0, False)))
    assert verdict.kind == "proven"
    assert verdict.against((2, 4096, 4096, 3072)) is None
    assert "not faster at B=4 T=1024 M=1024 D=1280" in verdict.against((4, 1000, 1000, 1280))
    assert verdict.against((4, 16384, 16384, 3072)) is None
    assert verdict.against((4, 16385, 16384, 3072)) == verdicts.UNMEASURED
    assert verdict.against((0, 4096, 4096, 3072)) is None


def test_symbolic_sizes_are_not_asked_for():
    shapes = ShapeEnv()
    T = shapes.create_unbacked_symint()
    learn(PROVEN)
    assert verdicts.defers(call((4, T, T, 3072))) is None
    learn(Verdict(True, speeds=(*PROVEN.speeds, Speed(SDXL, 2.0, 1.0, False))))
    assert "symbolic" in verdicts.defers(call((4, T, T, 3072)))
    assert not shapes.guards
    assert not shapes.deferred_runtime_asserts


def test_timings_decide_only_what_they_show():
    def judged(kernels):
        speed = Speed.judged(FLUX, kernels, [1.0] * 15)
        return None if speed is None else speed.faster

    assert judged(FASTER) is True
    assert judged(SLOWER) is False
    assert judged(NOISY) is None
    assert judged([0.94] * 15) is True
    assert judged([0.96] * 15) is False
    assert judged([0.945] * 8 + [0.955] * 7) is False  # quiet, but no clear gain
    assert judged([0.5] * 12 + [5.0] * 3) is True  # three rounds were disturbed
    assert judged([2.0] * 12 + [0.5] * 3) is False
    drifting = [1.0 + i for i in range(15)]
    assert Speed.judged(FLUX, [0.5 * ms for ms in drifting], drifting).faster


def test_cpus_defer_always(monkeypatch):
    for mode in verdicts.MODES:
        monkeypatch.setenv(verdicts.VARIABLE, mode)
        x = torch.zeros(1, 2, 3)
        assert "CPU" in verdicts.defers(call()._replace(x=x, bank=x))


def test_the_variable(monkeypatch):
    monkeypatch.setenv(verdicts.VARIABLE, "trust")
    assert verdicts.defers(call()) is None
    learn(PROVEN)
    monkeypatch.setenv(verdicts.VARIABLE, "off")
    assert verdicts.defers(call()) == "NEGENGINE_VERIFY=off"
    monkeypatch.setenv(verdicts.VARIABLE, "")
    assert verdicts.defers(call()) is None
    monkeypatch.setenv(verdicts.VARIABLE, "on")
    with pytest.raises(ValueError, match=r"^NEGENGINE_VERIFY must be one of 'auto', 'off', 'trust', 'force', got 'on'$"):
        verdicts.defers(call())


def test_who_names_wrong_kernels_is_warned_once(caplog):
    learn(WRONG)
    for _ in range(3):
        verdicts.warn_if_wrong(call())
    assert len(caplog.messages) == 1
    assert "backend='triton' runs because it was asked for, but on Imaginary H1 in bfloat16" in caplog.messages[0]
    assert "the last was chosen" in caplog.messages[0]


def test_who_names_good_or_trusted_kernels_is_not_warned(caplog, monkeypatch):
    verdicts.warn_if_wrong(call())
    learn(PROVEN)
    verdicts.warn_if_wrong(call())
    learn(WRONG)
    monkeypatch.setenv(verdicts.VARIABLE, "trust")
    verdicts.warn_if_wrong(call())
    assert caplog.messages == []


@pytest.mark.parametrize("verdict,text", [(None, "have not proved themselves"), (WRONG, "were found wrong")])
def test_the_fallback_is_announced_once(verdict, text, caplog):
    if verdict is not None:
        learn(verdict)
    for shape in (FLUX, SDXL, FLUX):
        verdicts.defers(call(shape))
    assert len(caplog.messages) == 1
    assert text in caplog.messages[0]


def test_an_unmeasured_shape_is_announced_once(caplog):
    learn(PROVEN)
    for _ in range(3):
        assert verdicts.defers(call((4, 64, 77, 3072))) is verdicts.UNMEASURED
        assert verdicts.defers(call(FLUX)) is None
    assert len(caplog.messages) == 1
    assert "not used at B=4 T=64 M=77 D=3072 on Imaginary H1 in bfloat16: their speed near this shape" in caplog.messages[0]


# --- within a pipeline call --------------------------------------------------------------------------------------


def test_a_verdict_does_not_change_within_a_pipeline_call():
    verdicts.pin()
    other = dataclasses.replace(SUBJECT, dtype=torch.float16)
    assert verdicts.find(SUBJECT) is None  # asked for the first time after the call began
    learn(PROVEN)
    learn(PROVEN, other)
    assert verdicts.find(SUBJECT) is None
    seen = []
    thread = threading.Thread(target=lambda: seen.append(verdicts.find(SUBJECT)))
    thread.start()
    thread.join()
    assert seen == [PROVEN]
    verdicts.pin()  # the next call
    assert verdicts.find(SUBJECT) == PROVEN
    learn(WRONG)
    assert verdicts.find(SUBJECT) == PROVEN
    verdicts.unpin()
    assert verdicts.find(SUBJECT) == WRONG


# --- on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [PROVEN, SLOW, WRONG])
def test_what_was_found_out_is_kept(verdict, folder):
    learn(verdict)
    verdicts.forget()
    assert verdicts.find(SUBJECT) == verdict
    assert path(folder).exists()


def test_what_was_not_found_out_is_not_kept(folder):
    learn(Verdict(None, "out of memory"))
    assert verdicts.find(SUBJECT).kind == "unknown"
    assert not folder.exists()


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(verdicts.Key)])
def test_a_verdict_holds_for_its_key_alone(field):
    own, key = verdicts.store(), SUBJECT.key
    own.put(key, PROVEN)
    value = getattr(key, field)
    other = dataclasses.replace(key, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert own.get(key) == PROVEN
    assert own.get(other) is None
    assert own.changed(other) == ([] if field in ("device", "dtype", "search", "matching") else [field])


def test_a_changed_kernel_has_another_fingerprint(tmp_path, monkeypatch):
    from negengine.kernels import call as call_module

    before = verdicts.fingerprint.__wrapped__()
    assert before == verdicts.fingerprint.__wrapped__()
    source = Path(call_module.__file__).parent
    for name in ("call.py", "triton/merge.py", "triton/launch.py", "eager/match.py"):
        copy = tmp_path / "kernels" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((source / name).read_bytes())
    monkeypatch.setattr(call_module, "__file__", str(tmp_path / "kernels" / "call.py"))
    copied = verdicts.fingerprint.__wrapped__()
    for name in ("call.py", "triton/merge.py", "triton/launch.py", "eager/match.py"):
        text = (tmp_path / "kernels" / name).read_bytes()
        (tmp_path / "kernels" / name).write_bytes(text + b"\n")
        assert verdicts.fingerprint.__wrapped__() != copied
        (tmp_path / "kernels" / name).write_bytes(text)
    assert verdicts.fingerprint.__wrapped__() == copied


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1, "verd', b"\xff\xfe", b"null"])
def test_a_damaged_file_is_said_to_be_once_and_replaced(content, folder, caplog):
    folder.mkdir()
    path(folder).write_bytes(content)
    for dtype in (torch.bfloat16, torch.float16):
        assert verdicts.find(dataclasses.replace(SUBJECT, dtype=dtype)) is None
    assert [m for m in caplog.messages if "damaged" in m] == [
        f"negengine: {path(folder)} is damaged and is not used; the next verdict replaces it"
    ]
    learn(PROVEN)
    verdicts.forget()
    assert verdicts.find(SUBJECT) == PROVEN


def test_a_file_of_another_version(folder, caplog):
    learn(PROVEN)
    path(folder).write_text(path(folder).read_text().replace('"version": 1', '"version": 2'))
    verdicts.forget()
    assert verdicts.find(SUBJECT) is None
    assert any("is of another version of negengine and is not used" in message for message in caplog.messages)
    learn(WRONG)
    verdicts.forget()
    assert verdicts.find(SUBJECT) == WRONG


@pytest.mark.parametrize(
    "changes",
    [
        {"right": "yes"}, {"right": None}, {"speeds": None}, {"speeds": [{"shape": [4, 4096, 4096]}]}, {"when": "yesterday"},
        {"speeds": [{"shape": [4, 0, 1, 1], "kernels_ms": 1, "fallback_ms": 1, "faster": True}]},
        {"speeds": [{"shape": [4, 1, 1, 1], "kernels_ms": 1, "fallback_ms": 1, "faster": 1}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_verdict_that_is_none_is_not_believed(changes, folder):
    learn(PROVEN)
    content = json.loads(path(folder).read_text())
    content["verdicts"][SUBJECT.key.text]["verdict"].update(changes)
    path(folder).write_text(json.dumps(content))
    verdicts.forget()
    assert verdicts.find(SUBJECT) is None


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    learn(PROVEN)
    learn(PROVEN, dataclasses.replace(SUBJECT, dtype=torch.float16))
    assert verdicts.find(SUBJECT) == PROVEN
    assert len([m for m in caplog.messages if "known to this process only" in m]) == 1


def test_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert verdicts.find(SUBJECT) is None
    learn(PROVEN)
    assert verdicts.find(SUBJECT) == PROVEN


def test_the_list_of_the_package_holds_for_any_driver(monkeypatch, tmp_path):
    assert json.loads(verdicts.SHIPPED.read_text())["version"] == verdicts.VERSION
    shipped = Store(tmp_path / "proven.json")
    shipped.put(dataclasses.replace(SUBJECT.key, driver=verdicts.ANY_DRIVER), PROVEN)
    monkeypatch.setattr(verdicts, "SHIPPED", shipped.path)
    assert verdicts.find(SUBJECT) == PROVEN
    learn(WRONG)  # what was seen here counts more
    verdicts.forget()
    assert verdicts.find(SUBJECT) == WRONG


def test_age_and_text():
    now = verdicts.time.time()
    ages = {0: "just now", 61: "1 minute ago", 7300: "2 hours ago", 90000: "1 day ago", -50: "just now"}
    assert {s: dataclasses.replace(PROVEN, when=now - s).age for s in ages} == ages
    assert str(WRONG) == "wrong (equal tokens: the last was chosen)"
    assert str(PROVEN).startswith("proven (22 cases agree with the float64 oracle; faster at B=4 T=4096")


# --- cost --------------------------------------------------------------------------------------------------------

_opened: list[str] = []
_listening = threading.Event()
sys.addaudithook(lambda event, args: _opened.append(str(args[0])) if event == "open" and _listening.is_set() else None)


def test_no_file_is_opened_after_the_first_look_up():
    _listening.set()
    try:
        verdicts.defers(call())
        assert any("proven.json" in name for name in _opened)
        _opened.clear()
        for shape in (FLUX, SDXL, (4, 77, 77, 64)):
            verdicts.defers(call(shape))
            verdicts.warn_if_wrong(call(shape))
        assert _opened == []
    finally:
        _listening.clear()
        _opened.clear()


def test_a_forked_process_looks_up_as_its_parent():
    learn(PROVEN)
    child = os.fork()
    if child == 0:
        try:
            right = verdicts.defers(call()) is None
            learn(WRONG)
            os._exit(0 if right and verdicts.find(SUBJECT) == WRONG else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert verdicts.find(SUBJECT) == PROVEN
