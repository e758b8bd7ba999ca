# ringpool's chores. A fresh machine needs make and Python 3.11 or newer; everything else goes into .venv.
#
#   make .venv        ringpool, editable, with what its tests and linters need; again only when pyproject.toml changes
#   make demo         a real run over real files, one worker killed in the middle, every output checked
#   make test         the tests, on all processors              (JOBS=n for n of them, ARGS="-k ring" for pytest)
#   make test-crash   the full kill matrix, minutes long
#   make lint         format, lint, types, and which room imports which: changes nothing
#   make format       the format, and what the linter can repair by itself
#   make bench        the benchmarks, and their plots
#   make clean        away with all of the above
#
# PYTHON=... picks the Python that .venv is made of (make clean first, where there is one).

BIN        := .venv/bin
PIP        := $(BIN)/python -m pip --quiet --disable-pip-version-check
JOBS       ?= $(shell nproc 2>/dev/null || echo 2)
RUNS_WITH  := click filelock msgspec psutil rich
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)

# Does a candidate run, is it new enough, and can it make a virtual environment (Debian packs that apart)?
PROBE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

# A container's image may forbid bytecode. Then each of the thousands of interpreters that the tests start would compile
# all that it imports, which takes half as long again as the tests themselves.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help .venv anew demo test test-crash lint format bench clean

help:
	@sed -n '3,10s/^# *//p' Makefile

.venv: .venv/dev.stamp

# The stamp is written last and holds the place of the tree: an interrupted installation begins again, and so does a .venv
# that was copied here along with its tree, which would still run the tree that it came from. What ringpool runs with is
# compiled; the rest compiles itself when it is imported: to compile all that comes along would take a third of the time.
ifneq ($(shell cat .venv/dev.stamp 2>/dev/null),$(CURDIR))
.venv/dev.stamp: anew
endif

.venv/dev.stamp: pyproject.toml
	@if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ] || ! $(BIN)/python -c '' 2>/dev/null; then \
	    for python in $(CANDIDATES); do \
	        if "$$python" -c '$(PROBE)' 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "ringpool needs Python 3.11 or newer with its venv module; tried: $(CANDIDATES)." >&2; \
	        echo "Install one (on Debian: python3 and python3-venv), or name one: make PYTHON=/path/to/python3 ..." >&2; \
	        exit 1; \
	    fi; \
	    echo "making .venv with $$found ($$("$$found" --version))"; \
	    "$$found" -m venv --clear .venv; \
	fi
	$(PIP) install --no-compile --editable '.[dev]'
	@$(BIN)/python -m compileall -q src $(addprefix .venv/lib/python*/site-packages/,$(RUNS_WITH))
	@echo '$(CURDIR)' > $@

.venv/bench.stamp: .venv/dev.stamp
	$(PIP) install --no-compile --editable '.[bench]'
	@touch $@

demo: .venv/dev.stamp
	$(BIN)/python examples/demo.py

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-crash: .venv/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m crash $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/bench.stamp
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv build dist htmlcov .coverage .coverage.* .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find src tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
