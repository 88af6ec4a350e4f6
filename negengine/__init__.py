"""negengine: negative guidance for diffusion models, as a fast backend for unmodified diffusers pipelines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negengine import ops
    from negengine.diffusers.apply import apply, remove, status
    from negengine.diffusers.attach import attach
    from negengine.diffusers.dnp import diffusion_negative_prompting
    from negengine.diffusers.dns import diffusion_negative_image
    from negengine.diffusers.observers import observe
    from negengine.diffusers.recording import record_bank
    from negengine.diffusers.report import Status
    from negengine.methods import (
        CADS,
        DiffusionNegativePrompt,
        DynamicNegativeGuidance,
        Embeddings,
        GuidanceInterval,
        NegativePrompting,
        NegToMe,
        NormalizedAttentionGuidance,
        ReferenceBank,
        ReferenceImage,
        SafeLatentDiffusion,
        SeedVariance,
    )

__version__ = "0.1.0"
__all__ = [
    "CADS",
    "DiffusionNegativePrompt",
    "DynamicNegativeGuidance",
    "Embeddings",
    "GuidanceInterval",
    "NegToMe",
    "NegativePrompting",
    "NormalizedAttentionGuidance",
    "ReferenceBank",
    "ReferenceImage",
    "SafeLatentDiffusion",
    "SeedVariance",
    "Status",
    "__version__",
    "apply",
    "attach",
    "diffusion_negative_image",
    "diffusion_negative_prompting",
    "observe",
    "ops",
    "record_bank",
    "remove",
    "status",
]

# imported when first asked for: the operators and the kernels need torch and triton, and not the seconds that diffusers takes
_MODULES = ("captioners", "diffusers", "methods", "ops", "prometheus", "reference")
_HOMES = dict.fromkeys((name for name in __all__ if name[0].isupper()), "methods") | {"Status": "diffusers.report"}
_HOMES |= dict.fromkeys(("apply", "remove", "status"), "diffusers.apply")
_HOMES |= {
    "observe": "diffusers.observers",
    "diffusion_negative_image": "diffusers.dns",
    "diffusion_negative_prompting": "diffusers.dnp",
}
_HOMES |= {"attach": "diffusers.attach", "record_bank": "diffusers.recording"}

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"negengine.{name}")
        if name in _HOMES:
            return getattr(import_module(f"negengine.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'negengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *__all__})
