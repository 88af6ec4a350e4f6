"""Diversity, similarity and fidelity of images, as pure functions of features, logits, labels or images.

:data:`METRICS` holds every metric by its name, with what it needs and which library computes it; ``negengine evaluate`` uses it.
"""

from negengine.metrics.diversity import pairwise_distance, vendi_score
from negengine.metrics.evidence import Evidence
from negengine.metrics.intervals import Interval, difference_interval, mean_interval
from negengine.metrics.libraries import MissingWeights
from negengine.metrics.perceptual import pairwise_lpips, vqa_scores
from negengine.metrics.quality import class_entropy, fidelity
from negengine.metrics.registry import METRICS, Metric, metric_named
from negengine.metrics.sets import frechet_distance, inception_score, kernel_distance, precision_recall
from negengine.metrics.shares import distinct_labels, label_divergence, label_entropy, label_shares
from negengine.metrics.similarity import feature_similarity, nearest_distance, pixel_correlation

__all__ = [
    "METRICS",
    "Evidence",
    "Interval",
    "Metric",
    "MissingWeights",
    "class_entropy",
    "difference_interval",
    "distinct_labels",
    "feature_similarity",
    "fidelity",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "label_divergence",
    "label_entropy",
    "label_shares",
    "mean_interval",
    "metric_named",
    "nearest_distance",
    "pairwise_distance",
    "pairwise_lpips",
    "pixel_correlation",
    "precision_recall",
    "vendi_score",
    "vqa_scores",
]
