"""What an import loads, and that every public name is found all the same."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import negengine

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = (
    "PIL", "accelerate", "diffusers", "flash_kmeans", "hypothesis", "jsonschema", "matplotlib", "mlxtend", "peft",
    "pytest_benchmark", "pynvml", "rich", "safetensors", "sklearn", "tokenizers", "tqdm", "transformers", "typer", "xformers",
)  # fmt: skip
LIGHT = (
    "negengine", "negengine.bench", "negengine.bench.calls", "negengine.bench.tiles", "negengine.bench.verdicts",
    "negengine.diffusers", "negengine.diffusers.apply", "negengine.environment",
    "negengine.kernels.cpu.library", "negengine.kernels.eager", "negengine.kernels.triton.launch", "negengine.methods",
    "negengine.models", "negengine.ops", "negengine.ops.prove", "negengine.reference",
)  # fmt: skip

LOADS = f"""
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(name + " is hidden", name=name)

sys.meta_path.insert(0, Blocker())
import torch, triton
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(json.dumps([name, sorted(set(sys.modules) - before)]))
"""


@pytest.fixture(scope="module")
def imports():
    """Module -> what importing it and those before it loads that torch and triton had not loaded, and an error if there was one.

    All other packages are hidden.
    """
    pytest.importorskip("triton")
    modules = ("negengine", "negengine.ops", *LIGHT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LOADS, *modules], env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(reversed(found)), done.stderr if done.returncode else None  # of a module that is named twice the first


def test_operators_and_kernels_need_torch_and_triton_alone(imports):
    loaded, error = imports
    assert error is None, error
    assert "negengine.ops.negtome" in loaded[LIGHT[-1]]


def test_operators_load_nothing_that_is_slow(imports):
    """No compiler of torch, no package beside it: 0.1 s, where the compiler alone takes 1.8 s."""
    found = {name for name in imports[0]["negengine.ops"] if name.partition(".")[0] not in sys.stdlib_module_names | {"negengine"}}
    assert not found


def test_the_package_alone_loads_itself_alone(imports):
    assert [name for name in imports[0]["negengine"] if name.startswith("negengine")] == ["negengine"]


@pytest.mark.parametrize("name", negengine.__all__)
def test_every_public_name_is_found(name):
    assert getattr(negengine, name) is not None
    assert name in dir(negengine)


def test_submodules_are_found_as_attributes():
    for name in negengine._MODULES:
        assert getattr(negengine, name) is importlib.import_module(f"negengine.{name}")


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module 'negengine' has no attribute 'aply'"):
        _ = negengine.aply
    with pytest.raises(ImportError, match="aply"):
        from negengine import aply  # noqa: F401


def test_type_checkers_see_every_public_name():
    """What is imported for them is what is resolved at run time."""
    tree = ast.parse(Path(negengine.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert {*seen, "__version__"} == set(negengine.__all__)
    assert {name: module for name, module in seen.items() if name != "ops"} == {
        name: f"negengine.{home}" for name, home in negengine._HOMES.items()
    }
