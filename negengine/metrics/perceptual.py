"""Judges that look at pictures themselves: LPIPS between two, VQAScore of one and its prompt."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from negengine.metrics.extractors.base import as_tensor
from negengine.metrics.libraries import need, weights

PAIRS = 16  # at once through the network: all pairs of a large group would not fit into memory
VQA_MODEL = "clip-flant5-xl"


@functools.cache
def lpips_network(net: str = "alex") -> Any:
    """The network of LPIPS (Zhang et al., arXiv 1801.03924). Raises ImportError or MissingWeights."""
    package = need("lpips", "lpips", "the metric lpips")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    with weights("LPIPS's AlexNet", f"run it once with network, or copy torchvision's alexnet-owt-7be5be79.pth to {folder}"):
        return package.LPIPS(net=net, verbose=False)


def lpips_on(device: str) -> None:
    """The network of LPIPS, on a device from now on. Raises as :func:`lpips_network`."""
    lpips_network().to(device)


def pairwise_lpips(images: Sequence[Image.Image], network: Any = None) -> Tensor:
    """Mean LPIPS over all pairs of a group, a float64 scalar.

    Args:
        images: two or more, of one size. network: takes two batches in [-1, 1] and returns a distance each; LPIPS's if None.

    Raises:
        ValueError: fewer than two images, or unequal sizes. ImportError, MissingWeights: without ``network``.
    """
    if len(images) < 2:
        raise ValueError(f"LPIPS between images needs two or more, got {len(images)}")
    network = network or lpips_network()
    device = next(network.parameters()).device if isinstance(network, nn.Module) else torch.device("cpu")
    batch = as_tensor(images) * 2 - 1
    pairs = torch.combinations(torch.arange(len(images)))
    with torch.no_grad():
        found = [network(batch[part[:, 0]].to(device), batch[part[:, 1]].to(device)) for part in pairs.split(PAIRS)]
    return torch.cat([part.flatten().double().cpu() for part in found]).mean()


@functools.cache
def vqa_judge(model: str = VQA_MODEL) -> Any:
    """The judge of VQAScore (Lin et al., arXiv 2404.01291). Raises ImportError or MissingWeights."""
    package = need("t2v_metrics", "t2v-metrics", "the metric vqa-score", extra=False)
    with weights(f"VQAScore's {model}", "run it once with network (it takes a GPU with 24 GB), or copy the cache of the hub"):
        return package.VQAScore(model=model)


def vqa_scores(images: Sequence[Image.Image], prompts: Sequence[str], judge: Any = None) -> Tensor:
    """Probability that a picture shows its prompt, as a model that answers questions sees it; float64 ``[N]``.

    Args:
        judge: as ``t2v_metrics.VQAScore`` is called: ``judge(images=[path], texts=[text])``.

    Raises:
        ValueError: not a prompt for each image. ImportError, MissingWeights: without ``judge``.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images; one for each is needed")
    judge = judge or vqa_judge()
    scores = []
    with tempfile.TemporaryDirectory() as folder:  # t2v_metrics reads files
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            path = Path(folder) / f"{number}.png"
            image.save(path)
            scores.append(judge(images=[str(path)], texts=[prompt]).double().cpu().reshape(()))
    return torch.stack(scores)
