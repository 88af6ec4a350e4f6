"""All that a metric may look at: one variant's images, seen and read by one extractor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from negengine.metrics.extractors.base import Extractor

WORDS = {
    "features": "a feature extractor",
    "logits": "an extractor that reads classes",
    "labels": "labels: an extractor that reads classes, or a file of labels",
    "classes": "the names of the classes",
    "extractor": "an extractor",
    "texts": "an extractor that reads texts (clip)",
    "prompts": "prompts",
    "expected": "the class that is asked for: class names in the prompts",
    "reference": "reference images",
    "asset": "the asset to keep away from",
    "asset_image": "the asset to keep away from",
    "forbidden": "the forbidden class",
    "base_labels": "a variant without any method, to compare with",
}  # what a metric needs, as an error says it


@dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """What is not there is None.

    Attributes:
        images: ``[N]``. groups: the rows of each group (a prompt and a seed).
        extractor: who saw them.
        features: ``[N, F]``. logits: ``[N, classes]``. labels: int64 ``[N]``. classes: their names.
        prompts: ``[N]``. texts: features of the prompts, ``[N, F]``. expected: int64 ``[N]``, the class that is asked for.
        reference: features ``[M, F]`` of the reference images.
        asset: features ``[1, F]`` of the asset. asset_image: itself.
        forbidden: number of the class that is to be absent.
        base_labels: int64 ``[M]``, of the variant without any method, drawn with other seeds where there are several.
    """

    images: Sequence[Image.Image]
    groups: Sequence[Sequence[int]]
    extractor: Extractor | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    prompts: Sequence[str] | None = None
    texts: Tensor | None = None
    expected: Tensor | None = None
    reference: Tensor | None = None
    asset: Tensor | None = None
    asset_image: Image.Image | None = None
    forbidden: int | None = None
    base_labels: Tensor | None = None

    def missing(self, needs: Sequence[str]) -> list[str]:
        """In words, what is needed and not there."""
        return [WORDS[name] for name in needs if getattr(self, name) is None]
