"""Prompts that a pipeline has encoded with a row each: how many images its call draws is known only from the latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

OTHER_PROMPTS = (
    "{} was given prompt_embeds without prompt: it encodes nothing then, so that methods cannot know which images share a prompt. "
    "Give prompt as well; beside embeddings its text is not encoded"
)


class Encoded:
    """What ``encode_prompt`` was called with and has returned, until the call's latents and its first step are there.

    Attributes:
        laid_out: the timesteps were laid out in the meantime.
    """

    def __init__(self, pipe: str, arguments: Mapping[str, Any], result: tuple[Any, ...]) -> None:
        self.pipe, self.arguments, self.result = pipe, arguments, result
        self.laid_out = False
        self._expected: list[Tensor] = []

    def per_prompt(self, images: int) -> int:
        """So many images are drawn. Raises ValueError: not of these prompts."""
        texts = self.result[0]
        if images % len(texts):
            raise ValueError(OTHER_PROMPTS.format(self.pipe))
        self._expected = [text for text in texts for _ in range(images // len(texts))]
        return images // len(texts)

    def check(self, given: Sequence[Tensor]) -> None:
        """The denoiser is called with these texts, the conditional ones first. Raises ValueError: they were not encoded last."""
        if any(a.data_ptr() != b.data_ptr() or a.shape != b.shape for a, b in zip(given, self._expected, strict=False)):
            raise ValueError(OTHER_PROMPTS.format(self.pipe))
