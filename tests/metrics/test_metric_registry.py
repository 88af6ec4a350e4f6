"""The registry: each metric computes what its name says, from what it says it needs."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from negengine import metrics
from negengine.metrics import METRICS, Evidence, perceptual
from negengine.metrics.evidence import WORDS

IMAGES = [Image.new("RGB", (4, 4), (17 * k % 256, 91 * k % 256, 5 * k)) for k in range(8)]
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]


def random(n, f, seed):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


FULL = Evidence(
    images=IMAGES,
    groups=GROUPS,
    features=random(8, 5, 0),
    logits=random(8, 3, 1),
    labels=torch.tensor([0, 0, 1, 2, 2, 2, 2, 2]),
    classes=("a", "b", "c"),
    prompts=["x"] * 8,
    texts=random(8, 5, 2),
    expected=torch.tensor([0, 1, 1, 2, 0, 0, 2, 2]),
    reference=random(9, 5, 3),
    asset=random(1, 5, 4),
    asset_image=IMAGES[2],
    forbidden=2,
    base_labels=torch.tensor([0, 1, 1]),
)
EXPECTED = {
    "distance": [metrics.pairwise_distance(FULL.features[rows]) for rows in GROUPS],
    "vendi": [metrics.vendi_score(FULL.features[rows]) for rows in GROUPS],
    "label-entropy": [1.5, 0],
    "distinct": [3, 1],
    "entropy": [metrics.label_entropy(FULL.labels)],
    "as-prompted": [1, 0, 1, 1, 0, 0, 1, 1],
    "prompt-probability": [FULL.logits.double().softmax(-1)[row, c] for row, c in enumerate(FULL.expected)],
    "clip-score": torch.nn.functional.cosine_similarity(FULL.features.double(), FULL.texts.double()).clamp_min(0),
    "asset-similarity": metrics.feature_similarity(FULL.features, FULL.asset),
    "forbidden": [0, 0, 0, 1, 1, 1, 1, 1],
    "kl": [metrics.label_divergence(FULL.labels, FULL.base_labels, 3, without=2)],
    "reference-distance": [(FULL.reference - row).norm(dim=1).double().sort().values[:3].mean() for row in FULL.features],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_metrics_of_our_own(name):
    found = METRICS[name].compute(FULL)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([float(value) for value in EXPECTED[name]], abs=1e-6)


def test_an_image_correlates_with_itself():
    noise = [Image.effect_noise((8, 8), 90 + k).convert("RGB") for k in range(2)]
    evidence = dataclasses.replace(FULL, images=noise, asset_image=noise[1].resize((16, 16), 0))
    assert METRICS["asset-correlation"].compute(evidence).tolist()[1] > 0.8
    assert METRICS["asset-correlation"].compute(dataclasses.replace(evidence, asset_image=noise[1])).tolist()[1] == pytest.approx(1)


def test_metrics_that_libraries_compute_ask_them(monkeypatch):
    monkeypatch.setattr(perceptual, "lpips_network", lambda: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    found = METRICS["lpips"].compute(FULL)
    assert found.tolist() == pytest.approx([float(metrics.pairwise_lpips([IMAGES[k] for k in rows])) for rows in GROUPS])
    asked = []
    monkeypatch.setattr(
        perceptual, "vqa_judge", lambda: lambda images, texts: torch.tensor(float(asked.append(texts) or len(asked)))
    )
    assert METRICS["vqa-score"].compute(FULL).tolist() == list(range(1, 9))


def test_sets_by_torchmetrics():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install 'negengine[evaluate]'")
    expected = {
        "fid": metrics.frechet_distance(FULL.features, FULL.reference),
        "kid": metrics.kernel_distance(FULL.features, FULL.reference),
        "inception-score": metrics.inception_score(FULL.logits),
    }
    for name, value in expected.items():
        assert METRICS[name].compute(FULL).tolist() == pytest.approx([value.item()])


def test_sets_by_torch_fidelity():
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed: pip install 'negengine[evaluate]'")
    near = metrics.precision_recall(FULL.features, FULL.reference)
    assert [METRICS[name].compute(FULL).item() for name in ("precision", "recall")] == [value.item() for value in near]


def test_precision_and_recall_are_those_of_torch_fidelity_from_the_images_and_the_reference(monkeypatch):
    """A stand-in for torch-fidelity, which takes the images first: it tells what it was given."""
    given = []

    def prc_features_to_metric(images, reference, prc_neighborhood, **more):
        given.append((images.float(), reference.float(), prc_neighborhood))
        return {"precision": 0.75, "recall": 0.25, "f_score": 0.375}

    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.metric_prc")
    module.prc_features_to_metric = prc_features_to_metric
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_prc", module)
    assert METRICS["precision"].compute(FULL).tolist() == [0.75]
    assert METRICS["recall"].compute(FULL).tolist() == [0.25]
    assert all(torch.equal(images, FULL.features) and torch.equal(reference, FULL.reference) for images, reference, _ in given)
    assert {neighbours for *_, neighbours in given} == {3}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_what_a_metric_needs_has_words_and_can_be_missed(metric):
    assert set(metric.needs) <= WORDS.keys() == {field.name for field in dataclasses.fields(Evidence)} - {"images", "groups"}
    bare = Evidence(images=IMAGES, groups=GROUPS)
    assert bare.missing(metric.needs) == [WORDS[need] for need in metric.needs]
    assert not FULL.missing(metric.needs)


def test_every_metric_is_on_the_page():
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)`", page, re.MULTILINE)) >= METRICS.keys()


def test_a_metric_that_does_not_exist_is_one_clear_error():
    with pytest.raises(ValueError, match="there is no metric 'fidd'; there are distance, vendi, lpips"):
        metrics.metric_named("fidd")
