# From a fresh clone with Python 3.11 and make: `make demo`, `make test`, `make app`.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
# The first run caches bytecode for all later ones: without it every command compiles PyTorch anew, for seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint app bench docs clean

demo: $(STAMP)
	$(BIN)/crowdexit demo

app: $(STAMP)
	$(BIN)/crowdexit app

# A process for each core, with a thread for each process: most tests are too small for more. OpenVINO and ONNX Runtime
# bring thread pools of their own; they get processes of their own, too. What looks at the clock has the machine alone.
APART := tests/runtimes tests/export
TIMED := tests/inference/test_anytime.py tests/inference/test_policies.py tests/video/test_live.py
ABREAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical
test: $(STAMP)
	$(ABREAST) $(patsubst %,--ignore=%,$(APART) $(TIMED))
	$(ABREAST) $(APART)
	$(BIN)/python -m pytest $(TIMED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# The documentation as a site in site/, with the API from the docstrings.
docs: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --group docs
	$(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --group dev -e '.[fast]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
