"""negengine: negative guidance for diffusion models, as a fast backend for unmodified diffusers pipelines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from negengine import ops
    from negengine.diffusers.apply import apply, remove, status
    from negengine.diffusers.report import Status
    from negengine.methods import Embeddings, NegToMe, NormalizedAttentionGuidance, ReferenceImage

__version__ = "0.1.0"
__all__ = [
    "Embeddings",
    "NegToMe",
    "NormalizedAttentionGuidance",
    "ReferenceImage",
    "Status",
    "__version__",
    "apply",
    "ops",
    "remove",
    "status",
]

# imported when first asked for: the operators and the kernels need torch and triton, and not the seconds that diffusers takes
_MODULES = ("diffusers", "methods", "ops", "reference")
_HOMES = {"Status": "diffusers.report"} | dict.fromkeys(("apply", "remove", "status"), "diffusers.apply")
_HOMES |= dict.fromkeys(("Embeddings", "NegToMe", "NormalizedAttentionGuidance", "ReferenceImage"), "methods")

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"negengine.{name}")
        if name in _HOMES:
            return getattr(import_module(f"negengine.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'negengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *__all__})
