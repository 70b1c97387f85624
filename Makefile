# Two commands set everything up on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
CARRY ?= build/gpu-results
CACHE ?= build/gpu-cache.tar.xz
TRITON_PYTHON ?= $(BIN)/python
# Python bindings of both ends of what is supported, which a test holds our calls against; the
# libraries behind them are not in the package index
TENSORRT_BINDINGS := tensorrt-cu12-bindings==10.0.1 tensorrt-cu13-bindings==10.16.1.11 tensorrt-cu13-bindings==11.4.0.106

.PHONY: run test install dev lint types unit interpret bench report pictures zoo soak docs dist gpu gpu-first gpu-second gpu-cache kernels clean

run: install  ## install, then the main job: photographs through ResNet-50, digits through trained nets
	$(BIN)/python examples/main_job.py

test: dev lint types interpret unit  ## install [dev], then lint, types and every test

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/pyvenv.cfg setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed Makefile
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	for one in $(TENSORRT_BINDINGS); do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/tensorrt-bindings/$$one $$one \
		|| echo "$$one is not to be had here: its test is left out"; done
	touch $@

install: $(VENV)/.installed

dev: $(VENV)/.dev

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev  ## mypy does not follow setup.py's package_dir: give it a tree of links that it can
	rm -rf build/types && mkdir -p build/types/fastres
	ln -sfn $(CURDIR)/fastres/* build/types/fastres/
	ln -sfn $(CURDIR)/kernels build/types/fastres/kernels
	ln -sfn $(CURDIR)/calib build/types/fastres/calib
	$(BIN)/mypy --config-file pyproject.toml -p fastres

# Triton's interpreter and its compiler cannot share a process, so there are two runs of pytest.
# Each file stays with one of two workers, which share what its tests have made. tests/conftest.py
# says which files are long: they are begun first.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
interpret: dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(TWO_WORKERS) -m interpret

unit: dev
	$(BIN)/python -m pytest -q $(TWO_WORKERS) -m 'not interpret'

# bf16 only where the processor has it
FLOATS := fp32$(shell grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo ,bf16)
PRECISIONS := $(FLOATS),int8

bench: dev  ## ours and peers on ResNet-50, interleaved
	$(BIN)/fastres bench fastres:resnet50 --precision $(PRECISIONS) --batch-size 1,8

report: dev  ## everything that a report shows, measured afresh: about half an hour, into build/report
	mkdir -p build/report
	$(BIN)/fastres bench fastres:resnet50 --precision $(PRECISIONS) --batch-size 1,8 --layers -o build/report/peers.json
	$(BIN)/fastres bench fastres:resnet50@v1 fastres:resnet50@v1.5 --precision $(PRECISIONS) --batch-size 1,8 --peers none -o build/report/versions.json
	$(BIN)/python -m bench.cpu.scaling --precision $(FLOATS) -o build/report/scaling.json
	$(BIN)/python -m bench.accuracy --quick -o build/report/accuracy.json
	$(BIN)/python -m bench.accuracy --parity --depths 18,50 -o build/report/parity.json
	$(BIN)/fastres report build/report/*.json -o build/report/report.html

pictures: dev  ## of README and docs: charts of committed results, and ResNet-50 as it runs here
	mkdir -p build
	$(BIN)/fastres report bench/results/peers.json -o build/report.html --pictures docs/pictures
	$(BIN)/fastres profile fastres:resnet50 --pictures docs/pictures

zoo: dev  ## whether timm's residual networks compile and agree: a table, an hour
	mkdir -p build
	$(BIN)/python bench/zoo.py -o build/zoo.json | tee build/zoo.txt

soak: dev  ## damaged files, forged engines, killed savers, leaks: by ten thousands, an hour
	$(BIN)/python -m bench.soak.files
	$(BIN)/python -m bench.soak.saving
	$(BIN)/python -m bench.soak.leaks
	$(BIN)/python -m bench.soak.engines
	$(BIN)/python -m bench.soak.engines --calls 0.9
	$(BIN)/python -m bench.soak.parts
	$(BIN)/python -m bench.soak.parts --interpret

CACHED = $(if $(wildcard $(CACHE)),--cache $(CACHE))

gpu-cache:  ## without a GPU: what the short runs launch, compiled into CACHE with the Triton of TRITON_PYTHON
	$(TRITON_PYTHON) -m bench.gpu.cache -o $(CACHE)

gpu:  ## on a machine with an NVIDIA GPU: right first, then tuned, then how fast; results in build/gpu
	$(PYTHON) -m bench.gpu --out build/gpu --carry $(CARRY) $(CACHED)

gpu-first:  ## there, in four minutes: is it right, and where does the time go? results in CARRY
	$(PYTHON) -m bench.gpu --plan first --out build/gpu --carry $(CARRY) $(CACHED)

gpu-second:  ## after it, in seven: the rest tuned, every test, and speed beside PyTorch's own
	$(PYTHON) -m bench.gpu --plan second --out build/gpu --carry $(CARRY) $(CACHED)

kernels: dev $(OLDEST)/.installed  ## every kernel of whole networks for sm_80 to sm_120; no GPU
	$(BIN)/python -m bench.kernels --out build/kernels.json
	$(OLDEST)/bin/python -m bench.kernels --out build/kernels-oldest.json

$(OLDEST)/.installed: setup.py pyproject.toml  ## the oldest PyTorch that is supported, and its Triton
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --editable . 'torch==2.11.*'
	touch $@

docs: dev  ## the site, into build/site; a warning, a dead link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: dev  ## sdist and wheel into dist/, checked as the package index does
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
