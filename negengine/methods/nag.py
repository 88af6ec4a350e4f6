"""Settings of normalized attention guidance (NAG, Chen et al., arXiv 2505.21179)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from negengine.methods import checks
from negengine.methods.base import Method
from negengine.methods.prompts import Prompt, check_prompt


@dataclass(frozen=True, kw_only=True)
class NormalizedAttentionGuidance(Method):
    """Negative guidance between attention outputs, also for few-step and guidance-distilled models. ``None`` takes the family's.

    With ``z+`` and ``z-`` a token's attention outputs under the positive and the negative prompt, ``g = scale z+ - (scale - 1) z-``
    is shortened to at most ``tau`` times the L1 norm of ``z+``, and the output is ``alpha g + (1 - alpha) z+``.

    Args:
        negative_prompt: what is to be avoided: one text, one per prompt of the call, or :class:`Embeddings`.
        scale: 1 or more; 1 guides nothing.
        tau: largest ratio of the norms, above 0.
        alpha: share of the guided output, in ``[0, 1]``.
        timesteps: ``(low, high)``: active while ``low <= timestep <= high``, of 1000.
        blocks: names of the attention blocks that are guided: full names, leading parts, or globs.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "nag"
    title: ClassVar[str] = "NAG"

    negative_prompt: Prompt = ""
    scale: float | None = None
    tau: float | None = None
    alpha: float | None = None
    timesteps: tuple[float, float] = (0.0, 1000.0)
    blocks: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._set("negative_prompt", check_prompt("negative_prompt", self.negative_prompt))
        if self.scale is not None:
            self._set("scale", checks.at_least("scale", self.scale, 1))
        if self.tau is not None:
            self._set("tau", checks.positive("tau", self.tau))
        if self.alpha is not None:
            self._set("alpha", checks.between("alpha", self.alpha, 0, 1))
        self._set("timesteps", checks.window(self.timesteps, "NAG"))
        if self.blocks is not None:
            self._set("blocks", checks.blocks(self.blocks, "guided"))
