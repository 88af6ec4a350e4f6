"""Diversity, similarity and fidelity of images, as pure functions of features and logits."""

from negengine.metrics.diversity import pairwise_distance, vendi_score
from negengine.metrics.quality import class_entropy, fidelity
from negengine.metrics.similarity import feature_similarity, pixel_correlation

__all__ = ["class_entropy", "feature_similarity", "fidelity", "pairwise_distance", "pixel_correlation", "vendi_score"]
