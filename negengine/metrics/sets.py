"""Distances between sets of images: torchmetrics and torch-fidelity compute, from features that are given."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from negengine.metrics.checks import check_rows
from negengine.metrics.libraries import need

NEIGHBOURS = 3  # of precision and recall, as in Kynkäänniemi et al., arXiv 1904.06991
KID_SUBSET, KID_SUBSETS = 1000, 100


class _Given(nn.Module):
    """Features in place of images, as a metric of torchmetrics takes a network of one's own."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Fréchet distance of two sets (FID, if the features are Inception's), by torchmetrics, in float64.

    Args:
        features: ``[N, F]``. reference: ``[M, F]``; two rows or more each.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf. ImportError: torchmetrics is not installed.
    """
    _check(features, reference, at_least=2)
    kind = need("torchmetrics.image.fid", "torchmetrics", "computing FID").FrechetInceptionDistance
    with _quiet():
        return _both(kind(feature=_Given(features.shape[1])), features, reference).compute()


def kernel_distance(features: Tensor, reference: Tensor, seed: int = 0) -> Tensor:
    """Kernel distance of two sets (KID), by torchmetrics: the mean over 100 subsets of at most 1,000 rows.

    Args and errors: as :func:`frechet_distance`. seed: of the choice of subsets.
    """
    _check(features, reference, at_least=2)
    kind = need("torchmetrics.image.kid", "torchmetrics", "computing KID").KernelInceptionDistance
    size = min(len(features), len(reference), KID_SUBSET)
    subsets = 1 if len(features) == len(reference) == size else KID_SUBSETS
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _both(kind(feature=_Given(features.shape[1]), subsets=subsets, subset_size=size), features, reference).compute()[0]


def inception_score(logits: Tensor, splits: int = 1) -> Tensor:
    """Inception score of one set, by torchmetrics: the exponential of the mutual information of image and class.

    Args:
        logits: ``[N, classes]``. splits: parts whose scores are averaged; the score of few images in many parts is low.

    Raises:
        ValueError: another shape, NaN or Inf, fewer rows than parts. ImportError: torchmetrics is not installed.
    """
    check_rows("logits", logits, at_least=splits)
    kind = need("torchmetrics.image.inception", "torchmetrics", "the inception score").InceptionScore
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        score = kind(feature=_Given(logits.shape[1]), splits=splits)
        score.update(logits.double())
        return score.compute()[0]


def precision_recall(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Share of images near the reference set, and of the reference set near the images, by torch-fidelity.

    Near: within the distance to the third neighbour in its own set (arXiv 1904.06991).

    Args:
        features: ``[N, F]``. reference: ``[M, F]``; four rows or more each.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf. ImportError: torch-fidelity is not installed.
    """
    _check(features, reference, at_least=NEIGHBOURS + 1)
    metric = need("torch_fidelity.metric_prc", "torch-fidelity", "computing precision and recall")
    # the images come first, as since torch-fidelity 0.4.0; before, the reference did
    # in float64, because torch.cdist by matrix products leaves a row at some distance from itself
    found = metric.prc_features_to_metric(
        features.double(), reference.double(), prc_neighborhood=NEIGHBOURS, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
    )
    return tuple(torch.tensor(found[name], dtype=torch.float64) for name in ("precision", "recall"))  # type: ignore[return-value]


def _check(features: Tensor, reference: Tensor, at_least: int) -> None:
    check_rows("features", features, at_least)
    check_rows("reference", reference, at_least)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features have {features.shape[1]} columns and those of the reference {reference.shape[1]}")


def _both(metric: Any, features: Tensor, reference: Tensor) -> Any:
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return metric


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchmetrics' warnings that it keeps the features, which are here already, and of a spread that is not asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        warnings.filterwarnings("ignore", message=".*degrees of freedom is <= 0.*")  # of one part's spread, which nobody asks for
        yield
