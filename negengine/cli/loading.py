"""The model that a command draws with: an embedded one, a folder, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from negengine.cli.quiet import quiet_libraries

SCHEDULER_HELP = "A sampler of diffusers by its class, as EulerAncestralDiscreteScheduler; the pipeline's own if left out."
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


def load(model: str, dtype: str, device: str, scheduler: str | None = None, others: Sequence[str] = ()) -> Any:
    """The pipeline of ``--model``, with the sampler of ``--scheduler``. Raises ValueError for what is neither.

    Args:
        others: what else the command takes as a model, by name.
    """
    pipe = _pipeline(model, dtype, device, others)
    if scheduler is not None:
        pipe.scheduler = _scheduler(scheduler, pipe.scheduler)
    return pipe


def _scheduler(name: str, own: Any) -> Any:
    """A sampler of diffusers, configured as a pipeline's own."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    try:
        kind = getattr(diffusers, name, None)
    except (ImportError, RuntimeError) as error:  # what diffusers loads lazily may want another package
        raise ValueError(f"--scheduler {name} cannot be used: {error}") from error
    if isinstance(kind, type) and issubclass(kind, SchedulerMixin):
        found = kind.from_config(own.config)  # type: ignore[attr-defined]
        if _flows(found) == _flows(own):
            return found
        fault = f"--scheduler {name} does not take the predictions of this model"
    else:
        fault = f"--scheduler {name} is no sampler of diffusers"
    raise ValueError(f"{fault}; there are {', '.join(sorted(fitting(own)))}")


def fitting(scheduler: Any) -> list[str]:
    """Classes that diffusers calls exchangeable with a pipeline's sampler, its own among them."""
    return [
        type(scheduler).__name__,
        *(kind.__name__ for kind in getattr(scheduler, "compatibles", ()) if kind is not type(scheduler)),
    ]


def _flows(scheduler: Any) -> bool:
    """Whether a sampler follows a flow: the others read such a model's predictions as noise, and draw noise."""
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def _pipeline(model: str, dtype: str, device: str, others: Sequence[str]) -> Any:
    from negengine import models

    quiet_libraries()
    if model in models.NAMES:
        return models.load(model, DTYPES[dtype], device)
    if not Path(model).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        known = f", nor {' or '.join(others)}" if others else ""
        raise ValueError(
            f"--model {model} is no folder, no hub id (owner/name) and no embedded model ({', '.join(models.NAMES)}){known}"
        )
    if Path(model).exists() and not (Path(model) / "model_index.json").exists():
        raise ValueError(f"--model {model} is no pipeline: it has no model_index.json")
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype])
    except OSError as error:
        if Path(model).exists():
            raise
        first: BaseException = error  # diffusers sends to a traceback, which one line has not
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__  # type: ignore[assignment]
        raise ValueError(
            f"--model {model} is no folder, and cannot be fetched from the hub under that name: {_first_line(first)}; check the "
            "name, the network, and whether the model wants a login (hf auth login)"
        ) from error
    return pipe.to(device)


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
