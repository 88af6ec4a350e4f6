"""In a checkout the kernels lie beside this package; in an installation the package ``negengine/kernels`` stands before this file."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "kernels")]
