# Each target works on a bare checkout: it makes .venv first, and again only when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# One thread: beside another busy process OpenMP on two cores is up to twenty times slower, and tiny models gain little.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help lock setup docs sampler quickstart test test-long test-quick test-page lint bench bench-ops bench-report bench-gpu gpu-wheels bench-rollout bench-step bench-peers test-peers bench-sandbox readme kernels-aot kernels-sanitize kernels-mutate test-oldest test-newest audit smollm2 clean

help:
	@echo "make setup       build .venv (no-op when nothing changed)"
	@echo "make sampler     add vLLM for the CPU to it, where there is no GPU; tests and benchmarks use it"
	@echo "make quickstart  SFT and CARFT on a generated task, with a report, in minutes on a CPU"
	@echo "make test        run the tests"
	@echo "make test-long   those that make test leaves out: kills, hangs, whole runs on several processes"
	@echo "make test-quick  those that need no model server and no second process, in two minutes"
	@echo "make lint        ruff, mypy and which room may import which"
	@echo "make docs        the documentation as a site, build/site/index.html; fails on a broken link"
	@echo "make test-page   the HTML reports in Chromium"
	@echo "make bench       run the benchmarks, write rows and report.html to benchmarks/results"
	@echo "make bench-ops   time the operators with pytest-benchmark, five times in turn"
	@echo "make bench-report  report.html from the rows that are there"
	@echo "make bench-gpu   operators, step and rollouts on a GPU; on a bare machine see docs/bench_gpu.md"
	@echo "make gpu-wheels  packages that a bare GPU machine lacks, to take along in build/gpu_wheels"
	@echo "make bench-rollout  compare the sampling engines"
	@echo "make bench-step  compare the fast training step with the plain one"
	@echo "make bench-peers compare the step with TRL's and the published trainers'"
	@echo "make test-peers  what that comparison relies on of TRL"
	@echo "make bench-sandbox SVAMP=FILE  programs a second in the sandbox"
	@echo "make readme      the measured tables of README and docs/benchmarks.md, from the committed rows"
	@echo "make kernels-aot       compile every kernel for sm_80, sm_90 and sm_100 and read the machine code"
	@echo "make kernels-sanitize  kernel tests with races and out-of-bounds accesses reported"
	@echo "make kernels-mutate    break the kernels and count what the tests notice"
	@echo "make test-oldest       operator tests and compilations with the oldest torch and triton that are allowed"
	@echo "make test-newest       the same with the newest ones of the package index"
	@echo "make lock        requirements/*.txt anew: what make setup installs, with hashes"
	@echo "make audit       known vulnerabilities of the installed packages; needs network"
	@echo "make smollm2     fetch SmolLM2-135M-Instruct as a model folder, models/smollm2"

setup: .venv/ready

# What tests, lint and benchmarks need beside it: a real vLLM. On a machine with an NVIDIA driver it is the user's own
# (pip install -e ".[vllm]"). The three packages come built for another torch than the CPU one, and break transformers.
# torchao has a folder of its own: where it is installed, transformers imports it in every process, in 1.4 s.
sampler: .venv/sampler

.venv/sampler: .venv/ready
	command -v nvidia-smi >/dev/null || { \
		$(INSTALL) --require-hashes -r requirements/sampler.txt; }
	$(INSTALL) --require-hashes -r requirements/torchao.txt --target .venv/torchao --upgrade
	touch $@

# Every file that is installed has to have the hash that requirements/ names, but for the project itself and Python's own
# pip. torch's CPU build is taken where pip is shown one: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation

.venv/ready: pyproject.toml setup.py $(filter-out requirements/docs.txt,$(wildcard requirements/*.txt))
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --require-hashes -r requirements/build.txt
	$(INSTALL) --require-hashes -r requirements/torch-cpu.txt 2>$(BIN)/torch-cpu.log || \
		$(INSTALL) --require-hashes -r requirements/torch-cuda.txt
	$(INSTALL) --require-hashes -r requirements/dev.txt
	$(INSTALL) -e .
	touch $@

# From the Markdown files where they are (mkdocs.yml), in an environment of its own.
docs: build/docs/ready
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict $(ARGS)

build/docs/ready: BIN := build/docs/bin
build/docs/ready: requirements/docs.txt
	$(PYTHON) -m venv --clear build/docs
	$(INSTALL) --require-hashes -r requirements/docs.txt
	touch $@

# Anew from pyproject.toml and constraints.txt; ARGS=--upgrade for the newest versions that they allow.
lock:
	test -x build/uv/bin/uv || { $(PYTHON) -m venv build/uv && \
		build/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9; }
	$(PYTHON) scripts/lock.py build/uv/bin/uv $(ARGS)

quickstart: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/carft-fast quickstart --output-dir $(OUT) $(ARGS)

# A Hub id works the same: carft-fast ... --set model.path=HuggingFaceTB/SmolLM2-135M-Instruct
smollm2: models/smollm2

# Two processes at a time, a file of tests in one of them; the servers and models of two need about 12 GiB.
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile

test: sampler
	$(PYTEST) -m "not long" $(ARGS)

test-long: sampler
	$(PYTEST) -m long $(ARGS)

test-quick: setup
	$(PYTEST) -m "not long" $(addprefix tests/,config core data objective rewards compare) $(patsubst %,tests/ops/test_%.py, \
		logprob losses contrastive advantages precision bad_calls guarantees golden) $(ARGS)

lint: sampler
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# benchmarks/results: rows that are committed, and report.html with all of them. On a GPU see bench-gpu.
bench: sampler build/peers
	$(MAKE) bench-ops
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.growth
	$(MAKE) bench-rollout
	$(MAKE) bench-step
	$(if $(SVAMP_PROGRAMS),$(MAKE) bench-sandbox SVAMP=$(SVAMP_PROGRAMS))
	$(BIN)/python -m benchmarks.counts
	$(MAKE) bench-report

# Five runs one after the other: the variants of an operator take turns. ARGS="--benchmark-timer=time.process_time" on a
# machine with other work. One operator: pytest benchmarks/ops -k whiten
bench-ops: sampler build/peers
	rm -rf build/ops && mkdir -p build/ops
	for turn in 1 2 3 4 5; do \
		OMP_NUM_THREADS=1 PYTHONPATH=build/peers $(BIN)/python -m pytest -q benchmarks/ops --benchmark-quiet \
			--benchmark-json=build/ops/$$turn.json --benchmark-min-rounds=2 --benchmark-max-time=0.4 \
			$$(test $$turn != 1 || echo --memory) $(ARGS); \
	done
	$(BIN)/python -m benchmarks.ops.table build/ops/*.json

bench-report: setup
	$(BIN)/python -m benchmarks.report

# Twenty minutes at most (ARGS="--minutes 10"); exit code 2 where there is no GPU.
bench-gpu: sampler build/peers
	PYTHONPATH=build/peers $(BIN)/python -m benchmarks.gpu $(ARGS)

# For a machine that has torch, triton, transformers and no network: python -m benchmarks.gpu --wheels build/gpu_wheels
GPU_PYTHON ?= 3.12
PIP_FOR_GPU = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade -c constraints.txt \
	--target build/gpu_wheels --python-version $(GPU_PYTHON) --only-binary=:all:

gpu-wheels: setup
	rm -rf build/gpu_wheels
	$(PIP_FOR_GPU) pydantic rich typer lazy-loader pytest hypothesis
	$(PIP_FOR_GPU) --no-deps peft accelerate psutil

# Other libraries' operators, in a folder of their own: what they depend on is what the tested set has already.
build/peers: | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ --no-deps \
		liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 memeff==0.3.1

# The pages in a real browser, which has to be there: Debian calls it chromium-headless-shell.
test-page: setup build/playwright
	$(TEST_ENV) PYTHONPATH=build/playwright $(BIN)/python -m pytest tests/page/check_page.py $(ARGS)

build/playwright: | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ playwright==1.65.2

# SmolLM2 on SVAMP prompts as well: make bench-rollout SVAMP=path/to/svamp_nl.json (about 12 minutes)
bench-rollout: sampler $(if $(SVAMP),models/smollm2)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rollout $(if $(SVAMP),--smollm2 models/smollm2 --data $(SVAMP)) $(ARGS)

SMOLLM2_ON_SVAMP = $(if $(SVAMP),--smollm2 $(or $(SMOLLM2),models/smollm2) --data $(SVAMP))

# On SmolLM2 as well (more than an hour): make bench-step SVAMP=path/to/svamp_nl.json SMOLLM2=folder of an SFT'd model
bench-step: sampler
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step $(SMOLLM2_ON_SVAMP) $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step_growth $(SMOLLM2_ON_SVAMP)
	$(BIN)/python -m benchmarks.predict

# On SmolLM2 as well (many minutes): make bench-peers SVAMP=path/to/svamp_nl.json SMOLLM2=folder of an SFT'd model
# With the published trainers themselves: REPO=path of a clone
bench-peers: sampler build/peers
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=build/peers $(BIN)/python -m benchmarks.peers \
		$(SMOLLM2_ON_SVAMP) $(if $(REPO),--repo $(REPO)) $(ARGS)

test-peers: sampler build/peers
	$(TEST_ENV) PYTHONPATH=build/peers $(BIN)/python -m pytest benchmarks/peers $(ARGS)

# On ReFT's programs for SVAMP: make bench-sandbox SVAMP=path/to/svamp_python_sdp.json
bench-sandbox: setup
	$(BIN)/python -m benchmarks.sandbox --data $(SVAMP)

# ARGS=--one-commit refuses rows that were measured on several commits, or on a changed tree.
readme: setup
	$(BIN)/python scripts/readme_table.py $(ARGS)

models/smollm2: | setup
	$(BIN)/python scripts/fetch_smollm2.py $@

# Machine code of every kernel and configuration for sm_80, sm_90 and sm_100: no GPU, about four minutes.
kernels-aot: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kernels_aot $(ARGS)

# Out-of-bounds accesses, races and reads of unwritten memory. The tool asks for Python 3.12 but runs on 3.11.
kernels-sanitize: setup build/ttsem
	$(TEST_ENV) PYTHONPATH=build/ttsem TRITON_INTERPRET=0 TRITON_DEFAULT_FP_FUSION=1 CARFT_TEST_DEVICE=cuda \
		CARFT_TEST_EXAMPLES=$${CARFT_TEST_EXAMPLES:-6} \
		$(BIN)/python -m ttsem.sanitize pytest tests/ops/test_triton_*.py -q -p no:cacheprovider $(ARGS)

build/ttsem: | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ --no-deps \
		--python-version 3.13 --ignore-requires-python --only-binary=:all: ttsem==0.1.0

# Breaks the kernels one place at a time and counts what the tests notice: about twenty minutes.
kernels-mutate: setup build/ttsem
	$(BIN)/python scripts/mutate_kernels.py $(ARGS)

# In environments of their own, 5 GB each: PyPI's torch brings CUDA's libraries. What they print is in
# docs/compatibility.md. The newest versions are those of the day build/newest was made.
VERSIONS_oldest := torch==2.11.0 triton==3.6.0 numpy==2.3.5
VERSIONS_newest := torch triton numpy
OTHER_ENV = $(TEST_ENV) PYTHONPATH=$(CURDIR):$(CURDIR)/kernels build/$*/bin/python

test-oldest test-newest: test-%: build/%/ready
	@$(OTHER_ENV) -c 'import platform as p, torch, triton, numpy; print(f"torch {torch.__version__}, triton {triton.__version__}, numpy {numpy.__version__}, Python {p.python_version()}")'
	$(OTHER_ENV) -m pytest -q -p no:cacheprovider tests/ops $(ARGS)
	$(OTHER_ENV) -m benchmarks.kernels_aot --only sm_

build/oldest/ready build/newest/ready: build/%/ready:
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check $(VERSIONS_$*) pytest hypothesis safetensors
	touch $@

# Of what .venv holds, from constraints.txt; fails, too, when the advisory database gives no answer.
audit: sampler build/audit/bin/pip-audit
	$(BIN)/python scripts/audit.py build/audit/bin/pip-audit

build/audit/bin/pip-audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1

clean:
	rm -rf .venv runs models build *.egg-info
