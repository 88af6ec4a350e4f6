"""The classifier as a captioner: what a picture of an embedded model shows, in the words that those models read."""

from __future__ import annotations

from PIL import Image

from negengine.models import load_classifier
from negengine.models.digits import SIZE
from negengine.models.prompts import PROMPTS


class DigitCaptioner:
    """Says which digit a picture shows, as in ``"a handwritten three"``; it always says some digit."""

    identity = "mnist-classifier"

    def __init__(self) -> None:
        self.classifier = load_classifier()

    def __call__(self, image: Image.Image) -> str:
        if image.size != (SIZE, SIZE):
            raise ValueError(f"it reads digits of {SIZE} x {SIZE} pixels, and the picture has {image.size[0]} x {image.size[1]}")
        return PROMPTS[int(self.classifier.logits([image]).argmax())]
