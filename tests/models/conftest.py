"""The embedded models, loaded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from negengine import models
from negengine.models.classifier import Classifier


@pytest.fixture(scope="session", params=models.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def pipeline(name: str) -> DiffusionPipeline:
    return models.load(name)


@pytest.fixture(scope="session")
def judge() -> Classifier:
    return models.load_classifier()


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of every checkpoint, which the test may damage."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(models.CHECKPOINTS, folder)
    monkeypatch.setattr(models, "CHECKPOINTS", folder)
    return folder
