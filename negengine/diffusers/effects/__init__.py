"""What each method does to a denoiser: one file per kind of change."""

from __future__ import annotations

from typing import Any

from negengine.diffusers.effect import Effect
from negengine.diffusers.effects.nag import NagEffect
from negengine.diffusers.effects.negtome import NegToMeEffect
from negengine.methods import NegToMe, NormalizedAttentionGuidance
from negengine.methods.base import Method

EFFECTS: dict[type[Method], type[Effect[Any]]] = {NegToMe: NegToMeEffect, NormalizedAttentionGuidance: NagEffect}
