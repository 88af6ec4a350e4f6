"""What each method does to a denoiser: one file per kind of change."""

from __future__ import annotations

from typing import Any

from negengine.diffusers.effect import Effect
from negengine.diffusers.effects.conditioning import CadsEffect, SeedVarianceEffect
from negengine.diffusers.effects.guidance import DngEffect, NegativePromptingEffect
from negengine.diffusers.effects.interval import IntervalEffect
from negengine.diffusers.effects.nag import NagEffect
from negengine.diffusers.effects.negtome import NegToMeEffect
from negengine.diffusers.effects.safety import SafetyEffect
from negengine.methods import (
    CADS,
    DynamicNegativeGuidance,
    GuidanceInterval,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    SafeLatentDiffusion,
    SeedVariance,
)
from negengine.methods.base import Method

EFFECTS: dict[type[Method], type[Effect[Any]]] = {
    NegToMe: NegToMeEffect,
    DynamicNegativeGuidance: DngEffect,
    NegativePrompting: NegativePromptingEffect,
    SafeLatentDiffusion: SafetyEffect,
    NormalizedAttentionGuidance: NagEffect,
    GuidanceInterval: IntervalEffect,
    CADS: CadsEffect,
    SeedVariance: SeedVarianceEffect,
}
