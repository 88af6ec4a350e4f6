"""Every metric by its name: what it says, what it needs, and who computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from negengine.metrics import perceptual, sets
from negengine.metrics.diversity import pairwise_distance, vendi_score
from negengine.metrics.evidence import Evidence
from negengine.metrics.extractors.base import as_tensor
from negengine.metrics.libraries import need
from negengine.metrics.shares import distinct_labels, label_divergence, label_entropy
from negengine.metrics.similarity import NEAREST, feature_similarity, nearest_distance, pixel_correlation

GROUP, IMAGE, SET = "group", "image", "set"
HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number about images.

    Attributes:
        name: on the command line. title: in a table. about: what it says, in a line.
        compute: evidence -> float64 ``[units]``: a value for each group, for each image, or one for the set.
        unit: ``"group"``, ``"image"`` or ``"set"``.
        needs: fields of :class:`Evidence` that must be there.
        better: ``"higher"``, ``"lower"``, or None where neither is.
        library: the package that computes it besides the extractor; None: negengine.
        extractor: the usual one of the papers; None if it needs none.
        prepare: loads what it needs besides an extractor onto a device, so that what is missing is an error before any drawing.
        at_least: images that it needs, in a group or in the set. of_reference: reference images that it needs.
        percent: whether it is a share.
        least, most: values that are possible; None: no bound. most may depend on the number of images in a group.
    """

    name: str
    title: str
    about: str
    compute: Callable[[Evidence], Tensor]
    unit: str
    needs: tuple[str, ...]
    better: str | None
    library: str | None = None
    extractor: str | None = None
    prepare: Callable[[str], object] | None = None
    at_least: int = 1
    of_reference: int = 0
    percent: bool = False
    least: float | None = None
    most: float | Callable[[int], float] | None = None

    def possible(self, images: int) -> tuple[float | None, float | None]:
        """The least and the greatest value for groups of so many images."""
        return self.least, self.most(images) if callable(self.most) else self.most


def _grouped(function: Callable[[Evidence, list[int]], Tensor]) -> Callable[[Evidence], Tensor]:
    """A value for each group, from a function of its rows."""
    return lambda evidence: torch.stack([function(evidence, list(rows)).double() for rows in evidence.groups])


def _one(function: Callable[[Evidence], Tensor]) -> Callable[[Evidence], Tensor]:
    """The value of the set."""
    return lambda evidence: function(evidence).double().reshape(1)


def _as_prompted(evidence: Evidence) -> Tensor:
    return (_there(evidence.labels) == _there(evidence.expected)).double()


def _probability(evidence: Evidence) -> Tensor:
    chances = _there(evidence.logits).double().softmax(-1)
    return chances.gather(1, _there(evidence.expected)[:, None])[:, 0]


def _clip_score(evidence: Evidence) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(_there(evidence.features).double(), _there(evidence.texts).double())
    return cosine.clamp_min(0)


def _correlation(evidence: Evidence) -> Tensor:
    assert evidence.asset_image is not None
    size = evidence.images[0].size
    return pixel_correlation(as_tensor(evidence.images), as_tensor([evidence.asset_image.convert("RGB").resize(size)]))


def _divergence(evidence: Evidence) -> Tensor:
    assert evidence.classes is not None
    return label_divergence(
        _there(evidence.labels), _there(evidence.base_labels), len(evidence.classes), without=evidence.forbidden
    )


def _there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _sets(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Evidence], Tensor]:
    return _one(lambda evidence: function(_there(evidence.features), _there(evidence.reference)))


def _package(module: str, package: str, name: str) -> Callable[[str], object]:
    return lambda device: need(module, package, f"the metric {name}")


_ALL = (
    Metric(
        name="distance",
        title="pairwise distance",
        about="mean cosine distance of features within a group; with dreamsim: 1 minus the paper's DreamSim score",
        compute=_grouped(lambda e, rows: pairwise_distance(_there(e.features)[rows])),
        unit=GROUP,
        needs=("features",),
        better=HIGHER,
        extractor="dreamsim",
        at_least=2,
        least=0,
        most=2,
    ),
    Metric(
        name="vendi",
        title="Vendi score",
        about="how many different images a group holds in effect, from 1 to its size",
        compute=_grouped(lambda e, rows: vendi_score(_there(e.features)[rows])),
        unit=GROUP,
        needs=("features",),
        better=HIGHER,
        extractor="dreamsim",
        at_least=2,
        least=1,
        most=float,
    ),
    Metric(
        name="lpips",
        title="pairwise LPIPS",
        about="mean perceptual distance within a group: layout and texture more than content",
        compute=_grouped(lambda e, rows: perceptual.pairwise_lpips([e.images[row] for row in rows])),
        unit=GROUP,
        needs=(),
        better=HIGHER,
        library="lpips",
        prepare=perceptual.lpips_on,
        at_least=2,
        least=0,
    ),
    Metric(
        name="label-entropy",
        title="entropy within a group",
        about="in bits, of the labels within a group",
        compute=_grouped(lambda e, rows: label_entropy(_there(e.labels)[rows])),
        unit=GROUP,
        needs=("labels",),
        better=HIGHER,
        extractor="clip",
        at_least=2,
        least=0,
        most=math.log2,
    ),
    Metric(
        name="distinct",
        title="distinct labels in a group",
        about="how many different labels a group has",
        compute=_grouped(lambda e, rows: distinct_labels(_there(e.labels)[rows])),
        unit=GROUP,
        needs=("labels",),
        better=HIGHER,
        extractor="clip",
        at_least=2,
        least=1,
        most=float,
    ),
    Metric(
        name="entropy",
        title="entropy of all labels",
        about="in bits, of the labels of all images together",
        compute=_one(lambda e: label_entropy(_there(e.labels))),
        unit=SET,
        needs=("labels",),
        better=HIGHER,
        extractor="clip",
        least=0,
    ),
    Metric(
        name="as-prompted",
        title="read as prompted",
        about="share of images in which the class is read that the prompt names",
        compute=_as_prompted,
        unit=IMAGE,
        needs=("labels", "expected"),
        better=HIGHER,
        extractor="clip",
        percent=True,
        least=0,
        most=1,
    ),
    Metric(
        name="prompt-probability",
        title="probability of the prompt",
        about="that the reader gives the class that the prompt names",
        compute=_probability,
        unit=IMAGE,
        needs=("logits", "expected"),
        better=HIGHER,
        extractor="clip",
        least=0,
        most=1,
    ),
    Metric(
        name="clip-score",
        title="CLIPScore",
        about="cosine of image and prompt in CLIP's space, not below 0 (some multiply it by 100)",
        compute=_clip_score,
        unit=IMAGE,
        needs=("features", "texts"),
        better=HIGHER,
        extractor="clip",
        least=0,
        most=1,
    ),
    Metric(
        name="vqa-score",
        title="VQAScore",
        about="probability of 'yes' to 'does this figure show the prompt?'",
        compute=lambda e: perceptual.vqa_scores(e.images, e.prompts or ()),
        unit=IMAGE,
        needs=("prompts",),
        better=HIGHER,
        library="t2v-metrics",
        prepare=lambda device: perceptual.vqa_judge(),
        least=0,
        most=1,
    ),
    Metric(
        name="asset-similarity",
        title="similarity to the asset",
        about="cosine of features of each image and of the asset",
        compute=lambda e: feature_similarity(_there(e.features), _there(e.asset)),
        unit=IMAGE,
        needs=("features", "asset"),
        better=LOWER,
        extractor="dreamsim",
        least=-1,
        most=1,
    ),
    Metric(
        name="asset-correlation",
        title="pixel correlation with the asset",
        about="Pearson correlation of the pixels of each image and of the asset, resized to it",
        compute=_correlation,
        unit=IMAGE,
        needs=("asset_image",),
        better=LOWER,
        least=-1,
        most=1,
    ),
    Metric(
        name="forbidden",
        title="forbidden class",
        about="share of images in which the class is read that is to be absent",
        compute=lambda e: torch.eq(_there(e.labels), e.forbidden if e.forbidden is not None else -1).double(),
        unit=IMAGE,
        needs=("labels", "forbidden"),
        better=LOWER,
        extractor="clip",
        percent=True,
        least=0,
        most=1,
    ),
    Metric(
        name="kl",
        title="KL of the other classes",
        about="in bits, of the classes that are allowed, from their distribution without any method and with the other seeds",
        compute=_one(_divergence),
        unit=SET,
        needs=("labels", "classes", "base_labels", "forbidden"),
        better=LOWER,
        extractor="clip",
        least=0,
    ),
    Metric(
        name="reference-distance",
        title="distance to real images",
        about="mean distance of an image's features to its three nearest reference images",
        compute=lambda e: nearest_distance(_there(e.features), _there(e.reference)),
        unit=IMAGE,
        needs=("features", "reference"),
        better=LOWER,
        extractor="dinov2",
        least=0,
        of_reference=NEAREST,
    ),
    Metric(
        name="fid",
        title="FID",
        about="Fréchet distance to the reference images; biased upwards for few images",
        compute=_sets(sets.frechet_distance),
        unit=SET,
        needs=("features", "reference"),
        better=LOWER,
        library="torchmetrics",
        extractor="inception",
        prepare=_package("torchmetrics.image.fid", "torchmetrics", "fid"),
        at_least=2,
        least=0,
        of_reference=2,
    ),
    Metric(
        name="kid",
        title="KID",
        about="kernel distance to the reference images; unbiased",
        compute=_sets(sets.kernel_distance),
        unit=SET,
        needs=("features", "reference"),
        better=LOWER,
        library="torchmetrics",
        extractor="inception",
        prepare=_package("torchmetrics.image.fid", "torchmetrics", "kid"),
        at_least=2,
        of_reference=2,
    ),
    Metric(
        name="precision",
        title="precision",
        about="share of images near the reference images",
        compute=_sets(lambda features, reference: sets.precision_recall(features, reference)[0]),
        unit=SET,
        needs=("features", "reference"),
        better=HIGHER,
        library="torch-fidelity",
        extractor="inception",
        prepare=_package("torch_fidelity.metric_prc", "torch-fidelity", "precision"),
        at_least=sets.NEIGHBOURS + 1,
        of_reference=sets.NEIGHBOURS + 1,
        percent=True,
        least=0,
        most=1,
    ),
    Metric(
        name="recall",
        title="recall",
        about="share of the reference images near the images",
        compute=_sets(lambda features, reference: sets.precision_recall(features, reference)[1]),
        unit=SET,
        needs=("features", "reference"),
        better=HIGHER,
        library="torch-fidelity",
        extractor="inception",
        prepare=_package("torch_fidelity.metric_prc", "torch-fidelity", "recall"),
        at_least=sets.NEIGHBOURS + 1,
        of_reference=sets.NEIGHBOURS + 1,
        percent=True,
        least=0,
        most=1,
    ),
    Metric(
        name="inception-score",
        title="inception score",
        about="how sure each image's class is, and how different the classes of all images are",
        compute=_one(lambda e: sets.inception_score(_there(e.logits))),
        unit=SET,
        needs=("logits",),
        better=HIGHER,
        library="torchmetrics",
        extractor="inception",
        prepare=_package("torchmetrics.image.fid", "torchmetrics", "inception-score"),
        at_least=2,
        least=1,
    ),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}


def metric_named(name: str) -> Metric:
    """Raises ValueError for a name that does not exist, with those that do."""
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]
