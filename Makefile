# Two commands matter: `make demo` and `make test`. Each sets everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint lowest sanitize arm sweep bench latency coverage figures clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml setup.py $(wildcard pag_retrofit/kernels/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

setup: $(STAMP)  ## create .venv and install the package with its development tools

demo: $(STAMP)  ## train, retrofit and gate a small network on rendered scenes; save pictures
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## install and run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Old packages warn about newer ones below them: warnings are not errors here.
LOWEST := .venv-lowest

lowest:  ## the tests with the oldest versions that pyproject.toml allows
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	sed -n 's/^    "\([^"]*\)>=\([^"]*\)",/\1==\2/p' pyproject.toml > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[dev]' --constraint $(LOWEST)/lowest.txt
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal \
		--override-ini filterwarnings=default

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1

sanitize: $(STAMP)  ## the tests of the kernels under the address and undefined-behaviour sanitizers
	PAG_RETROFIT_CXXFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build_ext \
		--build-lib build/sanitize --build-temp build/sanitize/objects
	OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		PAG_RETROFIT_KERNELS="$$(ls $(CURDIR)/build/sanitize/pag_retrofit/kernels/_kernels*.so)" \
		$(BIN)/python -m pytest tests/test_kernels.py -p no:cacheprovider

ARM := -std=c++17 -O3 -static -pthread -fno-math-errno -fno-trapping-math -fno-signed-zeros \
	-ffp-contract=fast -fno-tree-vectorize -fno-tree-slp-vectorize -DPAG_INSTRUCTION_SET=portable

arm: $(STAMP)  ## the tests of the kernels on ARM, emulated; g++-aarch64-linux-gnu and qemu-user
	mkdir -p build/arm
	aarch64-linux-gnu-g++ $(ARM) -o build/arm/runner tests/runner.cpp pag_retrofit/kernels/src/*.cpp
	OMP_NUM_THREADS=1 PAG_RETROFIT_RUNNER="qemu-aarch64 $(CURDIR)/build/arm/runner" \
		$(BIN)/python -m pytest tests/test_kernels.py -k emulated -p no:cacheprovider

sweep: $(STAMP)  ## the long tests over many networks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m sweep

bench: $(STAMP)  ## the CamVid evidence: PAG_DATA and PAG_WEIGHTS name the data, about 90 minutes
	$(BIN)/pag-retrofit finetune recipes/camvid_mobilenetv2.yaml
	$(BIN)/python benchmarks/camvid.py runs/camvid_mobilenetv2
	$(BIN)/python benchmarks/readme.py

latency: $(STAMP)  ## deployed networks beside every dense runtime; leave the machine alone
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/readme.py

coverage: $(STAMP)  ## try every CNN family of timm and SMP; hours, goes on where it was
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --jobs 2 --deployed
	$(BIN)/python benchmarks/coverage_page.py

figures: $(STAMP)  ## write the tables of README and docs anew from benchmarks/results
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/coverage_page.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(LOWEST) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
