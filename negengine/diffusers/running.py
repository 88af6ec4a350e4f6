"""The call of a pipeline that is running: all that is known of it, and what every effect is told while it goes on."""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from negengine.diffusers.caches import cached
from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect, Step
from negengine.diffusers.families import Grid
from negengine.diffusers.joint import ImageTokens
from negengine.diffusers.observers import tell
from negengine.diffusers.processors import check_processors
from negengine.diffusers.report import Report, Stage, Status
from negengine.diffusers.rows import Rows
from negengine.ops import verdicts

logger = logging.getLogger("negengine")
ONE_AT_A_TIME = (
    ", and methods are applied to the pipelines of both: let one call end before the next begins (a lock), or give each thread "
    "a denoiser of its own"
)


class RunningCall:
    """The call that is running, or the last one. A session has one such object for all its calls, as compiled code reads it.

    What is applied in the middle of its steps acts from the next one on, told what the others were told at the beginning. Where
    nobody heard the beginning, since nothing was applied then, or another thread applies it, it begins with the next call.

    Attributes:
        applied: the effects that there are.
        effects: of these, those that the call began with.
        clock: where it stands on the scheduler's timesteps.
        open: it is running, and its prompts are encoded; the calls of a bare denoiser have no end.
        active: some effect changes the next call of the denoiser.
        rows: of the denoiser's batch.
        first_image_token: behind the text, in sequences that begin with it (:mod:`negengine.diffusers.joint`).
        image_tokens: of an image, in its finest grid.
        followed: whether tokens of other images follow them.
        size, grids: of the latents, and the token grids that follow.
        encoding: whether what is encoded now belongs to a call; a user may encode prompts between calls.
        prompts: lists of prompts that it has encoded.
        looping: its steps have begun.
        failed: an error has ended it, or refused it.
        silent: methods of the pipeline are called by us.
    """

    def __init__(
        self, effects: Sequence[Effect[Any]], bare: bool = False, unscheduled: bool = False, announced: bool = False
    ) -> None:
        """``announced``: the pipeline checks its inputs before it encodes its prompts, so that a call is heard to begin."""
        self.applied = list(effects)
        self.effects = list(effects) if bare else []
        self._admitted: list[Effect[Any]] = []  # about to be applied, and told of this call
        self._told: list[Callable[[Effect[Any]], None]] = []  # what a newcomer must be told of this call
        self._late: list[Effect[Any]] = []  # applied while it ran, of which they could not be told
        self._missed = False  # steps were heard of a call whose beginning was not
        self._bare = bare
        self.clock = Clock(unscheduled)
        self.rows = Rows()
        self.open, self.active = bare, False
        self.first_image_token: ImageTokens = 0
        self.image_tokens, self.followed = 0, False
        self.size: Grid | None = None
        self.grids: dict[int, Grid] = {}
        self._announced = announced
        self.encoding = not announced
        self.prompts = 0
        self.silent = self.looping = self.failed = False
        self._thread = 0
        self._rests = self._overtaken = False
        self._resting: list[RunningCall] = []  # until this call is over

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningCall:
        """Nothing drives a copied denoiser: it never hears of a call."""
        return RunningCall([])

    # --- from its beginning to its end ---------------------------------------------------------------------------

    def announce(self) -> None:
        """The pipeline has checked its inputs: what it encodes now belongs to this call."""
        self.prompts, self.encoding = 0, True

    def take_over(self, others: Sequence[RunningCall]) -> None:
        """Other pipelines' calls on the same denoiser act no more while this one runs, which begins now.

        Raises:
            RuntimeError: another thread is in the middle of one, whose methods would act on this call, too.
        """
        self._thread = threading.get_ident()
        running = [other for other in others if other.open]
        if any(other.looping and other._thread != self._thread for other in running):
            raise RuntimeError(f"another thread is in the middle of a call on the same denoiser{ONE_AT_A_TIME}")
        for other in running:
            other.decide_nothing()
            if other.looping:  # it makes this call from a callback
                other._rests = True
                self._resting.append(other)
            else:  # it has failed before its first step, as far as one can tell
                other.open, other.failed, other._overtaken = False, True, True

    def loop(self, denoiser: nn.Module) -> None:
        """Its steps begin.

        Raises:
            RuntimeError: another thread's call on the same denoiser began in the meantime. ValueError: what cannot work in it.
        """
        if self._overtaken:
            self._overtaken = False
            self._report_all()
            raise RuntimeError(f"another thread's call on the same denoiser began before this one's first step{ONE_AT_A_TIME}")
        self.looping = self.open
        if self.looping and not self._rests:
            with self.failing():
                check_processors(denoiser, self.effects, self.rows.parts)
                for effect in self.effects:
                    effect.starting(self.clock)

    def begin(self, call: Call, denoiser: nn.Module) -> None:
        """The first prompts are encoded."""
        if self.open:  # nobody heard how the last call ended: it has raised before its first step
            self._fail()
        elif self._overtaken:
            self._report_all()
        self._forget()
        self.open = True
        model = weakref.ref(denoiser)  # what is kept for newcomers keeps nothing alive

        def begin(effect: Effect[Any]) -> None:
            denoiser = model()
            assert denoiser is not None
            effect.steady = effect.joining and cached(denoiser)
            if effect.steady and self.looping:
                raise ValueError(
                    f"{effect.settings.title} joins rows to the denoiser's batch, of which a step cache keeps something from the "
                    "first step on; apply it before the call, not in the middle of it"
                )
            effect.prove([call.device], call.dtype, denoiser)
            effect.begin(call)

        self._tell(begin)

    def _forget(self) -> None:
        """All that is known of the last call."""
        self.clock.rewind()
        self.effects, self._late, self._missed, self.failed = list(self.applied), [], False, False
        self.open = self.active = self.looping = self._rests = self._overtaken = False
        self._told = []
        for effect in self.effects:
            effect.reset()

    def _tell(self, tell: Callable[[Effect[Any]], None]) -> None:
        """Tell the effects of this call, and those that come later."""
        self._told.append(tell)
        with self.failing():
            for effect in self.effects:
                tell(effect)

    def encoded_more(self) -> None:
        """Further prompts are encoded: it guides by a second call of the denoiser."""
        self._tell(lambda effect: effect.second_prompts())

    def encoded_negatives(self, encoded: Sequence[Any]) -> None:
        self._tell(lambda effect: effect.negatives(encoded))

    def latents_prepared(self, pipe: Any, size: Grid, grids: dict[int, Grid], device: torch.device, dtype: torch.dtype) -> None:
        self.encoding = not self._announced
        self.resize(size, grids)
        owner = weakref.ref(pipe)
        self._tell(lambda effect: effect.latents_prepared(owner(), size, device, dtype))
        self.decide()

    def admit(self, effects: Sequence[Effect[Any]], denoiser: nn.Module) -> None:
        """These are about to be applied: if it is in the middle of its steps, they will act from the next one on.

        Raises what the beginning of a call raises; nothing has been changed then.
        """
        self._admitted = []
        if not self.looping or self._thread != threading.get_ident():
            return
        check_processors(denoiser, effects, self.rows.parts)
        try:
            for effect in effects:
                if self.size is not None:
                    effect.sized(self.size, self.grids)
                for tell in self._told:
                    tell(effect)
                effect.scheduled(self.clock)
                effect.starting(self.clock)
        except BaseException:
            for effect in effects:
                effect.finish()
            raise
        self._admitted = list(effects)

    def change(self, applied: Sequence[Effect[Any]]) -> None:
        """Methods have been applied, or taken off, perhaps by a callback in the middle of the call."""
        gone = [effect for effect in self.effects if effect not in applied]
        new = [effect for effect in applied if effect not in self.applied]
        self.applied = list(applied)
        self.effects = [effect for effect in applied if effect in self.effects or effect in self._admitted]
        late = [effect for effect in new if self.open and effect not in self._admitted]
        self._late = [effect for effect in (*self._late, *late) if effect in applied]
        for effect in gone:
            effect.active = effect.steady = False
            if self.open and not self._bare:
                effect.finish()
                report = effect.report(self.clock)
                logger.info("%s on %s: %s; taken off in the middle of the run", report.method, report.family, report.told())
        if gone and not self.effects:
            verdicts.unpin()
        if self._admitted:
            self._admitted = []
            self.decide()
        self.active = any(effect.active or effect.steady for effect in self.effects)

    def end(self, failed: bool = False) -> None:
        """The call is over, or has failed in its steps."""
        if self.open:
            self.failed = failed
            self._finish()
        elif self._missed:
            self._missed, self._late = False, list(self.applied)
        else:
            return
        self._report_all()

    def _fail(self) -> None:
        """The call that is open has failed, or never opens."""
        self.failed = True
        self._finish()
        self._report_all()

    def _finish(self) -> None:
        self._close()
        for effect in self.effects:
            effect.active = effect.steady = False
            effect.finish()

    def _report_all(self) -> None:
        status = self.status()
        for report in status:
            logger.log(logging.WARNING if report.idle_reason else logging.INFO, "%s", report)
        tell(status)

    def _close(self) -> None:
        self.active = self.open = self.looping = False
        self._told = []
        verdicts.unpin()
        for other in self._resting:
            other._rests = False
            other.decide()
        self._resting = []

    def status(self) -> Status:
        return Status({type(effect.settings): self._report(effect) for effect in self.applied})

    def _report(self, effect: Effect[Any]) -> Report:
        report = effect.report(self.clock)
        if effect not in self.effects:
            return dataclasses.replace(report, steps=0, stage="late" if effect in self._late else "new")
        return dataclasses.replace(report, stage=self._stage(report.steps))

    def _stage(self, steps: int) -> Stage:
        """Of an effect that the call began with."""
        if self._bare:  # its calls have no end
            return "over" if steps else "new"
        if self.open:
            return "running"
        return "failed" if self.failed else "over"

    @contextmanager
    def failing(self) -> Iterator[None]:
        """A call that is refused is over: what is encoded next is not its."""
        try:
            yield
        except BaseException:
            self.encoding = not self._announced
            if not self._bare:
                self._fail()
            raise

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """As :meth:`failing`, for a call that has not begun: what is known is that of the one before."""
        with self.failing():
            try:
                yield
            except BaseException:
                self._forget()
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
            effect.active = self.open and not self._rests and effect.at(self.clock)
        self.active = any(effect.active or effect.steady for effect in self.effects) and not self._rests

    def decide_nothing(self) -> None:
        """Until :meth:`decide`, nothing is done to the denoiser's calls."""
        self.active = False
        for effect in self.effects:
            effect.active = False

    def move_to(self, position: int) -> None:
        self.clock.position = position
        self.decide()

    def schedule(self) -> None:
        """The scheduler has laid out its timesteps, perhaps for another pipeline that shares it."""
        if not self.open or self._rests:
            return
        self.clock.schedule(self.clock.scheduler)
        with self.failing():
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
        if self._rests:
            return
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
        self.size, self.grids, self.image_tokens = size, grids, max(grids, default=0)
        for effect in self.effects:
            effect.sized(size, grids)
