# Each target works on a bare checkout: it makes .venv first, and again only when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# One thread: beside another busy process OpenMP on two cores is up to twenty times slower, and tiny models gain little.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help setup quickstart test lint bench smollm2 clean

help:
	@echo "make setup       build .venv (no-op when nothing changed)"
	@echo "make quickstart  SFT and CARFT on a generated task, with a report, in minutes on a CPU"
	@echo "make test        run every test"
	@echo "make lint        ruff and mypy"
	@echo "make bench       write the benchmark report"
	@echo "make smollm2     fetch SmolLM2-135M-Instruct as a model folder, models/smollm2"

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/carft-fast quickstart --output-dir $(OUT) $(ARGS)

# A Hub id works the same: carft-fast ... --set model.path=HuggingFaceTB/SmolLM2-135M-Instruct
smollm2: setup
	$(BIN)/python scripts/fetch_smollm2.py models/smollm2

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.ops

clean:
	rm -rf .venv runs models build *.egg-info
