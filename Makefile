# The two that matter: `make demo` and `make test`. Both set up .venv first, on a machine that has Python and, for the
# fast kernels, a C++ compiler. PYTHON chooses the interpreter, MAX_JOBS how many compilers run at once.

PYTHON   ?= python3
MAX_JOBS ?= 2
export MAX_JOBS

VENV        := .venv
IN_VENV     := $(VENV)/bin/python
DEPENDABLE  := $(VENV)/dependencies-installed
LINKED      := $(VENV)/package-linked
INSTALLED   := $(VENV)/native-module-built
SANITIZED   := build/sanitize
CPP_SOURCES := $(wildcard csrc/*.h csrc/*/*)

# Tests that run on a GPU, and those of the code that launches there; not every combination of everything.
GPU_TESTS   ?= cuda-triton or test_gpu or test_triton_launch

# Headers for the CUDA convolution. The package also asks for a CUDA toolkit in Python and more, which headers do not need.
CUTLASS := nvidia-cutlass==4.2.0.0

# With a compiler a build that fails is an error; without one the package goes on in plain PyTorch and says so.
REQUIRE_NATIVE := $(if $(shell command -v $${CXX:-c++}),1,0)

.DELETE_ON_ERROR:
.PHONY: demo test bench gpu lint sanitize clean

demo: $(INSTALLED)
	$(IN_VENV) -m chainzrule_kernels validate
	$(IN_VENV) -m chainzrule_kernels demo

test: $(INSTALLED)
	$(IN_VENV) -m pytest -q -n 2 --dist worksteal tests

bench: $(INSTALLED)
	$(IN_VENV) -m chainzrule_kernels bench $(if $(QUICK),--quick) --report bench-report

# Everything on a GPU in one go, in under ten minutes; the short table comes last. Where PyTorch is installed already:
# make gpu IN_VENV=python3 INSTALLED=, with CHAINZRULE_KERNELS_CUTLASS_DIR if nvidia-cutlass is not installed.
gpu: $(INSTALLED)
	$(IN_VENV) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: PyTorch sees no GPU')"
	$(IN_VENV) setup.py -q build_ext --inplace
	CHAINZRULE_KERNELS_COMPILE_AHEAD=0 $(IN_VENV) -m chainzrule_kernels validate --quick --device cuda --backend triton
	CHAINZRULE_KERNELS_COMPILE_AHEAD=0 $(IN_VENV) -m pytest -q -n 8 --dist loadgroup tests -k '$(GPU_TESTS)'
	$(IN_VENV) -m bench.gpu

lint: $(DEPENDABLE)
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	$(IN_VENV) -m mypy

# The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the installed one. Leaks are not looked for:
# Python and torch keep memory until the process ends. Tests that start compilers or other processes test nothing here, nor do
# those of Triton, and those of what lies beside the package would not find it.
NOT_SANITIZED   := packaging demo cli compile triton_compiled triton_interpreter triton_launch cuda_compiled cuda_convolution \
    distributed bench bench_report studies studies_training image_examples
SANITIZED_TESTS := $(NOT_SANITIZED:%=--ignore=tests/test_%.py) -k 'not compile and not export and not process'
UNDER_SANITIZERS = ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib \
    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
    $(CURDIR)/$(IN_VENV)
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)/lib $(SANITIZED)/tests
	CHAINZRULE_KERNELS_SANITIZE=1 CHAINZRULE_KERNELS_REQUIRE_NATIVE=1 \
	    $(IN_VENV) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	cp -R tests $(SANITIZED)/tests
	cd $(SANITIZED) && $(UNDER_SANITIZERS) -c \
	    "import chainzrule_kernels as ck; assert 'sanitizers' in ck._native.cpu.built_for(), ck._native.cpu"
	cd $(SANITIZED) && $(UNDER_SANITIZERS) -m pytest -q -n 2 --dist worksteal -c $(CURDIR)/pyproject.toml \
	    --rootdir=. -p no:cacheprovider $(SANITIZED_TESTS) tests

clean:
	rm -rf $(VENV) build dist demo-output bench-report *.egg-info chainzrule_kernels/*.so
	rm -rf .pytest_cache .hypothesis .benchmarks .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and the package is built without isolation, so that it is compiled against this torch.
$(DEPENDABLE): constraints.txt
	@echo "Installing torch and the other pinned packages into $(VENV)"
	test -x $(IN_VENV) || $(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install --quiet -r constraints.txt
	$(IN_VENV) -m pip install --quiet --no-deps $(CUTLASS)
	@touch $@

$(LINKED): $(DEPENDABLE) pyproject.toml
	CHAINZRULE_KERNELS_NO_NATIVE=1 \
	    $(IN_VENV) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[demo,bench,test,dev]'
	@touch $@

# In place and not by pip, which compiles every file anew when one has changed.
$(INSTALLED): $(LINKED) setup.py $(CPP_SOURCES)
	@echo "Compiling the native modules"
	CHAINZRULE_KERNELS_REQUIRE_NATIVE=$(REQUIRE_NATIVE) $(IN_VENV) setup.py -q build_ext --inplace
	@touch $@
