# From a fresh clone with Python 3.11 and make: `make demo`, `make test`, `make app`.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint app bench clean

demo: $(STAMP)
	$(BIN)/crowdexit demo

app: $(STAMP)
	$(BIN)/crowdexit app

# OpenVINO and ONNX Runtime bring thread pools of their own; they get a process of their own, too.
APART := tests/inference/runtimes tests/inference/test_export.py
test: $(STAMP)
	$(BIN)/python -m pytest $(APART:%=--ignore=%)
	$(BIN)/python -m pytest $(APART)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m benchmarks

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --group dev -e '.[fast]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
