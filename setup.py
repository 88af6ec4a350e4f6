"""Maps the top-level folder ``kernels/`` to the package ``negengine.kernels``; all else is in pyproject.toml.

The folder is not a package of its own name: diffusers imports another library called ``kernels``.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
kernels = ["negengine.kernels", *(f"negengine.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]

setup(
    packages=find_packages(str(ROOT), include=["negengine", "negengine.*"]) + kernels,
    package_dir={"negengine.kernels": "kernels"},
)
