# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
CODE := kvshare cli recipes tests benchmarks docs
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# glibc keeps what was freed: giving pages back and getting them again takes a seventh of the tests' time
KEEP := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456

.PHONY: demo test lint types unit docs notebooks clean

demo: $(INSTALLED)
	$(BIN)/kvshare convert kvshare/tiny -o demo-out --calibration-tokens 16384 --heal-tokens 65536 --eval-tokens 16384 --overwrite
	$(BIN)/kvshare verify demo-out

test: lint types unit docs notebooks demo

lint: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(KEEP) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict --quiet

notebooks: $(INSTALLED)
	$(BIN)/python -m jupyter execute --timeout 1800 $(NOTEBOOKS)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mlx]' || echo 'mlx-lm is not checked here'
	touch $@

clean:
	rm -rf .venv demo-out demo-out.kvshare-work build site *.egg-info
