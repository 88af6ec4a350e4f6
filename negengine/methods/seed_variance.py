"""Settings of seed variance (SeedVarianceEnhancer for ComfyUI by ChangeTheConstants, version 2.1; also in InvokeAI)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from negengine.methods import checks
from negengine.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class SeedVariance(Method):
    """Uniform noise on a share of the prompt embedding's values. See :func:`negengine.ops.conditioning.seed_variance`.

    Preset ``"release"``: the published node's defaults, made for the embeddings of Z-Image.

    Args:
        share: part of the values that get noise, in ``[0, 1]``.
        strength: the noise is uniform in ``[-strength, strength]``, 0 or more.
        relative: ``strength`` is in standard deviations of the embedding, so that one number suits every text encoder; False:
            in units of its values, as in the published node (whose hint is 0.1 to 10 deviations).
        timesteps: ``(low, high)``: noise while ``low <= timestep <= high``, of 1000; the published node's first fifth.
        seed: of noise and choice, below 2**32 in size.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "seed-variance"
    title: ClassVar[str] = "seed variance"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "release": {"share": 0.5, "strength": 20.0, "relative": False, "timesteps": (800.0, 1000.0)}
    }

    share: float = 0.5
    strength: float = 1.0
    relative: bool = True
    timesteps: tuple[float, float] = (800.0, 1000.0)
    seed: int = 0

    def __post_init__(self) -> None:
        self._set("share", checks.between("share", self.share, 0, 1))
        self._set("strength", checks.not_negative("strength", self.strength))
        checks.flag("relative", self.relative)
        self._set("timesteps", checks.window(self.timesteps, "the noise"))
        checks.seed(self.seed)
