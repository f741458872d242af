# The commands are those of `attune` (src/attune/__main__.py); WITH="--seed 1" passes on any other option.
# Every target sets the environment up if it is missing; nothing else has to be installed but Python 3.11, git and make.
PYTHON ?= python3.11
VENV   ?= .venv
READY  := $(VENV)/.ready
ATTUNE := python -m attune
# What is given on the command line reaches the shell as variables of its environment, so no text of it is run as code.
override export DATA := $(value DATA)
override export PROMPT := $(value PROMPT)
override export RUN := $(value RUN)
override export AGAINST := $(value AGAINST)
override export REPO := $(value REPO)
override export A := $(value A)
override export B := $(value B)
override export EXPORT := $(value EXPORT)
TESTS  := python -m pytest -n auto --maxprocesses 8 --dist loadfile
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONPATH := src:.
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help init plan inspect label repro seeds compare sample package push sweep sweep-apply test pipeline check gpu speed settings ui champion replay embedded clean clean-checkpoints
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

init: $(READY)  ## a profile for pictures of your own: make init DATA=my/folder [BASE=sd15_24gb]
	@$(ATTUNE) init "$$DATA" $(if $(BASE),--base $(BASE)) $(WITH)

plan: $(READY)  ## what a run will do and need, and all that would stop it; ONLINE=1 asks the Hub too
	@$(ATTUNE) plan $(if $(ONLINE),--online)

inspect: $(READY)  ## look at the data before training: reports/<profile>/data.html; SCORE=pickscore asks a scorer
	@$(ATTUNE) inspect $(if $(SCORE),--score $(SCORE)) $(WITH)

label: $(READY)  ## a page to choose between images: make label A=base [B=dpo] [EXPORT=data/raw/labels]
	@$(ATTUNE) label --a "$$A" $(if $(B),--b "$$B") $(if $(EXPORT),--export "$$EXPORT") $(WITH)

repro: $(READY)  ## run the whole pipeline (what has changed of it) and print the result: make repro [WITH="--jobs 1"]
	@$(ATTUNE) repro $(WITH)

seeds: $(READY)  ## the whole pipeline for N seeds, compared in the report: make seeds N=3 [WITH="--jobs 2"]
	@$(ATTUNE) seeds $(if $(N),--n $(N)) $(WITH)

compare: $(READY)  ## the experiments of DVC side by side: what differs between them
	@dvc exp show --no-pager --only-changed --drop '.*/|Created' $(WITH)

sample: $(READY)  ## images of any prompt: make sample RUN=dpo PROMPT="a red ring" [N=4] [AGAINST=base]
	@$(ATTUNE) sample --run "$$RUN" --prompt "$$PROMPT" $(if $(N),--n $(N)) $(if $(AGAINST),--against "$$AGAINST") $(WITH)

package: $(READY)  ## an adapter with its card, for diffusers, ComfyUI and A1111: make package RUN=dpo
	@$(ATTUNE) package --run "$$RUN" $(WITH)

push: $(READY)  ## upload a package to the Hugging Face Hub: make push RUN=dpo REPO=owner/name
	@$(ATTUNE) push --run "$$RUN" --repo "$$REPO" $(WITH)

test: $(READY)  ## all tests but the end-to-end one
	$(TESTS) -m "not pipeline"

pipeline: $(READY)  ## the end-to-end test: a short `dvc repro` in a copy, twice
	$(TESTS) -m pipeline

check: $(READY)  ## style, types, import layers and the fast tests
	ruff check . && ruff format --check .
	mypy
	$(TESTS) -m "not integration and not pipeline"

gpu: $(READY)  ## what this machine's GPU does, in eight minutes, nothing downloaded: reports/gpu.md
	python benchmarks/gpu.py $(WITH)

speed: $(READY)  ## our steps beside the order of operations of what they replace, ten minutes: reports/speed.md
	python benchmarks/speed.py --short $(WITH)

settings: $(READY)  ## write docs/settings.md and docs/schema from the code
	python -m attune.config.reference

sweep: $(READY)  ## search the settings of a run, say METHOD=spo: docs/search.md
	@$(ATTUNE) sweep --run $(METHOD)

sweep-apply: $(READY)  ## write the best settings of `make sweep METHOD=spo` into params/<profile>.yaml
	@$(ATTUNE) sweep --run $(METHOD) --apply

ui: $(READY)  ## tracking UI at http://localhost:5000, in its lean form (0.5 GB instead of 3)
	@echo "trainings and trials by beta, lr and scores: http://localhost:5000/#/experiments/1/runs?viewStateShareKey=attune"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1

champion: $(READY)  ## register the best run of the report, if it beats the champion
	@$(ATTUNE) champion

replay: $(READY)  ## send what a tracking store that was away has not got yet
	@$(ATTUNE) replay

clean-checkpoints: $(READY)  ## remove what stopped trainings saved and nothing will resume; ALL=1: all of it
	@$(ATTUNE) clean-checkpoints $(if $(ALL),--all)

embedded: $(READY)  ## train the embedded family again (about an hour on one core)
	python -m recipes.embedded.build

clean:  ## remove the environment and caches, keep data and results
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(READY): requirements.txt
	@git rev-parse --git-dir >/dev/null 2>&1 || git init --quiet
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off -r requirements.txt
	@touch $@
