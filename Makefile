# Set-up is done once per machine and reused: the environment stands outside the checkout.
#
#   make quickstart            train SmolLM2-135M with AOT, paired, and measure it
#   make quickstart-unpaired   the same on labelled rows
#   make test                  every test, the slow ones included
#   make exactness-long        every architecture and setting at every cut of a step
#   make check                 ruff, mypy and the direction of imports
#   make docs                  the docs as a site, in build/site; broken links are errors
#   make release               check, test and build what is committed, and tag it

CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/aot-plugin
VENV  ?= $(CACHE)/venv
BIN   := $(VENV)/bin
MODEL := outputs/smollm2-135m-instruct

# A user's settings win; a run that can't reach the hub must not wait for it.
export AXOLOTL_DO_NOT_TRACK ?= 1
export HF_HUB_OFFLINE ?= 1
export PATH := $(BIN):$(PATH)

.PHONY: quickstart quickstart-unpaired test fast exactness-long check docs release env

quickstart: env
	$(BIN)/python example_configs/quickstart/prepare_model.py $(MODEL)
	axolotl train example_configs/quickstart.yml --launcher python
	$(BIN)/python example_configs/quickstart/measure.py outputs/quickstart

quickstart-unpaired: env
	$(BIN)/python example_configs/quickstart/prepare_model.py $(MODEL)
	axolotl train example_configs/quickstart_unpaired.yml --launcher python
	$(BIN)/python example_configs/quickstart/measure.py outputs/quickstart-unpaired

# Two workers, since most tests use one thread; a file's tests share what they have set up. Files
# run in their order, which ends with many short ones; reordered, those of few long tests come last.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: env
	$(BIN)/python example_configs/quickstart/prepare_model.py $(MODEL)
	$(PYTEST) $(PYTEST_ARGS)

fast: env
	$(BIN)/python example_configs/quickstart/prepare_model.py $(MODEL)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

exactness-long: env
	$(PYTEST) --dist load -m exactness_long tests/exactness $(PYTEST_ARGS)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

release: env
	BIN="$(BIN)" sh .ci/release.sh

env:
	@VENV="$(VENV)" sh .ci/env.sh
