"""Maps the top-level folder ``kernels/`` to the package ``negengine.kernels`` and compiles the native CPU kernels.

The folder is not a package of its own name: diffusers imports another library called ``kernels``. Without a C++ compiler the
installation succeeds all the same; ``negengine doctor`` then says what is missing. All else is in pyproject.toml.
"""

import importlib.util
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
kernels = ["negengine.kernels", *(f"negengine.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]

spec = importlib.util.spec_from_file_location("build_native", ROOT / "kernels/cpu/build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        folder = ROOT / "kernels/cpu" if self.editable_mode else Path(self.build_lib, "negengine/kernels/cpu")
        reason = native.build(folder)
        if reason is not None:
            self.warn(f"negengine is installed without its native CPU kernels and will run on PyTorch alone: {reason}")

    def find_package_modules(self, package, package_dir):
        """Without negengine/kernels.py, which finds the kernels of a checkout."""
        return [module for module in super().find_package_modules(package, package_dir) if module[:2] != ("negengine", "kernels")]


class PlatformWheel(bdist_wheel):
    """The library is of one platform, but of no Python version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    packages=find_packages(str(ROOT), include=["negengine", "negengine.*"]) + kernels,
    package_dir={"negengine.kernels": "kernels"},
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
)
