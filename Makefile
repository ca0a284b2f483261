# make demo: the quickstart on this machine.  make test: lint, types, layers, tests, docs.
# make docs: the site of docs/, in site/.
# make kernels-wheel: a wheel with compiled GPU kernels (nvcc); ARCHS="80 90a" PLATFORM=linux_x86_64.
# make package: wheel and sdist, checked.  make audit: known vulnerabilities (network).
# All make .venv first. PYTHON=python3.12 chooses the interpreter it is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
ARCHS ?= 80 86 89 90a 100 120
PLATFORM ?= linux_x86_64
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test docs package kernels-wheel audit clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/compress run examples/quickstart.yaml --overwrite

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks
	$(BIN)/lint-imports
	$(MKDOCS) build --strict --quiet
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

docs: $(VENV)/.dev
	$(MKDOCS) build --strict

package: $(VENV)/.release
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

kernels-wheel: $(VENV)/.release
	rm -rf compress/runtime/prebuilt build
	$(BIN)/python -m compress.runtime.w6a8.build $(ARCHS) --into compress/runtime/prebuilt
	$(BIN)/python -m build --wheel --outdir dist -C--build-option=--plat-name=$(PLATFORM) .
	rm -rf compress/runtime/prebuilt build

audit: $(VENV)/.release
	$(BIN)/pip-audit --local --skip-editable

# Each stamp is newer than all it was made from, so a second call installs nothing.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.release: $(VENV)/.dev
	$(PIP) install --constraint constraints.txt --editable '.[release]'
	touch $@

# torch first and alone: resolved with the rest, pip may take another build of it.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(PIP) install '$(TORCH)' 'setuptools>=77' wheel
	touch $@

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' found; \
	install Python 3.10 or newer, or call: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "error: $$($(PYTHON) --version 2>&1) is too old; Python 3.10 or newer is needed. \
	Call: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) \
	cannot make virtual environments; install its venv module (Debian, Ubuntu: \
	apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
