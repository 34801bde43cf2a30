# Every target that needs Python makes .venv from requirements/dev.txt first (PYTHON3=/path/to/python chooses another one).
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
COMPILE := $(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(UPGRADE)

# ARGS go to the command; PYTHON3, PORT, MOCK_PORT, STACK_TESTS, BROWSER_TESTS and REPEATS reach it through the environment.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check format lock up down logs trace test-stack test-chaos chaos bench soak

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements/dev.txt
	@tools/venv $(VENV) $<

demo: $(INSTALLED) ## Run the gateway and a mock model here, post a prompt, show its trace (PORT, MOCK_PORT)
	@$(PYTHON) -m tools.demo

test: $(INSTALLED) ## Run the unit and integration tests (ARGS are pytest's)
	$(PYTHON) -m pytest $(ARGS)

check: $(INSTALLED) ## Lint, check the format and the types
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

format: $(INSTALLED) ## Format the code and mend what the linter can mend
	$(PYTHON) -m ruff check --fix-only
	$(PYTHON) -m ruff format

lock: $(INSTALLED) ## Remake requirements/*.txt from pyproject.toml (UPGRADE=--upgrade for newer versions)
	$(COMPILE) --all-extras pyproject.toml -o requirements/dev.txt
	$(COMPILE) -c requirements/dev.txt pyproject.toml -o requirements/gateway.txt
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["mock-model"], sep="\n")' \
		| $(COMPILE) -c requirements/dev.txt --no-annotate - -o requirements/mock_model.txt

up: ## Start the stack in containers and wait until it is healthy
	REVISION=$$(git rev-parse --short HEAD 2>/dev/null || echo unknown) docker compose up --build --wait

down: ## Stop the stack and remove its containers and volumes
	docker compose --profile '*' down --volumes --remove-orphans

logs: ## Follow the stack's logs
	@docker compose logs --follow || [ $$? -eq 130 ]

trace: ## Post a prompt to the stack and print the address of its trace in Jaeger
	@$(or $(PYTHON3),python3) tools/trace.py $(ARGS)

test-stack: $(INSTALLED) ## Test the stack on a Docker engine (STACK_TESTS=require: a missing engine is a failure)
	$(PYTHON) -m pytest tests/stack -m stack $(ARGS)

test-chaos: $(INSTALLED) ## Break everything under load and compare the counts (REPEATS=5; BROWSER_TESTS=require)
	$(PYTHON) -m pytest tests/chaos -m chaos $(ARGS)

chaos: $(INSTALLED) ## Play a game day and write chaos-report.html (ARGS="--compose": on the running containers)
	$(PYTHON) -m chaos $(ARGS)

bench: $(INSTALLED) ## Measure what the gateway costs
	$(PYTHON) -m bench $(ARGS)

soak: $(INSTALLED) ## Run under load for a long time and watch memory
	$(PYTHON) -m bench.soak $(ARGS)
