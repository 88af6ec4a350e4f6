"""``negengine evaluate``: the quality laboratory, on folders of images or on a running pipeline."""

from negengine.cli.evaluate.command import evaluate

__all__ = ["evaluate"]
