# make demo and make test work on a machine that has Python, a C++ compiler and a package registry.
PYTHON ?= python3
VENV   ?= .venv
PY     ?= $(VENV)/bin/python
OUT    ?= out
STAMP  := $(VENV)/.installed
# the tested versions need Python 3.11
TESTED := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))')

PARTS := fast models cases compiled tiles contract suite

.DEFAULT_GOAL := help
.PHONY: help install demo evidence test test-all test-rest test-versions gates predict bench bench-check gpu $(PARTS:%=gpu-%) fuzz lint train clean
SECONDS_EACH ?= 600
EXAMPLES ?= 12
DIFFUSERS ?= 0.37.0 0.42.1

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(if $(filter $(VENV)/bin/python,$(PY)),$(STAMP)) ## the virtual environment with everything in it

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.* kernels/cpu/include/* kernels/cpu/src/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install --quiet $(TESTED) -e '.[dev]'
	@touch $@

demo: install ## the same seeds without and with NegToMe, and away from a picture: picture, tables, JSON
	$(PY) -m negengine.cli demo --output $(OUT)/demo

evidence: install ## what each method does to the models that draw people: docs/evidence.md, its plots and gallery, 50 minutes on two cores
	$(PY) bench/evidence.py

# a process per core, each with one thread; a process takes about 1 GB
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(TESTS)

test: install ## the tests that guard every change; TESTS='-k flux' for some of them
	NEGENGINE_EXAMPLES=$(EXAMPLES) $(PYTEST) -m 'not exhaustive'

test-all: install ## every test
	$(PYTEST)

test-rest: install ## what `make test` leaves out: exhaustive cases, and the contract with all its examples
	$(PYTEST) -m 'exhaustive or examples'

test-versions: install ## the plug-in's tests on other versions of diffusers; DIFFUSERS='0.37.0 0.42.1'
	$(PY) tests/versions.py --diffusers $(DIFFUSERS)

gates: install ## compile every variant of the Triton kernels for every GPU of interest, and write docs/kernels-triton-resources.md
	$(PY) tests/kernels/gates.py --jobs $$(nproc) --write
	$(PY) tests/kernels/gates.py --guidance --jobs $$(nproc) --write

predict: install ## what a call would take on GPUs that are not here, from the compiled kernels, into docs/predicted.md
	$(PY) bench/predict.py
	$(PY) bench/tables.py

bench: install ## the operator and whole pipelines beside their rivals, into OUT/bench; BENCH='--all-cases' for everything
	$(PY) -m pytest bench --benchmark-only --results $(OUT)/bench $(BENCH)

NAME = import torch; from negengine.bench.results import device_name; print(device_name("cuda" if torch.cuda.is_available() else "cpu"))

bench-check: install ## the operator's smallest shape anew, its ratios compared with bench/results; fails if ours became slower
	@baseline=bench/results/$$($(PY) -c '$(NAME)')/operator.json; \
	if [ ! -e $$baseline ]; then echo "nothing to compare with: there is no $$baseline"; exit 0; fi; \
	$(PY) -m negengine.cli bench operator --output $(OUT)/bench-check --shape sdxl-32 --dtype bf16 --matching paper --no-compile \
	  --same-machine-as $$baseline && \
	$(PY) -m negengine.cli bench compare $$baseline $(OUT)/bench-check/operator.json --ratios --role ours --same-machine-only

# one sitting each, 5 minutes for the first and 8 for each other; PY=python3 to use that Python, and this checkout, as they are
$(PARTS:%=gpu-%): gpu-%: install
	$(PY) bench/gpu.py $* --results $(OUT)/gpu-$* $(if $(JOBS),--jobs $(JOBS))

gpu: install ## on a machine with a GPU: all that is measured and tested there, in parts; PY=python3 to use that Python as it is
	@status=0; for part in $(PARTS); do $(MAKE) --no-print-directory gpu-$$part || status=1; done; exit $$status

gpu-fast: ## the first of these parts, which tells most: operator, GPU tests, contract, tiles, in 5 minutes; gpu-cases, ... are the others

fuzz: ## the C interface under sanitizers, SECONDS_EACH of arbitrary calls under each; needs CMake
	for s in address,undefined thread; do b=build/$${s%,*}; \
	  cmake -S . -B $$b -DNEGENGINE_SANITIZE=$$s && cmake --build $$b -j && \
	  $$b/negengine_driver 200 && $$b/negengine_fuzz $(SECONDS_EACH) $$(date +%s) || exit 1; done

lint: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

train: install ## train the embedded models anew, about four hours on two cores; continues where it was stopped
	$(PY) -m negengine.models.train --model all --output training

clean: ## what the other targets made
	rm -rf $(VENV) $(OUT) build kernels/cpu/libnegengine_cpu* *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
