# make demo · make test · make bench · make gpu-check OUT=dir · make wheel
# PYTHON=python3.12 chooses the interpreter, MAX_JOBS and CUDA_ARCHS bound the native build.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BIN := $(abspath $(VENV))/bin
JOBS ?= $(shell n=$$(nproc); echo $$((n > 8 ? 8 : n)))
SOURCES = $(wildcard csrc/*/*.cu csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.h)
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -q

.PHONY: demo test bench gpu-check wheel env native host lint pytest format clean
.NOTPARALLEL:

demo: env
	$(RUN) tools/native.py python/fusednorm
	$(RUN) examples/digits.py --out out/demo

# Every rung of the ladder of proof that needs no card.
test: env
	@for rung in lint native host pytest; do \
	  printf '\n== %s\n' $$rung; $(MAKE) --no-print-directory $$rung || exit 1; \
	done

bench: env
	$(RUN) tools/native.py python/fusednorm
	$(RUN) -m fusednorm.bench run --out out/bench.json --save
	$(RUN) -m pytest -q bench

gpu-check:
	@test -n "$(OUT)" || { echo "gpu-check: say where to: make gpu-check OUT=dir"; exit 2; }
	@$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) tools/gpu_check.py --out "$(OUT)"

wheel: env
	FUSEDNORM_NATIVE=1 $(RUN) -m pip wheel -q --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

env:
	@$(PYTHON) tools/setup_env.py $(VENV)

native: env
	FUSEDNORM_NATIVE=1 $(RUN) tools/native.py python/fusednorm

# The kernels on the host: the module for pytest, and a self-test under ASan and UBSan.
host: env
	PATH="$(BIN):$$PATH" cmake -S . -B build/host -G Ninja -DFUSEDNORM_BUILD_NATIVE=OFF \
	  -DFUSEDNORM_BUILD_HOST=ON -DPython3_EXECUTABLE=$(BIN)/python
	$(BIN)/cmake --build build/host
	$(BIN)/ctest --test-dir build/host --output-on-failure

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(SOURCES),$(BIN)/clang-format --dry-run -Werror $(SOURCES))

pytest: env
	@$(RUN) tools/chromium.py
	$(PYTEST) -n $(JOBS) --ignore=tests/gpu tests
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PYTEST) tests/gpu; \
	else echo "tests/gpu did not run: no CUDA device (make gpu-check OUT=dir, where there is one)"; fi

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(SOURCES),$(BIN)/clang-format -i $(SOURCES))

clean:
	rm -rf build dist out *.egg-info python/*.egg-info python/fusednorm/_C.so
