"""A GPU that is not there, and children that prove the kernels on it, or do something else."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import torch
from negengine.kernels.call import Call
from negengine.kernels.triton import launch, tuning

from negengine.ops import establish, prove, registry, verdicts

STANDIN = Path(__file__).with_name("standin.py")
GPU = torch.device("cuda", 0)
FLUX, SDXL = (4, 4096, 4096, 3072), (4, 1024, 1024, 1280)
FASTER, SLOWER, NOISY = [0.5] * prove.ROUNDS, [2.0] * prove.ROUNDS, [0.5, 2.0, 1.0] * (prove.ROUNDS // 3)


def imagine_a_gpu(patch, folder, name="Imaginary H1", uuid="GPU-1"):
    """Lets this process believe in a GPU, and keep what it learns in ``folder``."""
    properties = types.SimpleNamespace(uuid=uuid, major=9, minor=0)
    patch.setenv("XDG_CACHE_HOME", str(folder))
    patch.delenv(verdicts.VARIABLE, raising=False)
    patch.setattr(torch.cuda, "get_device_name", lambda device: name)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    patch.setattr(launch, "architecture", lambda device: tuning.ARCHITECTURES["sm_90"])
    triton = dataclasses.replace(registry._BACKENDS["triton"], missing=lambda: None, refuses=lambda *call: None)
    patch.setattr(registry, "_BACKENDS", registry._BACKENDS | {"triton": triton})
    verdicts.forget()
    establish._forced.clear()


def honest(request, fallback=1.0, speeds=None):
    """The parts of a right answer. ``speeds``: milliseconds of the kernels in each round, for each shape."""
    key = verdicts.Subject(GPU, getattr(torch, request["dtype"]), request["search"], request["matching"]).key
    shapes, speeds = request["shapes"], speeds or [FASTER] * len(request["shapes"])
    return [
        {"nonce": request["nonce"], "key": dataclasses.asdict(key)},
        {"running": "the kernels"},
        {"witness": prove.witness(request["nonce"], request["matching"])},
        *({"case": name} for name in [*request["cases"], *(prove.large_case(shape).name for shape in shapes)]),
        *(
            {"speed": {"shape": shape, "kernels": kernels, "fallback": [fallback] * prove.ROUNDS}}
            for shape, kernels in zip(shapes, speeds, strict=True)
        ),
        {"done": True},
    ]


class Child:
    """Takes the place of the real child; ``answer(request) -> parts`` or bytes; counts how often it ran."""

    def __init__(self, patch, folder, answer=honest, flood=False, seconds=0.0, signal=0, status=0):
        self.requests, self.answer, self.pid = [], answer, folder / "pid"
        self.play = {"flood": flood, "seconds": seconds, "signal": signal, "status": status, "pid": str(self.pid)}
        patch.setattr(establish, "child_command", self.command)

    def command(self, folder):
        request = json.loads((folder / "request.json").read_text())
        self.requests.append(request)
        answer = self.answer(request)
        if not isinstance(answer, bytes):
            answer = "".join(json.dumps(part) + "\n" for part in answer).encode()
        (folder / "play.json").write_text(json.dumps(self.play | {"answer": answer.hex()}))
        return [sys.executable, "-S", "-E", str(STANDIN), str(folder)]

    @property
    def runs(self):
        return len(self.requests)


def call(shape=FLUX, dtype=torch.bfloat16, search="auto", matching="paper"):
    """A call on the imaginary GPU, as far as a look-up reads it."""
    B, T, M, D = shape
    x = types.SimpleNamespace(device=GPU, dtype=dtype, shape=(B, T, D))
    return Call(x, types.SimpleNamespace(shape=(1, M, D)), None, None, matching, search)
