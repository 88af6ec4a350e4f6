"""The call of a pipeline that is running: all that is known of it, and what every effect is told while it goes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect, Step
from negengine.diffusers.families import Grid
from negengine.diffusers.report import Report, Status
from negengine.diffusers.rows import Rows

logger = logging.getLogger("negengine")


class RunningCall:
    """The call that is running, or the last one. A session has one such object for all its calls, as compiled code reads it.

    What is applied while it runs begins with the next call; what was there already goes on.

    Attributes:
        applied: the effects that there are.
        effects: of these, those that the call began with.
        clock: where it stands on the scheduler's timesteps.
        open: it is running, and its prompts are encoded; the calls of a bare denoiser have no end.
        active: some effect is, in the next call of the denoiser.
        rows, text_tokens: of the denoiser's batch.
        size, grids: of the latents, and the token grids that follow.
        encoding: whether what is encoded now belongs to a call; a user may encode prompts between calls.
        prompts: lists of prompts that it has encoded.
        silent: methods of the pipeline are called by us.
    """

    def __init__(
        self, effects: Sequence[Effect[Any]], bare: bool = False, unscheduled: bool = False, announced: bool = False
    ) -> None:
        """``announced``: the pipeline checks its inputs before it encodes its prompts, so that a call is heard to begin."""
        self.applied = list(effects)
        self.effects = list(effects) if bare else []
        self._late: list[Effect[Any]] = []  # applied while it ran
        self._missed = False  # steps were heard of a call whose beginning was not
        self._bare = bare
        self.clock = Clock(unscheduled)
        self.rows = Rows()
        self.open, self.active = bare, False
        self.text_tokens = 0
        self.size: Grid | None = None
        self.grids: dict[int, Grid] = {}
        self._announced = announced
        self.encoding = not announced
        self.prompts = 0
        self.silent = False

    # --- from its beginning to its end ---------------------------------------------------------------------------

    def announce(self) -> None:
        """The pipeline has checked its inputs: what it encodes now belongs to this call."""
        self.prompts, self.encoding = 0, True

    def begin(self, call: Call, denoiser: nn.Module) -> None:
        """The first prompts are encoded."""
        self.clock.rewind()
        self.effects, self._late, self._missed = list(self.applied), [], False
        self.open, self.active = True, False
        with self.closing_on_failure():
            for effect in self.effects:
                effect.active, effect.active_steps = False, 0
                effect.prove([call.device], call.dtype, denoiser)
                effect.begin(call)

    def encoded_more(self) -> None:
        """Further prompts are encoded: it guides by a second call of the denoiser."""
        with self.closing_on_failure():
            for effect in self.effects:
                effect.second_prompts()

    def latents_prepared(self, pipe: Any, size: Grid, grids: dict[int, Grid], device: torch.device, dtype: torch.dtype) -> None:
        self.encoding = not self._announced
        self.resize(size, grids)
        for effect in self.effects:
            effect.latents_prepared(pipe, size, device, dtype)
        self.decide()

    def change(self, applied: Sequence[Effect[Any]]) -> None:
        """Methods have been applied, or taken off, perhaps by a callback in the middle of the call."""
        gone = [effect for effect in self.effects if effect not in applied]
        new = [effect for effect in applied if effect not in self.applied]
        self.applied = list(applied)
        self.effects = [effect for effect in self.effects if effect in applied]
        self._late = [effect for effect in (*self._late, *(new if self.open else ())) if effect in applied]
        for effect in gone:
            effect.active = False
            if self.open and not self._bare:
                effect.finish()
                report = effect.report(self.clock)
                logger.info("%s on %s: %s; taken off in the middle of the run", report.method, report.family, report.told())
        self.active = any(effect.active for effect in self.effects)

    def end(self) -> None:
        if self.open:
            self.active = self.open = False
            for effect in self.effects:
                effect.active = False
                effect.finish()
        elif self._missed:
            self._missed, self._late = False, list(self.applied)
        else:
            return
        for report in self.status():
            logger.log(logging.WARNING if report.idle_reason else logging.INFO, "%s", report)

    def status(self) -> Status:
        return Status({type(effect.settings): self._report(effect) for effect in self.applied})

    def _report(self, effect: Effect[Any]) -> Report:
        report = effect.report(self.clock)
        if effect not in self.effects:
            return dataclasses.replace(report, steps=0, stage="late" if effect in self._late else "over")
        return dataclasses.replace(report, stage="running" if self.open and not self._bare else "over")

    @contextmanager
    def closing_on_failure(self) -> Iterator[None]:
        """A call that is refused is over: what is encoded next is not its."""
        try:
            yield
        except BaseException:
            self.active = self.open = False
            self.encoding = not self._announced
            for effect in self.effects:
                effect.finish()
            raise

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """For calls of the pipeline's methods that are our own."""
        self.silent = True
        try:
            yield
        finally:
            self.silent = False

    # --- once per step -------------------------------------------------------------------------------------------

    def decide(self) -> None:
        """What the next call of the denoiser is to have done to it."""
        for effect in self.effects:
            effect.active = self.open and effect.at(self.clock)
        self.active = any(effect.active for effect in self.effects)

    def decide_nothing(self) -> None:
        self.active = False
        for effect in self.effects:
            effect.active = False

    def move_to(self, position: int) -> None:
        self.clock.position = position
        self.decide()

    def schedule(self) -> None:
        """The scheduler has laid out its timesteps."""
        self.clock.schedule(self.clock.scheduler)
        for effect in self.effects:
            effect.scheduled(self.clock)
        self.move_to(0)

    def join(self) -> None:
        """A bare denoiser's scheduler is followed from now on: its timesteps may be laid out, and some steps made.

        Some samplers (DDIM) do not count their steps: they are taken to stand at the beginning.
        """
        scheduler = self.clock.scheduler
        if getattr(scheduler, "num_inference_steps", None) is not None:
            self.schedule()
            self.move_to(getattr(scheduler, "step_index", None) or 0)

    def refresh(self, timestep: Any) -> None:
        """The denoiser is about to be called at a timestep."""
        position = self.clock.locate(timestep)
        if position is not None and position != self.clock.position:
            self.move_to(position)
        for effect in self.effects:
            if effect.active:
                effect.refresh()

    def step(self, arguments: Mapping[str, Any], previous: torch.Tensor) -> None:
        """The scheduler has made a step, called with ``arguments``."""
        if not self.open:
            self._missed = True  # or it is that of another pipeline, with which this one shares its scheduler
            return
        position = self.clock.locate(arguments.get("timestep"))
        position = self.clock.position if position is None else position
        self.clock.steps += 1
        step = Step(position, arguments["sample"], previous)
        for effect in self.effects:
            effect.active_steps += effect.active
            effect.stepped(step, self.clock)
        self.move_to(position + 1)

    def resize(self, size: Grid, grids: dict[int, Grid]) -> None:
        self.size, self.grids = size, grids
        for effect in self.effects:
            effect.sized(size, grids)
