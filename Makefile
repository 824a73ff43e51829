# Everything runs in .venv, which is made once: with uv where there is one, else with venv and pip.
# Another interpreter: make PYTHON=python3.12 VENV=.venv312 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/gpt_stdlib
CONFIG ?= configs/gpt_stdlib.py
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help pretrain test lint evaluate generate convert benchmark journeys parity clean reproduce-shakespeare reproduce-kills \
	reproduce-minilm reproduce-albert reproduce-longformer reproduce-plans reproduce-parallel reproduce-elastic \
	reproduce-slurm reproduce-report reproduce-follow reproduce-sweeps reproduce-mup results report sweep

help:  ## show this list
	@grep -hE '^[a-z0-9%-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9%-]+):[^#]*## (.*)/\1|\2/' | \
		awk -F'|' '{printf "  make %-24s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables: PYTHON=python3.12  RUN=runs/x  CONFIG=configs/x.py  ARGS='--config.optim.lr=1e-3'"

# A change of pyproject.toml brings the environment up to date.
$(VENV)/.ready: pyproject.toml
	@command -v git >/dev/null || { echo "git is needed"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) (once) ..."
	@if command -v uv >/dev/null; then \
		uv venv --quiet --seed --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
		uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

pretrain: $(VENV)/.ready  ## train the main job on your Python's standard library; the same command resumes
	@$(BIN)/python -m experiments.train --config=$(CONFIG) --workdir=$(RUN) $(ARGS)

test: $(VENV)/.ready  ## run the tests, in up to 4 processes
	@$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal $(ARGS)

lint: $(VENV)/.ready  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

sweep: $(VENV)/.ready  ## make sweep SWEEP=configs/sweeps/lr.py RUN=sweeps/lr ARGS='--vectorise=8'; the same command goes on
	@$(BIN)/python -m experiments.sweep --config=$(CONFIG) --sweep=$(or $(SWEEP),$(error give SWEEP=path/to/sweep.py)) \
		--workdir=$(if $(filter file,$(origin RUN)),$(error give RUN=sweeps/x),$(RUN)) $(ARGS)

evaluate: $(VENV)/.ready  ## evaluate RUN
	@$(BIN)/python -m experiments.evaluate --run $(RUN) $(ARGS)

report: $(VENV)/.ready  ## a page of RUN, or of all runs below it
	@$(BIN)/python -m experiments.report $(RUN) $(ARGS)

generate: $(VENV)/.ready  ## continue a prompt with RUN: make generate ARGS="--prompt 'def '"
	@$(BIN)/python -m experiments.generate --run $(RUN) $(ARGS)

convert: $(VENV)/.ready  ## bring a model in or give it back: make convert ARGS="--from hf:FOLDER --to runs/x"
	@$(BIN)/python -m experiments.convert $(ARGS)

benchmark: $(VENV)/.parity  ## step times beside PyTorch, the loop's overhead, checkpoint blocking, start-up
	@$(BIN)/python -m experiments.benchmark $(ARGS)

$(VENV)/.parity: $(VENV)/.ready
	@echo "Adding the PyTorch references (once) ..."
	@if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python -e '.[parity]' 'torch==2.13.0'; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' -e '.[parity]'; fi
	@touch $@

journeys: $(VENV)/.ready  ## the long tests: whole commands, killed processes, a real Slurm where there is one
	@$(BIN)/python -m pytest -m journey --numprocesses=auto --maxprocesses=4 $(ARGS)

parity: $(VENV)/.parity  ## compare with PyTorch live
	@$(BIN)/python -m pytest -m parity $(ARGS)

reproduce-shakespeare: $(VENV)/.ready  ## nanoGPT's CPU figure; DATA=path/to/input.txt (about 2 minutes)
	@$(BIN)/python -m experiments.reproduce.shakespeare --data $(or $(DATA),$(error give DATA=path/to/input.txt)) $(ARGS)

reproduce-kills: $(VENV)/.ready  ## kill a run 20 times and compare with an undisturbed one (about 10 minutes)
	@$(BIN)/python -m experiments.reproduce.kills $(ARGS)

reproduce-elastic: $(VENV)/.ready  ## 2 and 4 processes: killed, restarted, resumed with other numbers (about 15 minutes)
	@$(BIN)/python -m experiments.reproduce.elastic $(ARGS)

reproduce-slurm: $(VENV)/.ready  ## a job on a real Slurm here, requeued (root, slurm-wlm and munge; about 3 minutes)
	@$(BIN)/python -m experiments.reproduce.slurm $(ARGS)

reproduce-report: $(VENV)/.ready  ## 16 small runs, their report and its pictures (chromium for these; about 3 minutes)
	@$(BIN)/python -m experiments.reproduce.report $(ARGS)

reproduce-follow: $(VENV)/.ready  ## what evaluating a live run on other cores costs it (about 7 minutes)
	@$(BIN)/python -m experiments.reproduce.follow $(ARGS)

reproduce-sweeps: $(VENV)/.ready  ## 16 runs as processes and as one program, a study, killed; DATA=input.txt (about 20 minutes)
	@$(BIN)/python -m experiments.reproduce.sweeps --data $(or $(DATA),$(error give DATA=path/to/input.txt)) $(ARGS)

reproduce-minilm: $(VENV)/.ready  ## imported MiniLM on STS-B; MODEL=folder DATA=stsb-en-test.csv.gz (about 20 seconds)
	@$(BIN)/python -m experiments.reproduce.minilm --model $(or $(MODEL),$(error give MODEL=path/to/model)) \
		--data $(or $(DATA),$(error give DATA=path/to/stsb-en-test.csv.gz)) $(ARGS)

reproduce-%: $(VENV)/.ready  ## recipes of configs/NAME.py; DATA=folder of the files, MODEL=folder, VARIANT=lora (see the config)
	@[ -f configs/$*.py ] || { echo "There is no configs/$*.py; recipes are: $$(grep -l '^RECIPES' configs/*.py | xargs -n1 basename | sed 's/.py$$//' | xargs)"; exit 2; }
	@$(BIN)/python -m experiments.reproduce.recipe --config=configs/$*.py$(if $(VARIANT),:$(VARIANT)) $(if $(DATA),--data=$(DATA)) \
		$(if $(MODEL),--model=$(MODEL)) $(ARGS)

results: $(VENV)/.ready  ## draw the README's table of recipes from results/*.json
	@$(BIN)/python -m experiments.results $(ARGS)

reproduce-albert: $(VENV)/.parity  ## imported ALBERT of rxnmapper beside the reference; MODEL=folder (about 20 seconds)
	@$(BIN)/python -m experiments.reproduce.albert --model $(or $(MODEL),$(error give MODEL=path/to/model)) $(ARGS)

# Beside the other environment: where libtpu is installed, every JAX process looks for chips first.
$(VENV)-tpu/.ready: pyproject.toml
	@echo "Making $(VENV)-tpu (once) ..."
	@$(PYTHON) -m venv $(VENV)-tpu && $(VENV)-tpu/bin/python -m pip install --quiet --disable-pip-version-check -e '.[tpu]'
	@touch $@

reproduce-plans: $(VENV)-tpu/.ready  ## plan six models on pods with the TPU compiler (about an hour; ARGS=--again those that are there)
	@$(VENV)-tpu/bin/python -m experiments.reproduce.plans $(ARGS)

reproduce-parallel: $(VENV)/.ready  ## losses and gradients on every kind of mesh beside one device (about 5 minutes)
	@$(BIN)/python -m experiments.reproduce.parallel $(ARGS)

reproduce-mup: $(VENV)/.ready  ## muP: the coordinate check over widths, and the best learning rate at 64 and 512 (about 25 minutes); resumes
	@$(BIN)/python -m experiments.reproduce.mup $(ARGS)

reproduce-longformer: $(VENV)/.ready  ## Longformer's time and memory at 2,048, 4,096 and 8,192 tokens
	@$(BIN)/python -m experiments.reproduce.longformer_cost $(ARGS)

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) $(VENV)-tpu build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
