"""A server for a while: two threads, settings that change, LoRA swaps, failing callbacks.

Its memory does not grow, and its results are those of fresh pipelines.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import threading

import pytest
import torch
from test_together import add_lora, drop_lora
from tiny import BUILDERS, denoiser, draw, picture

import negengine
from negengine.diffusers.session import Session

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
AVOID = "the sea"
SETTINGS = [
    [],
    [negengine.NegToMe(**MERGE)],
    [negengine.NegToMe(**MERGE, reference="others", alpha=0.4)],
    [negengine.NegToMe(**MERGE, reference=negengine.ReferenceImage(picture()))],
    [negengine.NegToMe(**MERGE), negengine.NegativePrompting(prompt=AVOID, scale=2.0)],
    [negengine.DynamicNegativeGuidance(prompt=AVOID, surrogate="ancestral"), negengine.SeedVariance(timesteps=(0, 1000))],
    [negengine.NormalizedAttentionGuidance(negative_prompt=AVOID), negengine.CADS(tau1=0.1, tau2=1.0)],
]
STEPS = 2
BUILDING = threading.Lock()  # random weights come from torch's one global generator


class Stop(Exception):
    pass


def fail(pipe, i, timestep, tensors):
    raise Stop


def drawn(pipe, n, seed):
    return draw(pipe, prompts=1, n=n, seed=seed, num_inference_steps=STEPS)


class Worker(threading.Thread):
    """Generates with changing settings on one pipeline; ``wrong`` tells what differed from a fresh pipeline."""

    def __init__(self, family: str, generations: int, seed: int) -> None:
        super().__init__()
        self.family, self.generations, self.random = family, generations, random.Random(seed)
        self.pipe, self.wrong, self.known = BUILDERS[family](), [], {}
        self.lora = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for number in range(self.generations):
                self.generate(number)
        except BaseException as error:
            self.error = error

    def generate(self, number: int) -> None:
        pick = self.random.randrange(len(SETTINGS))
        n, seed = self.random.choice([1, 2, 3]), self.random.randrange(3)
        if self.random.random() < 0.3:
            self.lora = not self.lora
            with BUILDING:
                (add_lora if self.lora else drop_lora)(self.pipe)
        negengine.remove(self.pipe)
        if SETTINGS[pick]:
            negengine.apply(self.pipe, *SETTINGS[pick])
        if self.random.random() < 0.2:
            with pytest.raises(Stop):
                draw(self.pipe, prompts=1, n=n, num_inference_steps=STEPS, callback_on_step_end=fail)
        got = drawn(self.pipe, n, seed)
        key = pick, n, seed, self.lora
        if key not in self.known:
            with BUILDING:
                fresh = BUILDERS[self.family]()
                if self.lora:
                    add_lora(fresh)
            self.known[key] = drawn(negengine.apply(fresh, *SETTINGS[pick]) if SETTINGS[pick] else fresh, n, seed)
        if not torch.equal(got, self.known[key]):
            self.wrong.append((number, *key))


def resident() -> int:
    """Bytes of this process that lie in memory, without what the C library keeps of memory that was freed."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def served(generations: int, seed: int) -> list[Worker]:
    workers = [Worker(family, generations, seed) for family in ("flux", "sdxl")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.error is not None:
            raise worker.error
    return workers


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def collected():
    """What is garbage is gone; a tensor may put off the end of the object that holds it by a round."""
    for _ in range(3):
        gc.collect()


def sessions() -> int:
    return sum(isinstance(thing, Session) for thing in gc.get_objects())


def checked(workers):
    for worker in workers:
        assert not worker.wrong
        negengine.remove(worker.pipe)
        if worker.lora:
            drop_lora(worker.pipe)
        assert not hooks(denoiser(worker.pipe))
        assert torch.equal(drawn(worker.pipe, 2, 0), drawn(BUILDERS[worker.family](), 2, 0))


def test_two_threads_with_a_pipeline_each():
    checked(served(4, seed=1))


@pytest.mark.exhaustive
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is read as Linux and its GNU C library tell it")
def test_three_hundred_generations():
    checked(served(25, seed=2))  # what is imported and compiled once
    collected()
    before, others = resident(), sessions()  # of tests that ran before in this process
    checked(served(125, seed=3))
    collected()
    grown = resident() - before
    assert sessions() <= others
    assert grown < 25e6, f"{grown / 1e6:.0f} MB more"
