# Every target sets the environment up if it is missing; nothing else has to be installed but Python 3.11, git and make.
PYTHON ?= python3.11
VENV   ?= .venv
READY  := $(VENV)/.ready
TESTS  := python -m pytest -n auto --maxprocesses 8 --dist loadfile
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONPATH := src:.
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help plan repro sweep sweep-apply test pipeline check settings ui champion replay embedded clean clean-checkpoints
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

plan: $(READY)  ## what a run will do and need, and all that would stop it; ONLINE=1 asks the Hub too
	@python -m attune.stages.plan --show $(if $(ONLINE),--online)

repro: $(READY)  ## run the whole pipeline (what has changed of it) and publish reports/<profile>
	dvc repro
	@echo "report: reports/$$(sed -n 's/^profile: *\([A-Za-z0-9_-]*\).*/\1/p' params.yaml)/report.html"

test: $(READY)  ## all tests but the end-to-end one
	$(TESTS) -m "not pipeline"

pipeline: $(READY)  ## the end-to-end test: a short `dvc repro` in a copy, twice
	$(TESTS) -m pipeline

check: $(READY)  ## style, types, import layers and the fast tests
	ruff check . && ruff format --check .
	mypy
	$(TESTS) -m "not integration and not pipeline"

settings: $(READY)  ## write docs/settings.md and docs/schema from the code
	python -m attune.config.reference

sweep: $(READY)  ## search the settings of a run, say METHOD=spo: docs/search.md
	@python -m attune.stages.sweep --run $(METHOD) --ask
	dvc repro sweeps/dvc.yaml:sweep@$(METHOD)

sweep-apply: $(READY)  ## write the best settings of `make sweep METHOD=spo` into params/<profile>.yaml
	python -m attune.stages.sweep --run $(METHOD) --apply

ui: $(READY)  ## tracking UI at http://localhost:5000, in its lean form (0.5 GB instead of 3)
	@echo "trainings and trials by beta, lr and scores: http://localhost:5000/#/experiments/1/runs?viewStateShareKey=attune"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1

champion: $(READY)  ## register the best run of the report, if it beats the champion
	python -m attune.stages.champion

replay: $(READY)  ## send what a tracking store that was away has not got yet
	python -m attune.stages.replay

clean-checkpoints: $(READY)  ## remove what stopped trainings saved and nothing will resume; ALL=1: all of it
	@python -m attune.stages.clean_checkpoints $(if $(ALL),--all)

embedded: $(READY)  ## train the embedded family again (about an hour on one core)
	python -m recipes.embedded.build

clean:  ## remove the environment and caches, keep data and results
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(READY): requirements.txt
	@git rev-parse --git-dir >/dev/null 2>&1 || git init --quiet
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off -r requirements.txt
	@touch $@
