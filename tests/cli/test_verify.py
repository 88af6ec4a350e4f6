"""``negengine verify`` and the verdicts in ``negengine doctor``, on a GPU that is not there."""

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from negengine import ops
from negengine.cli import app
from negengine.cli.doctor import kernels_on
from negengine.ops import verdicts

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from proofs import FLUX, GPU, Child, honest, imagine_a_gpu


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    imagine_a_gpu(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("COLUMNS", "300")
    yield
    verdicts.forget()


def test_proves_what_pipelines_use_and_finds_it_again(gpu, monkeypatch, tmp_path):
    child = Child(monkeypatch, tmp_path)
    for _ in range(2):
        result = run()
        assert result.exit_code == 0, result.output
        assert result.output.count("proven") == 2
        assert "faster at B=4 T=4096 M=4096 D=3072 (0.500 ms, fallback 1.000 ms)" in result.output
    assert [request["dtype"] for request in child.requests] == ["bfloat16", "float16"]
    assert run("--force", "--dtype", "float32", "--shape", "1,2,3,4").exit_code == 0
    assert (child.requests[2]["dtype"], child.requests[2]["shapes"]) == ("float32", [[1, 2, 3, 4]])


def test_fails_where_the_kernels_are_wrong(gpu, monkeypatch, tmp_path):
    Child(monkeypatch, tmp_path, lambda request: [*honest(request)[:3], {"wrong": "one token: of all"}, {"done": True}])
    result = run("--dtype", "bfloat16")
    assert result.exit_code == 1
    assert "one token: of all" in result.output
    assert kernels_on(GPU, torch.bfloat16) == "wrong (one token: of all)"


def test_doctor_tells_what_is_known_and_proves_nothing(gpu, monkeypatch, tmp_path):
    child = Child(monkeypatch, tmp_path)
    assert kernels_on(GPU, torch.bfloat16).startswith("unknown (they have not proved themselves on this device yet")
    assert child.runs == 0
    ops.verify(GPU, shapes=[FLUX])
    assert kernels_on(GPU, torch.bfloat16).endswith("just now")


@pytest.mark.parametrize(
    "arguments,error",
    [
        (("--dtype", "float7"), "there is no dtype 'float7'"), (("--shape", "4x4"), "a shape is B,T,M,D"),
        (("--shape", "4,4"), "four positive whole numbers"), (("--matching", "best"), "matching must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(gpu, arguments, error):
    result = run(*arguments)
    assert result.exit_code == 2
    assert error in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2
    assert "triton: needs a GPU" in result.stderr
