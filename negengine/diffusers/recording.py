"""Recording an asset as a reference bank."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from negengine.diffusers.apply import alone
from negengine.diffusers.effects.recording import RecordingEffect
from negengine.diffusers.families import Family, find_denoiser
from negengine.methods import NegToMe, ReferenceBank

_OURS = ("num_images_per_prompt", "output_type", "latents", "prompt_embeds", "callback_on_step_end")


def record_bank(pipe: Any, settings: NegToMe, path: str | os.PathLike[str], *, prompt: str, **call: Any) -> ReferenceBank:
    """Record what the tokens of given pictures are in every block and active step, so that runs need not compute them again.

    The denoiser runs through the steps of ``settings.timesteps`` once, with the pictures in the place of an image. Methods that
    are applied to the pipeline do not act meanwhile, and compiled code is not used.

    Args:
        pipe: as for :func:`negengine.apply`.
        settings: NegToMe with ``reference`` one or several ``ReferenceImage``. ``blocks``, ``min_grid``, ``timesteps`` and
            ``matching`` say what is recorded; ``seed`` is that of the pictures' noise.
        path: of the file, which appears when it is whole, in the place of one that is there.
        prompt: under which the pictures are drawn. Best that of the runs to come.
        call: further arguments of the pipeline's call, which the runs to come must share as far as they fix the size, the schedule
            and whether there is guidance: ``height``, ``width``, ``num_inference_steps``, ``guidance_scale``, ``negative_prompt``.
            Guidance that a call ends early (``cfg_trunc_ratio``) is recorded to the last step, which serves such runs, too.

    Returns:
        The bank, to be given to ``NegToMe(reference=...)``.

    Raises:
        TypeError, ValueError: what cannot be recorded, said before anything is drawn. FileNotFoundError: no such folder.
    """
    path = _check(pipe, settings, path, prompt, call)
    truncates = find_denoiser(pipe)[1].conditioning.truncates
    if truncates in call:
        call = {**call, truncates: 1.0}

    def make(family: Family, denoiser: nn.Module) -> RecordingEffect:
        return RecordingEffect(settings, family, denoiser, path)

    with alone(pipe, make) as effect, torch.compiler.set_stance("force_eager"):
        try:
            pipe(prompt=prompt, num_images_per_prompt=len(settings.pictures), output_type="latent", **call)
            effect.write(prompt, call.get("negative_prompt"))
        finally:
            effect.abandon()
    return ReferenceBank(path)


def _check(pipe: Any, settings: NegToMe, path: str | os.PathLike[str], prompt: str, call: dict[str, Any]) -> Path:
    if not isinstance(settings, NegToMe):
        raise TypeError(f"settings must be NegToMe(reference=ReferenceImage(...)), got {settings!r}")
    if not settings.pictures:
        raise ValueError(f"a bank is recorded from pictures: NegToMe(reference=ReferenceImage(...)), got {settings.reference!r}")
    if isinstance(pipe, nn.Module) or getattr(pipe, "vae", None) is None:
        raise ValueError("pictures are encoded by a pipeline's VAE; give the pipeline, with its VAE")
    if not isinstance(prompt, str):
        raise TypeError(f"a bank is recorded under one prompt, got {prompt!r}")
    if not isinstance(call.get("negative_prompt"), str | None):
        raise TypeError(f"a bank is recorded under one negative prompt, got {call['negative_prompt']!r}")
    for name in _OURS:
        if name in call:
            raise ValueError(f"{name} is not for a recording; leave it out")
    known = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in call if name not in known]:
        raise TypeError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    if call.get("skip_guidance_layers") is not None:
        raise ValueError(
            "with skip_guidance_layers the pipeline calls the denoiser once more in a step, without these layers, and a bank does "
            "not hold what the tokens are in that call; leave it out of the recording"
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the bank; make it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of a file")
    return path
