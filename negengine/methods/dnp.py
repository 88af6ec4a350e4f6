"""Settings of diffusion-negative prompting (DNP, arXiv 2411.05473)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from negengine.methods import checks
from negengine.methods.base import Method
from negengine.methods.nag import NormalizedAttentionGuidance

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
        avoid_with: NAG's settings, for models without a negative branch: the second run is made with NAG away from the caption. Its
            ``negative_prompt`` is filled in. None: the caption is the pipeline's own negative prompt.

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
    avoid_with: NormalizedAttentionGuidance | None = None

    def __post_init__(self) -> None:
        if not callable(self.captioner):
            raise TypeError(f"captioner must be a function of a picture that returns its caption, got {self.captioner!r}")
        if self.steps is not None:
            checks.positive_integer("steps", self.steps)
        if self.guidance is not None:
            self._set("guidance", checks.positive("guidance", self.guidance))
        checks.flag("keep_own", self.keep_own)
        if self.avoid_with is None:
            return
        if not isinstance(self.avoid_with, NormalizedAttentionGuidance):
            raise TypeError(f"avoid_with must be NormalizedAttentionGuidance or None, got {self.avoid_with!r}")
        if self.avoid_with.negative_prompt != "":
            raise ValueError("NAG's negative_prompt will be the caption; give your own negative_prompt to the call")
