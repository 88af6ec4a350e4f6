"""Settings of negative prompting with a fixed strength, the static limit of DNG (arXiv 2410.14398)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from negengine.methods import checks
from negengine.methods.base import Method
from negengine.methods.prompts import Prompt, check_prompt

NEGATIVES = ("raw", "cfg")


@dataclass(frozen=True, kw_only=True)
class NegativePrompting(Method):
    """``e - scale * (e_neg - e)`` in every step, ``e`` the base prediction and ``e_neg`` that for ``prompt``.

    Args:
        prompt: what is to be avoided: one text, one per prompt of the call, or :class:`Embeddings`.
        scale: guidance scale, 0 or more.
        negative: ``"raw"``: ``e_neg`` is the denoiser's prediction; ``"cfg"``: guided like the base.
        cfg: scale of the base's classifier-free guidance where the pipeline has none in its batch (FLUX), 0 or more; None: none.
        cfg_prompt: the unconditional prompt of ``cfg``.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "negative-prompting"
    title: ClassVar[str] = "negative prompting"
    owns_prediction: ClassVar[bool] = True

    prompt: Prompt
    scale: float = 1.0
    negative: str = "raw"
    cfg: float | None = None
    cfg_prompt: Prompt = ""

    def __post_init__(self) -> None:
        check_shared(self)


def check_shared(settings: Any) -> None:
    """Check and store what negative prompting and DNG have in common. Raises TypeError, ValueError."""
    settings._set("prompt", check_prompt("prompt", settings.prompt))
    settings._set("scale", checks.not_negative("scale", settings.scale))
    checks.choice("negative", settings.negative, NEGATIVES)
    if settings.cfg is not None:
        settings._set("cfg", checks.not_negative("cfg", settings.cfg))
    settings._set("cfg_prompt", check_prompt("cfg_prompt", settings.cfg_prompt))
