"""What a method does to a denoiser: the doors through which it may act, each of which does nothing until it is overridden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.families import Family, Grid, Site
from negengine.diffusers.report import Report
from negengine.diffusers.rows import Join, Rows
from negengine.methods.base import Method
from negengine.methods.prompts import Prompt

Settings = TypeVar("Settings", bound=Method)


@dataclass(frozen=True)
class Call:
    """A pipeline's call, when its prompts have been encoded.

    Attributes:
        owner: the pipeline, held weakly.
        images: prompts x images per prompt.
        images_per_prompt: of each prompt.
        guided: whether it guides by two branches, as far as the pipeline or what it asks of ``encode_prompt`` tells.
        branches: rows for each image that methods join as further branches of guidance, as far as is known when it begins.
        device, dtype: of the prompts' embeddings.
        inputs: the denoiser's inputs that the call's own prompts have become, by name; a name with dots leads into a container.
        encode: prompts -> the denoiser's inputs that they become, with a row per image, of the length of the call's own
            unless the family masks what texts are filled up with.
    """

    owner: Callable[[], Any]
    images: int
    images_per_prompt: int
    guided: bool
    branches: int
    device: torch.device
    dtype: torch.dtype
    inputs: Callable[[], dict[str, Tensor]]
    encode: Callable[[Prompt], dict[str, Tensor]]

    @property
    def pipe(self) -> Any:
        return self.owner()


@dataclass(frozen=True)
class Step:
    """A step that the scheduler has made.

    Attributes:
        position: on the timesteps.
        sample: that it was made from. previous: that it led to.
    """

    position: int
    sample: Tensor
    previous: Tensor


class Effect(Generic[Settings]):
    """One method on one denoiser.

    The host's doors are called between the denoiser's forwards, and there alone may an effect change what it holds. The
    others are called inside the forward, possibly compiled, and only while ``active``: they read.

    Attributes:
        active: whether the next call of the denoiser is to be changed.
        active_steps: steps of the run in which it was active; counted by the session.
        steady: its rows stay in the batch from the first step to the last, since a step cache keeps something of them.
        start, stop: which rows of the batch it has joined.
        branches: rows that it joins for each image as further branches of guidance. They come before all others, and what is done
            to the images of the pipeline's branches is done to theirs.
        places_rows_first: whether its joined rows must follow those of all branches at once.
        listens_last: whether it hears a site after all others.
        tells_branches: whether it must know which rows are conditional.
    """

    branches = 0
    places_rows_first = False
    listens_last = False
    tells_branches = False

    def __init__(self, settings: Settings, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        self.settings, self.family, self.unscheduled = settings, family, unscheduled
        self.active = self.steady = False
        self.active_steps = 0
        self.start = self.stop = 0

    @classmethod
    def check(cls, settings: Settings, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        """Raise ValueError for settings that cannot work on a pipeline, or on a bare denoiser (``pipe`` None)."""

    @property
    def joining(self) -> bool:
        """Whether it may join rows; where no effect does, nothing is done to the denoiser's output."""
        return overrides(self, "joins")

    def sites(self) -> Iterable[Site]:
        """Where it wants to hear: the denoiser's sites, or further places of :data:`Site.where` ``"arguments"``."""
        return ()

    def spot(self, number: int) -> Any:
        """What it wants to be told at its site ``number``; asked once.

        Blocks alike share compiled code, which is made anew for every number and string that differs, but not for tensors.
        """
        return number

    # --- on the host, between forwards ---------------------------------------------------------------------------

    def prove(self, devices: Iterable[torch.device], dtype: torch.dtype, denoiser: nn.Module) -> None:
        """It is about to be used on these devices, before anything is changed."""

    def reset(self) -> None:
        """A call is about to begin: what was counted in the last one is forgotten."""
        self.active, self.active_steps = False, 0

    def begin(self, call: Call) -> None:
        """A pipeline's call has encoded its prompts. Raises for what cannot work in this call."""

    def second_prompts(self) -> None:
        """The call has encoded further prompts: it guides by calling the denoiser twice per step."""

    def negatives(self, encoded: Sequence[Any]) -> None:
        """What ``encode_prompt`` returned for the call's negative prompts; something else, or nothing, if it does not guide."""

    def sized(self, size: Grid, grids: Mapping[int, Grid]) -> None:
        """The height and width of the latents, and the token grids that follow, are known."""

    def latents_prepared(self, pipe: Any, size: Grid, device: torch.device, dtype: torch.dtype) -> None:
        """The pipeline has made its first latents."""

    def scheduled(self, clock: Clock) -> None:
        """The timesteps are laid out."""

    def starting(self, clock: Clock) -> None:
        """The loop over the steps begins, at ``clock.position``. Raises for what cannot work in this call."""

    def at(self, clock: Clock) -> bool:
        """The next call is at ``clock.position``: prepare for it, and say whether it is to be changed."""
        return False

    def refresh(self) -> None:
        """The denoiser is about to be called: callbacks at the end of the last step may have changed the pipeline's guidance."""

    def stepped(self, step: Step, clock: Clock) -> None:
        """The scheduler has made a step; ``clock`` still stands at it."""

    def finish(self) -> None:
        """The pipeline's call is over."""

    def report(self, clock: Clock) -> Report:
        """What it did in the last run."""
        return Report(self.settings.title, self.family.name, clock.steps, self.active_steps)

    # --- in the forward ------------------------------------------------------------------------------------------

    def arrived(self, inputs: Mapping[str, Any], rows: Rows, device: torch.device) -> None:
        """The pipeline calls the denoiser with these inputs by name, on this device; ``rows`` has those that were joined, too."""

    def inputs(self, inputs: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """The denoiser's inputs by name, with the conditioning edited."""
        return inputs

    def joins(self, inputs: Mapping[str, Any], rows: Rows) -> Join | None:
        """The rows that it wants in this call, whose inputs have the rows that were joined before."""
        return None

    def arguments(self, arguments: dict[str, Any], spot: Any, rows: Rows) -> dict[str, Any]:
        """What the module of its site is called with, by name."""
        return arguments

    def tokens(self, x: Tensor, spot: Any, rows: Rows) -> Tensor | None:
        """The image tokens ``[rows, tokens, D]`` at its site: changed in place, or returned anew."""
        return None

    def prediction(self, base: Tensor, own: Tensor) -> Tensor:
        """The denoiser's output: the pipeline's rows, as they go back to it, and the effect's own."""
        return base


def overrides(effect: Effect[Any], door: str) -> bool:
    """Whether an effect uses a door."""
    return getattr(type(effect), door) is not getattr(Effect, door)
