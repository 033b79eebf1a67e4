# `make demo` and `make test` set everything up by themselves; see README.md.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
DOCS_STAMP := $(VENV)/.installed-docs
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h)
# modules are compiled when they are first imported, not all of them now: half the time
INSTALL := $(RUN) -m pip install --disable-pip-version-check --quiet --no-compile -c $(CONSTRAINTS)

.PHONY: demo test test-all lint bench bench-compare gpu resources launches mutants \
	sanitize docs dist hub clean

demo: $(DEMO_STAMP)  ## two students side by side, then DEMO="--seed 2"
	$(RUN) -m optima_fast.demo $(DEMO)

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile

test: lint  ## what has to pass before a commit; a process a core
	$(PYTEST) -m 'not slow'

test-all: lint  ## and what is slow: more sizes of what `make test` covers
	$(PYTEST)
	$(MAKE) resources mutants sanitize

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

REFERENCE ?= build/reference.json

bench: $(STAMP)  ## losses and bandit against what people write, then the policies' worlds
	$(RUN) -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds $(BENCH)
	$(RUN) bench/bench_worlds.py

bench-compare: $(STAMP)  ## an error where ours became slower than in REFERENCE, beside the others
	@test -f $(REFERENCE) || { echo "REFERENCE: no file $(REFERENCE); record one first:" \
		"pytest bench --benchmark-only --benchmark-json=$(REFERENCE)"; exit 2; }
	mkdir -p build
	$(RUN) -m pytest bench -q --benchmark-only --benchmark-json=build/bench.json $(BENCH)
	$(RUN) bench/report.py build/bench.json --against $(REFERENCE)

gpu:  ## checks and benches on a CUDA device, then GPU="--call 2"; takes PYTHON as it is
	PYTHONPATH=. $(PYTHON) bench/gpu.py $(GPU)

resources: $(STAMP)  ## registers, spills and shared memory of every kernel, without a GPU
	PYTHONPATH=. $(RUN) tests/kernels/resources.py

launches: $(STAMP)  ## host time of every kernel's launch by Triton and by the extension, without a GPU
	mkdir -p build/driver
	$(CC) -shared -fPIC -w -o build/driver/libcuda.so.1 tests/kernels/stub_driver.c
	LD_LIBRARY_PATH=build/driver PYTHONPATH=. $(RUN) tests/kernels/launches.py build/driver \
		--layers 12 --rounds 200 $(LAUNCHES)

mutants: $(STAMP)  ## planted faults, each of which a test must catch
	$(RUN) tests/mutants.py

sanitize: $(STAMP)  ## the bandit's tests on an extension built with ASan and UBSan
	PYTHON=$(abspath $(RUN)) sh csrc/sanitize.sh

docs: $(DOCS_STAMP)  ## the site, in build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build -f docs/mkdocs.yml

dist: $(STAMP)  ## sdist and wheel
	$(RUN) -m build

hub: $(STAMP)  ## a repository for Hugging Face's kernels, then HUB="--repo OWNER/optima-fast"
	$(RUN) kernels/hub/lay_out.py build/hub $(HUB)

clean:
	rm -rf $(VENV) build dist *.egg-info optima_fast/*.so .mypy_cache .pytest_cache .ruff_cache

$(DEMO_STAMP): $(SOURCES)  # what the demo needs, a third of what the tests do
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[train]'
	touch $@

$(DOCS_STAMP): $(DEMO_STAMP) docs/requirements.txt
	$(INSTALL) -r docs/requirements.txt
	touch $@

$(STAMP): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $@ $(DEMO_STAMP)
