"""The methods of the papers, one file each: frozen, validated settings that know no pipeline."""

from negengine.methods.bank import ReferenceBank
from negengine.methods.base import Method
from negengine.methods.cads import CADS
from negengine.methods.dng import DynamicNegativeGuidance
from negengine.methods.dnp import DiffusionNegativePrompt
from negengine.methods.interval import GuidanceInterval
from negengine.methods.nag import NormalizedAttentionGuidance
from negengine.methods.negative_prompting import NegativePrompting
from negengine.methods.negtome import NegToMe, ReferenceImage
from negengine.methods.prompts import Embeddings, Prompt
from negengine.methods.seed_variance import SeedVariance
from negengine.methods.sld import SafeLatentDiffusion

_ALL: tuple[type[Method], ...] = (
    NegToMe,
    DynamicNegativeGuidance,
    NegativePrompting,
    SafeLatentDiffusion,
    NormalizedAttentionGuidance,
    CADS,
    SeedVariance,
    GuidanceInterval,
    DiffusionNegativePrompt,
)
KINDS = {kind.name: kind for kind in _ALL}  # every method by its short name

__all__ = [
    "CADS",
    "KINDS",
    "DiffusionNegativePrompt",
    "DynamicNegativeGuidance",
    "Embeddings",
    "GuidanceInterval",
    "Method",
    "NegToMe",
    "NegativePrompting",
    "NormalizedAttentionGuidance",
    "Prompt",
    "ReferenceBank",
    "ReferenceImage",
    "SafeLatentDiffusion",
    "SeedVariance",
]
