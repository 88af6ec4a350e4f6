"""A training loop that can be stopped at any step and continued to the same bits."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


@dataclass(frozen=True)
class Recipe:
    """How a task is optimised: AdamW, linear warm-up, then cosine to a hundredth of ``lr``; an average of the weights is kept.

    Attributes:
        ema: decay of the average; it is shorter in the first steps, ``(1 + step) / (10 + step)``.
        save_every: steps between resume files.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.995
    seed: int = 0
    save_every: int = 200

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Task(nn.Module, ABC):
    """Something to train: its parameters, and the loss of a random batch."""

    @abstractmethod
    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch; all of its randomness comes from ``generator``."""


AnyTask = TypeVar("AnyTask", bound=Task)


def train(
    task: AnyTask,
    recipe: Recipe,
    resume_file: Path,
    name: str = "training",
    on_step: Callable[[int, AnyTask], None] | None = None,
) -> AnyTask:
    """Train ``task`` in place and return its averaged copy.

    The batch of a step depends on the seed and the step alone, so that a run that was stopped, by Ctrl-C or worse, and
    started again yields the bits of an undisturbed one. ``resume_file`` is kept after the last step: another call
    then returns at once.

    Args:
        on_step: called after each step with the number of steps done and the average.

    Raises:
        RuntimeError: the resume file is damaged, or comes from another recipe or model.
        KeyboardInterrupt: passed on after the resume file is written.
    """
    average = copy.deepcopy(task).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(task.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.99))
    done = _resume(resume_file, task, average, optimizer, recipe)
    task.train()
    bar = tqdm(range(done, recipe.steps), desc=name, initial=done, total=recipe.steps, mininterval=2.0)
    with _deferred_interrupt() as interrupted:
        for step in bar:
            loss = _step(task, average, optimizer, recipe, step)
            done = step + 1
            if done % 20 == 0:
                bar.set_postfix(loss=f"{loss:.4f}")
            if on_step is not None:
                on_step(done, average)
            if done % recipe.save_every == 0 or done == recipe.steps or interrupted.is_set():
                _save(resume_file, task, average, optimizer, recipe, done)
            if interrupted.is_set():
                raise KeyboardInterrupt(f"stopped after {done} of {recipe.steps} steps; the same command continues")
    return average


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never cut in half; a second Ctrl-C interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _step(task: Task, average: Task, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(step)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    # the fused CPU attention takes half of a step in its bfloat16 backward; the plain one makes a FLUX step 1.3 x shorter
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        loss = task.loss(recipe.batch, generator)
    loss.backward()
    nn.utils.clip_grad_norm_(task.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    decay = min(recipe.ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in task.parameters()], 1 - decay)
    return loss.item()


def _save(file: Path, task: Task, average: Task, optimizer: torch.optim.Optimizer, recipe: Recipe, done: int) -> None:
    """Write beside the file, then rename: a crash leaves the older file whole."""
    state = {
        "recipe": _identity(recipe),
        "done": done,
        "task": task.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)


def _resume(file: Path, task: Task, average: Task, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
    """Restore everything from the file, if there is one; returns the number of steps done."""
    if not file.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
        recorded = state["recipe"]
    except Exception as error:
        raise RuntimeError(f"the resume file {file} is damaged ({error}); delete it to start this training over") from error
    if recorded != _identity(recipe):
        raise RuntimeError(
            f"the resume file {file} comes from another recipe, {recorded}, not {_identity(recipe)}; "
            "repeat that recipe, or delete the file to start over"
        )
    try:
        task.load_state_dict(state["task"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"the resume file {file} belongs to another model; delete it to start over: {error}") from error
    return state["done"]


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What must agree for a run to be continued."""
    fields = dataclasses.asdict(recipe)
    del fields["save_every"]
    return fields
