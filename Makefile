# Two commands do everything: `make demo` and `make test`. Each makes its own virtual environment,
# builds convoxel (CPU kernels only) and installs what constraints.txt pins.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.py' -o -name '*.pyi')
PIP = PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q

.PHONY: test demo demo-quick bench lint wheel clean

test: $(VENV)/.installed
	$(BIN)/python -m pytest

demo: $(VENV)/.installed
	$(BIN)/convoxel demo

demo-quick: $(VENV)/.installed
	$(BIN)/convoxel demo --quick

bench: $(VENV)/.installed
	$(BIN)/convoxel bench

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt CMakeLists.txt README.md $(SOURCES)
	$(PIP) '.[test]'
	@touch $@

# For those who change convoxel: style, types, and the wheel that users get.
$(VENV)/.dev: $(VENV)/.installed
	$(PIP) ruff mypy types-PyYAML clang-format build
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check python tests examples
	$(BIN)/ruff format --check python tests examples
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp
	$(BIN)/mypy

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build -q -o dist .

clean:
	rm -rf $(VENV) build dist demo-output
