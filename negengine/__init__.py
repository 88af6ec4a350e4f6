"""negengine: negative guidance for diffusion models, as a fast backend for unmodified diffusers pipelines."""

from negengine import ops
from negengine.diffusers import Status, apply, remove, status
from negengine.methods import NegToMe, ReferenceImage

__version__ = "0.1.0"
__all__ = ["NegToMe", "ReferenceImage", "Status", "__version__", "apply", "ops", "remove", "status"]
