"""Code written for the release published with the NegToMe paper keeps working.

    from negengine.compat import negtome, FluxNegToMePipeline, StableDiffusionXLNegToMePipeline

The names, arguments and results are those of the release (its matching included, see ``docs/matching.md``); the work is
done by this engine. What differs is what the release got wrong: every prompt of a call has its own first image, the
number of text tokens is read from the call, classifier-free guidance may be off, no class is patched, and a reference
picture joins the batch instead of taking the place of its first image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from torch import Tensor

from negengine import ops, reference
from negengine.diffusers import apply, remove
from negengine.diffusers.apply import applied_to
from negengine.diffusers.effect import Effect
from negengine.methods import NegToMe, ReferenceImage
from negengine.ops.negtome import as_alpha, as_threshold

__all__ = ["FluxNegToMePipeline", "StableDiffusionXLNegToMePipeline", "negtome"]


def negtome(
    hidden_states: Tensor,
    alpha: float = 0.5,
    threshold: float = 0.7,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Push the tokens of every image of a batch away from those of its first image, as the release does.

    Args:
        hidden_states: ``[N, T, D]``; image 0 is the reference and comes back unchanged.
        alpha, threshold: see :class:`negengine.NegToMe`.
        dropout: probability of leaving a token out, drawn from torch's global generator as in the release.
        mask: which pairs may match: ``[N * T, T]`` (or ``[N, T, T]``), nonzero where source token ``i`` of image ``n`` may
            match reference token ``p``. ``[T]`` says the same for all of them, and is the fast way.

    Returns:
        A new tensor ``[N, T, D]``.

    Raises:
        ValueError: a mask of another shape, or a setting that cannot work.
    """
    if hidden_states.ndim != 3:
        raise ValueError(f"hidden_states must have shape [N, T, D], got {list(hidden_states.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    N, T, _ = hidden_states.shape
    device = hidden_states.device
    keep = reference.draw_keep(N, T, dropout, device=device) if dropout > 0 else None
    if mask is not None and list(mask.shape) != [T]:
        if mask.numel() != N * T * T:
            raise ValueError(f"mask must have shape [{T}], [{N * T}, {T}] or [{N}, {T}, {T}], got {list(mask.shape)}")
        as_alpha(alpha, hidden_states), as_threshold(threshold, hidden_states)  # raise for what cannot work
        return _negtome_pairs(hidden_states, alpha, threshold, keep, mask.reshape(N, T, T) != 0)
    columns = None if mask is None else (mask != 0).expand(N, T)
    references = reference.group_references("first", N, N).to(device)
    y = hidden_states.clone(memory_format=torch.contiguous_format)
    return ops.negtome_(y, references, alpha, threshold, hidden_states, columns, keep, matching="release")


def _negtome_pairs(x: Tensor, alpha: float, threshold: float, keep: Tensor | None, pairs: Tensor) -> Tensor:
    """The release with a mask of pairs, which no fused search knows; image by image."""
    images = []
    for n, image in enumerate(x):
        similarity = reference.cosine(image, x[0]).masked_fill(~pairs[n], -torch.inf)
        best, index = similarity.max(dim=0)
        gate = best > threshold
        images.append(reference.merge(image, x[0], index, alpha, gate if keep is None else gate & keep[n]))
    return torch.stack(images)


_SHARED_KEYS = {
    "use_negtome": False,
    "merging_alpha": 0.9,
    "merging_threshold": None,
    "merging_dropout": 0.0,
    "merging_t_start": 1000,
    "merging_t_end": None,
    "use_rag_assets": False,
    "rag_assets": None,
    "noise_rag": False,
}
_FLUX_KEYS = _SHARED_KEYS | {
    "merging_threshold": 0.65,
    "merging_t_end": 900,
    "num_joint_blocks": -1,
    "num_single_blocks": -1,
    "num_lang_tokens": 512,
}
_SDXL_KEYS = _SHARED_KEYS | {
    "merging_threshold": 0.7,
    "merging_t_end": 800,
    "blocks": ["up_blocks"],
    "min_attn_dim": 32,
}


def _arguments(known: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(given or {})
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown negtome_args {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {**known, **given}


def _settings(arguments: Mapping[str, Any], **place: Any) -> NegToMe:
    """The release's arguments as settings of this engine."""
    return NegToMe(
        alpha=arguments["merging_alpha"],
        threshold=arguments["merging_threshold"],
        timesteps=(arguments["merging_t_end"], arguments["merging_t_start"]),
        dropout=arguments["merging_dropout"],
        reference=_asset(arguments) if arguments["use_rag_assets"] else "first",
        matching="release",
        **place,
    )


def _asset(arguments: Mapping[str, Any]) -> ReferenceImage:
    assets = arguments["rag_assets"]
    if not assets:
        raise ValueError("use_rag_assets needs rag_assets=[(image, mask)]")
    if len(assets) > 1:
        raise ValueError(
            f"the release's matching takes one (image, mask) pair, got {len(assets)}; "
            "for several use negengine.apply with NegToMe(reference=[ReferenceImage(...), ...])"
        )
    image, mask = assets[0]
    return ReferenceImage(image, None if mask is None else mask.resize(image.size), noise=arguments["noise_rag"])


class _NegToMeCall:
    """The two arguments that the release added to a pipeline's call."""

    _negtome: tuple[NegToMe, Effect[NegToMe]] | None = None  # what the last call asked for, and what came of it

    def _translate(self, negtome_args: Mapping[str, Any] | None) -> NegToMe:
        raise TypeError("a pipeline of the release says how its arguments translate")

    def __call__(self, *args: Any, use_negtome: bool = False, negtome_args: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """The pipeline's call, with NegToMe if ``use_negtome``.

        Args:
            use_negtome: whether to merge in this call; the key of that name in ``negtome_args`` says the same.
            negtome_args: the release's settings; an unknown key raises ValueError.
            args, kwargs: of the diffusers pipeline.
        """
        settings = self._translate(negtome_args)  # also when unused: a wrong key is an error at once
        use_negtome = use_negtome or bool((negtome_args or {}).get("use_negtome"))
        applied = applied_to(self, NegToMe)
        ours = self._negtome is not None and self._negtome[1] is applied
        if use_negtome and not (ours and self._negtome[0] == settings):  # type: ignore[index]
            apply(self, settings)
            self._negtome = settings, applied_to(self, NegToMe)  # type: ignore[assignment]
        elif not use_negtome and ours:
            remove(self, NegToMe)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class FluxNegToMePipeline(_NegToMeCall, FluxPipeline):
    """``FluxPipeline`` whose call takes ``use_negtome`` and ``negtome_args``.

    Keys: merging_alpha, merging_threshold, merging_dropout, merging_t_start, merging_t_end, num_joint_blocks,
    num_single_blocks (-1: all), num_lang_tokens (read from the call instead), use_rag_assets, rag_assets, noise_rag.
    """

    def _translate(self, negtome_args: Mapping[str, Any] | None) -> NegToMe:
        arguments = _arguments(_FLUX_KEYS, negtome_args)
        blocks: list[str] = []
        for part, key in (("transformer_blocks", "num_joint_blocks"), ("single_transformer_blocks", "num_single_blocks")):
            count, there = arguments[key], len(getattr(self.transformer, part))
            blocks += [part] if count < 0 else [f"{part}.{i}" for i in range(min(count, there))]
        if not blocks:
            raise ValueError("num_joint_blocks and num_single_blocks leave no block; -1 takes all of a kind")
        return _settings(arguments, blocks=blocks)


class StableDiffusionXLNegToMePipeline(_NegToMeCall, StableDiffusionXLPipeline):
    """``StableDiffusionXLPipeline`` whose call takes ``use_negtome`` and ``negtome_args``.

    Keys: merging_alpha, merging_threshold, merging_dropout, merging_t_start, merging_t_end, blocks, min_attn_dim,
    use_rag_assets, rag_assets, noise_rag.
    """

    def _translate(self, negtome_args: Mapping[str, Any] | None) -> NegToMe:
        arguments = _arguments(_SDXL_KEYS, negtome_args)
        return _settings(arguments, blocks=arguments["blocks"], min_grid=max(1, arguments["min_attn_dim"]))
