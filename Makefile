# Every target sets itself up: `make demo` and `make test` work on a fresh checkout.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS  := dev,runtimes,serve
ASSETS  := minilm minilm-l3 smollm2 reviews reviews_zh food retail lenses
# apart: only compared with; llama.cpp is built, which takes minutes
PEERS   := torchao==0.18.0 optuna==5.0.0 colorlog==6.12.0 llama-cpp-python==0.3.36 diskcache==5.6.3 \
           model2vec==0.10.0 skeletoken==0.6.1
READY   := $(VENV)/.ready

export PIP_ROOT_USER_ACTION := ignore

# The stamp says where the environment was finished. One that was moved, broken or never finished is made anew.
ifneq ($(shell { $(BIN)/python -c 'import pip' && cat $(READY); } 2>/dev/null),$(CURDIR))
$(shell rm -f $(READY))
endif

.PHONY: help demo test check lab run site bench export constraints assets clean
.DEFAULT_GOAL := help

help:  ## Show what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: assets  ## Make a real review classifier smaller and faster, and show the table
	@$(BIN)/python -m tools.demo

test: assets  ## Run all tests, the notebooks among them
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

check: assets  ## Lint, exports, and the quick tests: two minutes
	@$(BIN)/python -m ruff check nbs tests tools benchmarks
	@$(BIN)/python -m tools.lint
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not slow"

lab: assets  ## Open the notebooks in JupyterLab
	@$(BIN)/python -m jupyterlab nbs

run: assets  ## Execute in full the notebooks whose code changed since, and store their outputs
	@$(BIN)/python -m tools.run

site: $(READY)  ## Build the site in _site/ from the stored outputs; executes nothing
	@$(BIN)/python -m tools.site

bench: assets  ## Run every benchmark; each writes benchmarks/results/NAME.json
	@test "$$(cat .peers/.ready 2>/dev/null)" = "$(PEERS)" || { \
	  $(PIP) install --no-deps --upgrade --target .peers $(PEERS) && echo "$(PEERS)" > .peers/.ready; }
	@PYTHONPATH=.peers $(BIN)/python -m pytest -q tests/test_llama_cpp.py tests/test_runtime_llm.py  # with llama.cpp
	@for script in benchmarks/*.py; do echo "$$script" && $(BIN)/python -m "$$(basename "$$script" .py | sed s:^:benchmarks.:)" || exit 1; done

export: $(READY)  ## Make ecomopt/ and README.md from the notebooks, and clean these; outputs stay
	@$(BIN)/python -m tools.generate
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export

constraints: $(READY)  ## Pin in constraints.txt the versions that .venv holds now
	@$(PIP) freeze --all --exclude-editable --exclude pip | sed 's/+.*//' | LC_ALL=C sort -f > constraints.txt

clean:  ## Remove all that make made here; the downloaded assets and unfinished benchmarks stay
	@rm -rf $(VENV) .peers nbs/start/small _site _stage _demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

assets: $(READY)
	@$(BIN)/ecomopt assets $(ASSETS:%=--fetch %)

$(READY): constraints.txt settings.ini pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ecomopt needs Python 3.11 or newer as $(PYTHON). Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -f $@ || { echo "Making $(VENV); this takes a few minutes, once."; $(PYTHON) -m venv --clear $(VENV); }
	@$(PIP) install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@printf '%s' '$(CURDIR)' > $@
