# Everything one does with a checkout. Uses the active Python where torch is installed, else makes .venv with torch in it.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench gpu lint format build clean

HAS_TORCH := import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)
ACTIVE := $(shell python3 -c '$(HAS_TORCH)' 2>/dev/null && echo yes)
PYTHON := $(if $(ACTIVE),python3,.venv/bin/python)
# On a machine that has no more than AVX2, the first part has tested those kernels.
OWN_ISA := 'import torch; print(torch.backends.cpu.get_cpu_capability())'
READY := $(if $(ACTIVE),,.venv/.ready)

export CONVBLOCKS_REQUIRE_EXT ?= 1
WORKERS ?= $(shell nproc 2>/dev/null || echo 1)
# One line of pytest per process: some backends need a process of their own. $(1): its name; the rest: arguments.
pytest = $(PYTHON) -m pytest -q -n $(WORKERS) --maxfail=20 --junitxml=build/reports/$(1).xml
install = needs=$$($(PYTHON) .ci/requirements.py $(1)); [ -z "$$needs" ] || $(PYTHON) -m pip install --quiet $$needs

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.venv/.ready:
	python3 -m venv .venv
	.venv/bin/python -m pip install torch==2.14.1 torchvision==0.29.1
	touch $@

build: $(READY) ## Build the compiled part in place; only what changed
	@$(call install,build)
	@$(PYTHON) setup.py -q build_ext --inplace

demo: export CONVBLOCKS_REQUIRE_EXT = 0
demo: build ## Accelerate real networks: same results, less time
	@$(call install,bench)
	@$(PYTHON) -m bench.demo

test: lint build ## All that can be proved on a machine without a GPU (CI runs this)
	@$(call install,test)
	@rm -rf build/reports
	$(call pytest,1-main) tests
	TRITON_INTERPRET=1 CONVBLOCKS_TEST_BACKENDS=triton $(call pytest,2-triton) tests/ops tests/gpu
	CONVBLOCKS_TEST_BACKENDS=cuda CONVBLOCKS_TEST_CUDA=$$($(PYTHON) -m tests.gpu.emulator plain) $(call pytest,3-cuda) tests/ops
	[ "$$($(PYTHON) -c $(OWN_ISA))" = AVX2 ] || ATEN_CPU_CAPABILITY=avx2 CONVBLOCKS_TEST_BACKENDS=cpu $(call pytest,4-avx2) tests/ops -k "parity or test_dense_conv2d or halves"
	ATEN_CPU_CAPABILITY=default CONVBLOCKS_TEST_BACKENDS=cpu $(call pytest,5-baseline) tests/ops -k "parity or test_dense_conv2d or halves"
	@$(PYTHON) .ci/summary.py build/reports/*.xml

test-slow: build ## What takes minutes or gigabytes
	@$(call install,test)
	$(PYTHON) -m pytest -m slow tests

bench: export CONVBLOCKS_REQUIRE_EXT = 0
bench: build ## Time every operation against torch; e.g. make bench ARGS="--ops simam --preset full"
	@$(call install,bench)
	@$(PYTHON) -m bench run $(ARGS)

gpu: export CONVBLOCKS_CUDA = 1
gpu: build ## On a machine with a GPU: parity, memory checks, benchmark; one report under bench/results
	@$(call install,pytest hypothesis timm)
	@PYTHON=$(PYTHON) bash .ci/gpu

lint: $(READY) ## ruff and mypy
	@$(call install,lint)
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy convblocks

format: $(READY) ## Format the Python and the C++ code
	@$(call install,lint)
	@$(PYTHON) -m ruff check --fix-only --quiet
	@$(PYTHON) -m ruff format
	@$(PYTHON) -c 'from clang_format import clang_format; clang_format()' -i $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')

clean: ## Remove what was built, not .venv
	rm -rf build dist *.egg-info convblocks/*.so convblocks/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
