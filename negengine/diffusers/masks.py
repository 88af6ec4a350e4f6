"""Masks that a pipeline has laid on the texts of other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from negengine.diffusers.families import Conditioning

MIXED = (
    "%s gave images of one prompt the masks of other prompts, so that they see a part of their text, or what it is filled up with. "
    "Some pipelines of diffusers do so, also without negengine, when prompts of different length are drawn with "
    "num_images_per_prompt above 1. Give the prompts one call each"
)


def mixed(conditioning: Conditioning, arguments: Mapping[str, Any], encoded: Sequence[Any]) -> bool:
    """Whether ``encode_prompt``, called with these arguments, repeated masks in another order than the texts that they mask.

    It shows where images of one prompt have different masks; not where prompts of one length stand side by side, as many as there
    are images of each.
    """
    per_prompt = arguments.get("num_images_per_prompt") or 1
    if conditioning.mask is None or per_prompt == 1:
        return False
    for read, name in ((conditioning.prompts, "prompt_embeds"), (conditioning.negatives, "negative_prompt_embeds")):
        mask = read(encoded).get(conditioning.mask) if read is not None else None
        given = arguments.get(name)
        if mask is not None and (given is None or len(given) < len(mask)) and _differ(mask, per_prompt):
            return True
    return False


def _differ(mask: Tensor, per_prompt: int) -> bool:
    """Whether rows that follow each other, those of one prompt, are not all the same."""
    prompts = mask.view(-1, per_prompt, mask.shape[-1])
    return bool((prompts != prompts[:, :1]).any())
