"""The Triton kernels without a GPU: their tests and the contract once more, under Triton's interpreter.

It has to be chosen before Triton is imported, so each run is a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from negengine.kernels.triton import rows

ROOT = Path(__file__).parents[2]
CONTRACT = "triton-cpu and (exact or (bfloat16-fp8 and not arithmetic) or (float32-int8 and (ordinary or test_match)))"
# of that, what guards every change
SOME = "triton-cpu and bfloat16-exact and (test_match or in_place)"
OPERATORS = (
    "triton-cpu and ((not opcheck and not bfloat16) or (opcheck and plain and float32-auto and not (True-True and in_place)))"
)
SOME_OPERATORS = "triton-cpu and not opcheck and bfloat16"
OPCHECKS = "triton-cpu and opcheck and plain and float32-auto and True-True and in_place"
OPERATOR_FILES = ["tests/ops/test_in_place.py", "tests/ops/test_torch_library.py"]
GUIDANCE_FILES = ["tests/ops/test_guidance.py", "tests/ops/test_guidance_calls.py"]
RUNS = {  # files, and which of their tests
    "kernels": (["tests/kernels/test_triton.py"], "test"),
    "codes": (["tests/kernels/test_triton_codes.py"], "test"),
    "some of the contract": (["tests/ops/test_contract.py"], SOME),
    "operators and guidance in bfloat16": ([*OPERATOR_FILES, *GUIDANCE_FILES], f"({SOME_OPERATORS}) or ({OPCHECKS})"),
    "operators": (OPERATOR_FILES, OPERATORS),
    "guidance": (GUIDANCE_FILES, "triton-cpu"),
    "determinism": (["tests/ops/test_determinism.py"], "triton-cpu and exact and (7-33-5 or batch)"),
}
# run, which of its tests, examples of each property
CONTRACTS = {"contract": (["tests/ops/test_contract.py"], CONTRACT)}
GUARDS = [("some of the contract", "not exhaustive", 2)]
RUN_WHOLE = (("kernels", "", 6), ("codes", "", 6), ("operators", "", 2), ("determinism", "", 2), ("contract", "", 4))
IN_BFLOAT16 = ("operators and guidance in bfloat16", "not exhaustive", 2)
EXHAUSTIVE = [pytest.param(*run, marks=pytest.mark.exhaustive) for run in (*RUN_WHOLE, ("guidance", "", 6), IN_BFLOAT16)]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
@pytest.mark.skipif(rows.INTERPRETED.value, reason="this is such a run")
@pytest.mark.parametrize("name, which, examples", [*GUARDS, *EXHAUSTIVE])
def test_under_the_interpreter(name, which, examples):
    files, chosen = (RUNS | CONTRACTS)[name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "NEGENGINE_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"}
    options = ["-p", "no:cacheprovider", "-W", "ignore", "--durations=10", "-m", which, "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
