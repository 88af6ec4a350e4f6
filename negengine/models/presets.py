"""How the embedded models are meant to be sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from negengine.methods import NegToMe
from negengine.models.digits import SIZE
from negengine.models.people.attributes import SIZE as PEOPLE_SIZE


@dataclass(frozen=True)
class Preset:
    """Settings of one model.

    Attributes:
        name: of the model.
        steps: of the scheduler.
        guidance: scale of classifier-free guidance.
        max_sequence_length: number of text tokens, for the models that take one.
        height: of a picture, in pixels. width: the same.
    """

    name: str
    steps: int
    guidance: float
    max_sequence_length: int | None = None
    height: int = SIZE
    width: int = SIZE

    def call_kwargs(self, prompts: int = 1) -> dict[str, Any]:
        """What to pass to the pipeline besides its list of ``prompts`` prompts (or the one prompt)."""
        kwargs: dict[str, Any] = {"height": self.height, "width": self.width, "num_inference_steps": self.steps}
        if self.max_sequence_length is None:
            return kwargs | {"guidance_scale": self.guidance}
        guided = {"true_cfg_scale": self.guidance, "negative_prompt": [""] * prompts}
        return kwargs | guided | {"max_sequence_length": self.max_sequence_length}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("mnist-flux", steps=25, guidance=3.0, max_sequence_length=16),
        Preset("mnist-sdxl", steps=25, guidance=3.0),
        Preset("people-flux", steps=25, guidance=3.0, max_sequence_length=24, height=PEOPLE_SIZE, width=PEOPLE_SIZE),
        Preset("people-sdxl", steps=25, guidance=3.0, height=PEOPLE_SIZE, width=PEOPLE_SIZE),
    )
}

# The settings at which these small models gain most diversity for little fidelity: docs/diversity.md and docs/people.md
NEGTOME = {
    "mnist-flux": NegToMe(alpha=0.5, reference="others", timesteps=(900, 1000)),
    "mnist-sdxl": NegToMe(alpha=4.5, reference="others", timesteps=(800, 1000), blocks=("*",), min_grid=8),
    "people-flux": NegToMe(alpha=1.5, threshold=0.3, reference="others", timesteps=(800, 1000)),
    "people-sdxl": NegToMe(alpha=3.0, reference="others", timesteps=(800, 1000), blocks=("*",), min_grid=8),
}
