"""Negative guidance for diffusers' modular pipelines: a guider, and the blocks that it needs."""

from negengine.diffusers.guiders.blocks import with_negative_guidance
from negengine.diffusers.guiders.guider import NegativeGuider

__all__ = ["NegativeGuider", "with_negative_guidance"]
