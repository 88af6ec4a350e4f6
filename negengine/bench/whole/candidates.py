"""Which variants are measured, and the threshold at which about half of the tokens merge."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

import negengine
from negengine import ops
from negengine.bench.published import published_backend
from negengine.bench.variants import precision, usable
from negengine.bench.whole.setting import PUBLISHED, Setting, Variant
from negengine.bench.whole.subjects import Subject
from negengine.diffusers.families import find_denoiser
from negengine.kernels.call import Call
from negengine.methods import KINDS, Method
from negengine.ops import Backend, registry

SAMPLED = 1024  # cosines of each place and calibration


def variants(setting: Setting, subject: Subject, threshold: float | None, published: Backend) -> Iterator[Variant]:
    """In their order; the base is not among them.

    Args:
        threshold: of NegToMe; None: the family's own. published: the backend that runs the published algorithm.
    """
    family = find_denoiser(subject.pipe)[1]
    for name in setting.methods:
        if name != "negtome":
            yield from _other(name, subject)
            continue
        settings: Any = family.with_defaults(negengine.NegToMe(threshold=threshold, group_size=setting.images))
        for backend, search in _calls(setting, published.name):
            if not setting.searches and search != "auto":
                continue
            if setting.device == "cpu" and backend == "torch" and not setting.searches:
                continue  # the fallback where no compiler was at hand
            own = dataclasses.replace(settings, backend=backend, search=search)
            yield Variant(f"{backend} {search}", "ours", (own,), settings.timesteps)
        theirs = dataclasses.replace(settings, backend=published.name)
        yield Variant(PUBLISHED, "published", (theirs,), settings.timesteps)


def _calls(setting: Setting, published: str) -> list[tuple[str, str]]:
    """Our backends and their searches; of a GPU that is not there, to rehearse on, those of an H100."""
    names = [name for name in ops.backends() if name != published]
    if not setting.device.startswith("cuda") or torch.cuda.is_available():
        return usable(setting.device, setting.dtype, names)
    from negengine.kernels.triton.tuning import ARCHITECTURES

    searches = {precision("triton", setting.dtype, search): search for search in reversed(ARCHITECTURES["sm_90"].searches)}
    return [("triton", search) for search in reversed(searches.values())] + usable(setting.device, setting.dtype, ["torch"])


def planned(setting: Setting, subject: Subject) -> list[Variant]:
    """The variants of a pipeline that need not have weights, as :func:`variants` would give them in a run."""
    published = published_backend(setting.images, 0.9, 0.5)
    with registry.registered(published):
        return list(variants(setting, subject, None, published))


def _other(name: str, subject: Subject) -> Iterator[Variant]:
    kind: Any = KINDS[name]
    fields = {one.name for one in dataclasses.fields(kind)}
    flux = subject.architecture is not None and subject.architecture.halves == 1
    given: dict[str, Any] = {}
    for field_ in ("prompt", "negative_prompt"):
        if field_ in fields:
            given[field_] = subject.avoid()
    if name == "dng":
        given["surrogate"] = "ancestral"
    if name == "cads":
        given["unconditional"] = flux
    if name == "sld":
        settings: Method = kind.preset("dng" if flux else "medium", **given)
    elif name == "guidance-interval":
        settings = kind(low=0.3, high=5.0)
    else:
        settings = kind(**given)
    yield Variant(name, "ours", (settings,), getattr(settings, "timesteps", None))


@contextlib.contextmanager
def calibrated(setting: Setting, subject: Subject) -> Iterator[tuple[float | None, Backend]]:
    """A threshold at which about half of the tokens merge, as with real weights (None: a checkpoint's own does), and the backend
    of the published algorithm, which is there within the ``with``."""
    family = find_denoiser(subject.pipe)[1]
    usual: Any = family.with_defaults(negengine.NegToMe(group_size=setting.images))
    threshold = None
    if "negtome" in setting.methods and subject.architecture is not None:
        threshold = _median_cosine(usual, subject)
    gate = usual.threshold if threshold is None else threshold
    published = published_backend(setting.images, float(usual.alpha), float(gate))
    with registry.registered(published):
        yield threshold, published


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Backends that count nothing are no reason to warn that nothing was merged."""
    logger = logging.getLogger("negengine")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _median_cosine(settings: Any, subject: Subject) -> float:
    """Of the tokens with their matches, over all places that merge, in one step of a run without a method."""
    seen: list[torch.Tensor] = []

    def run(call: Call) -> None:
        for x, reference in zip(call.x, call.references[:, 0].tolist(), strict=True):
            if reference >= 0:
                cosine, _ = ops.match(x[None], call.bank[reference])
                every = max(1, cosine.numel() // SAMPLED)
                seen.append(cosine.flatten()[::every].float().cpu())

    probe = dataclasses.replace(registry._BACKENDS["torch"], name="calibration", run=run)
    with registry.registered(probe), uncounted():
        negengine.apply(subject.pipe, dataclasses.replace(settings, backend=probe.name, timesteps=(0, 1000)))
        subject.call(num_inference_steps=1)
        negengine.remove(subject.pipe)
    return float(torch.cat(seen).median())
