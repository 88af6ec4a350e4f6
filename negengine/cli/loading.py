"""The model that a command draws with: an embedded one, a folder, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_dtype(name: str) -> None:
    """Raises ValueError for a ``--dtype`` that is none."""
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")


def check_device(name: str) -> None:
    """Raises ValueError for a ``--device`` that torch cannot use here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ValueError(f"--device {name} cannot be used: {error}") from error


def preset(model: str, prompts: int) -> dict[str, Any]:
    """An embedded model is drawn as it is meant to be; other models have their pipeline's defaults."""
    from negengine import models

    return models.preset(model).call_kwargs(prompts) if model in models.NAMES else {}


def load(model: str, dtype: str, device: str) -> Any:
    """The pipeline of ``--model``. Raises ValueError for what is no model."""
    from negengine import models

    if model in models.NAMES:
        return models.load(model, DTYPES[dtype], device)
    if not Path(model).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"--model {model} is no folder, no hub id (owner/name) and no embedded model ({', '.join(models.NAMES)})")
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype]).to(device)
