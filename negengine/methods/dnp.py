"""Settings of diffusion-negative prompting (DNP, arXiv 2411.05473)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from negengine.methods import checks
from negengine.methods.base import Method

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class DiffusionNegativePrompt(Method):
    """The image that fits a prompt least is drawn, and its caption becomes the negative prompt.

    Settings of a driver of two runs, not of a method that is applied to a pipeline: the first run has the roles of prompt and
    unconditional prompt exchanged (``e_p + w (e_null - e_p)``), the second is the usual one. ``None`` takes what the
    second run has.

    Preset ``"paper"``: 41 steps; the paper's text does not print the guidance scale, 7.5 is Stable Diffusion's usual one.

    Args:
        captioner: a function of a picture (RGB) that returns its caption.
        steps: of the first run, 1 or more.
        guidance: scale ``w`` of the first run, above 0.
        keep_own: the caption stands beside the user's own negative prompt, not in its place.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "dnp"
    title: ClassVar[str] = "DNP"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"paper": {"steps": 41, "guidance": 7.5}}

    captioner: Callable[[Image.Image], str]
    steps: int | None = None
    guidance: float | None = None
    keep_own: bool = True

    def __post_init__(self) -> None:
        if not callable(self.captioner):
            raise TypeError(f"captioner must be a function of a picture that returns its caption, got {self.captioner!r}")
        if self.steps is not None:
            checks.positive_integer("steps", self.steps)
        if self.guidance is not None:
            self._set("guidance", checks.positive("guidance", self.guidance))
        checks.flag("keep_own", self.keep_own)
