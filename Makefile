# `make test` and `make demo` do everything from a fresh Debian machine on; the other targets are their parts.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
PY := $(CURDIR)/$(VENV)/bin/python
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
KERNELS ?= 6.12 7.3
VM_TIMEOUT_S ?= 7200
DEMO_TIMEOUT_S ?= 600
DURATION ?= 300
FUZZ_S ?= 60
# Files in tests/unit that take a second or more, which `make check` leaves out (`pytest --durations=0` shows them);
# test_docs.py and test_queue_layers.py take as long and stay, because most changes can break what they check.
SLOW_UNIT_TESTS := broker/test_broker_leases.py broker/test_broker_process.py broker/test_broker_questions.py \
    test_admin.py test_admin_patience.py test_async_methods.py test_author_output.py test_backend_process.py \
    test_batches.py test_claim.py test_cow_backend.py test_cow_crash.py test_cow_volumes.py test_cut_store.py test_doctor.py test_doors.py test_ending.py test_examples.py \
    test_exclusive.py test_file_backend.py test_guarded_socket.py test_holder.py test_memory_backend.py \
    test_metrics.py test_metrics_http.py test_metrics_process.py test_nbdkit_plugin.py test_nbdkit_requests.py test_no_descriptors.py test_null_backend.py \
    test_parallel.py test_sdk_ring.py test_sdk_serving.py test_serving_clock.py test_spread.py \
    test_takeover.py test_watched_calls.py
# What `make test-unit` and `make test-sanitized` run, and what `make test-guests` runs beside the last guests.
UNIT_SUITES ?= tests/check tests/sim tests/sources tests/languages tests/screen tests/unit
SANITIZED_SUITES ?= tests/sim tests/unit
BESIDE_GUESTS ?=
# The stamp of the C modules that the sanitizers watch.
SANITIZED := $(VENV)/sanitized/.built
# Files in tests/unit that run none of our C code, and take long.
UNSANITIZED_UNIT_TESTS := test_docs.py test_metrics_process.py test_spread.py
# `make bench`: quick, full, growth, density, doorbell, exact, nbd or rbd; where the numbers go; how many CPUs a guest has.
MODE ?= quick
BENCH_OUT ?= bench/out
BENCH_CPUS ?= 2
BENCH_ARGS ?=
# One boot unless KERNELS was given.
BENCH_KERNELS = $(if $(filter file,$(origin KERNELS)),7.3,$(KERNELS))
BENCH_TIMEOUT_S = $(if $(filter quick nbd rbd,$(MODE)),3600,10800)
BENCH_STEPS = $(if $(filter growth density doorbell,$(MODE)),$(MODE),"measure --mode $(MODE)" $(if $(filter full exact,$(MODE)),growth))
BENCH_GUEST = $(if $(filter exact rbd doorbell,$(MODE)),--exact,--cpus $(BENCH_CPUS))
# What the wheel and the Debian package are made of.
PACKAGED = $(shell find backends bufpool daemon ublk workers src config docs examples debian packaging -type f \
    ! -name '*.pyc' ! -name '*.so' ! -name '*.o' ! -name '_native*.c' ! -name '_engine.c' ! -path '*.egg-info/*') \
    pyproject.toml setup.py MANIFEST.in README.md CHANGELOG.md SECURITY.md
# What `make soak` and `make test-long` set in the tests' environment.
SOAK ?=
VM_TESTS ?= tests/vm
# Of pytest where Python is slow: neither its cache nor a plugin that costs half of its start.
IN_GUEST := -p no:cacheprovider -p no:hypothesispytest
# Extra arguments for pytest, such as PYTEST_ARGS='-k recovery'.
PYTEST_ARGS ?=
NATIVE_SOURCES := $(filter-out bench/%,$(wildcard */csrc/*.[ch] */*/csrc/*.[ch] */_*_build.py */*/_*_build.py))
# What `make lint` reads of C; a file is looked at again when it or a header has changed.
C_SOURCES := $(wildcard */csrc/*.c */*/csrc/*.c tests/fuzz/*.c examples/c/*.c)
C_HEADERS := $(wildcard */csrc/*.h */*/csrc/*.h tests/fuzz/*.h examples/c/*.h)
C_CHECKED := $(C_SOURCES:%.c=$(VENV)/lint/%.o)
C_FLAGS := -std=gnu11 -D_GNU_SOURCE -DUQ_CHECKED $(addprefix -I,$(sort $(dir $(C_HEADERS))))
C_WARNINGS := -Wall -Wextra -Wno-unused-parameter -Wconversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes \
    -Wformat=2 -Wundef -Wpointer-arith -Wwrite-strings -Wvla -Wduplicated-cond -Wlogical-op -Wimplicit-fallthrough
CPUS := $(shell nproc)
export PYTHONPATH := $(CURDIR)/tests
export UBLKPOOL_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)

# The guest shares this machine's root through virtiofsd, which needs root.
AS_ROOT = $(if $(SUDO),$(SUDO) env PATH="$$PATH" HOME="$$HOME" PYTHONPATH="$$PYTHONPATH" UBLKPOOL_CACHE="$$UBLKPOOL_CACHE" UBLKPOOL_KVM="$${UBLKPOOL_KVM-}",)
GUEST = $(AS_ROOT) $(PY) -m support.guest
# One step of the benchmark, where the driver is.
BENCH_STEP = $(PY) -m bench $(1) --revision "$$revision" --host-load "$$load" $(BENCH_ARGS) $(BENCH_OUT)
HAS_DRIVER = [ -w /dev/ublk-control ] && [ "$$(id -u)" = 0 ]

.PHONY: help setup host wheel deb compiled guest lint lint-ruff lint-mypy lint-imports lint-format format check test test-without-clock sanitized-sim named-package test-fast test-unit pictures test-sanitized test-long fuzz package test-guests test-vm test-systemd test-power booted soak demo bench bench-host clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: host $(VENV)/.built ## install what is missing, make .venv, build the C modules

host:
	@tests/support/setup_host.sh

$(VENV)/.python: | host
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"ublkpool needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: set PYTHON=...")'
	@echo "setup: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Without build isolation: the compiler runs often, and need not fetch setuptools each time. Old modules go
# first: one that was built under another file name may come before the new one in Python's search.
$(VENV)/.built: pyproject.toml setup.py $(NATIVE_SOURCES) $(VENV)/.python
	@echo "setup: installing ublkpool and its tools into $(VENV), building the C modules"
	@rm -rf build */_*.so */*/_*.so
	@$(PY) -m pip install -q --disable-pip-version-check 'setuptools>=77' 'cffi>=1.17'
	@UBLKPOOL_CHECKED=1 $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

# A guest's root is read-only: Python there compiles a module at every start unless it was compiled here.
compiled: setup
	@$(PY) -m compileall -q src/ublkpool/* tests
	@# pytest compiles test files in its own way.  Status 5: without the driver it would run none of them.
	@env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest $(IN_GUEST) -q --collect-only tests/vm > /dev/null || [ $$? = 5 ]

guest: setup ## bring the test guest's QEMU and kernels into the cache
	@$(PY) -m support.guest fetch

lint: setup ## ruff, mypy, import-linter; clang-format, compiler warnings and clang-tidy for C
	@$(MAKE) -j$(CPUS) --output-sync=target lint-ruff lint-mypy lint-imports lint-format $(C_CHECKED)

lint-ruff:
	@echo "lint: ruff"; $(VENV)/bin/ruff check .; $(VENV)/bin/ruff format --check .

# One after the other: they share a cache.
lint-mypy:
	@echo "lint: mypy"; $(VENV)/bin/mypy; $(VENV)/bin/mypy tests; $(VENV)/bin/mypy bench

lint-imports:
	@echo "lint: import-linter"; $(VENV)/bin/lint-imports

lint-format:
	@echo "lint: clang-format"; $(VENV)/bin/clang-format --dry-run -Werror $(C_SOURCES) $(C_HEADERS)

$(VENV)/lint/%.o: %.c $(C_HEADERS) .clang-tidy | $(VENV)/.built
	@mkdir -p $(@D)
	@echo "lint: $<"
	@$(VENV)/bin/clang-tidy --quiet $< -- $(C_FLAGS) 2> $@.log || { cat $@.log; exit 1; }
	@gcc $(C_FLAGS) -O2 -Werror $(C_WARNINGS) -c -o $@ $<

format: setup ## let ruff and clang-format rewrite the code's layout
	@$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(C_SOURCES) $(C_HEADERS)

check: setup ## before each commit, in less than a minute: lint and the fast unit tests
	@$(MAKE) -j$(CPUS) --output-sync=recurse lint test-fast

test-fast:
	@echo "test: fast unit tests"
	@$(PY) -m pytest -q -p no:cacheprovider tests/unit $(addprefix --ignore=tests/unit/,$(SLOW_UNIT_TESTS)) $(PYTEST_ARGS)

test: ## everything: lint, unit and sim tests here, also sanitized, fuzzing, vm tests with the driver, systemd, power
	@$(MAKE) lint
	@# A unit or sim test that runs on the sanitized modules does not run on the others as well: `make test-unit` does that.
	@# These tests wait for servers and processes, and what the next ones need is built meanwhile.
	@$(MAKE) -j2 test-unit $(SANITIZED) UNIT_SUITES="tests/check tests/sources tests/languages tests/screen \
	    $(addprefix tests/unit/,$(UNSANITIZED_UNIT_TESTS))"
	@# The simulation and `make test-long` watch Python's own small objects, too.  The wheel is built in the tree, which
	@# guests read.
	@PYTHONMALLOC=pymalloc $(MAKE) -j2 test-sanitized deb SANITIZED_SUITES=tests/unit
	@$(MAKE) compiled
	@$(MAKE) test-guests BESIDE_GUESTS=test-without-clock

# On a busy machine these tests only take longer, several times as long beside the guests: the simulation has a clock of its
# own, and fuzzing and the package tests have no deadline.
test-without-clock:
	@nice -n 5 $(MAKE) -j2 sanitized-sim named-package
	@nice -n 5 $(MAKE) fuzz

# The simulation prints at the same time, so sed passes on whole lines only.
named-package:
	@$(MAKE) package 2>&1 | sed -u 's/^/package: /'

sanitized-sim:
	@$(MAKE) test-sanitized SANITIZED_SUITES=tests/sim PYTEST_ARGS="--timeout 1200 $(PYTEST_ARGS)"

test-unit: setup ## unit and sim tests, `backend check`, the screen of top, backends against real servers and in other languages; no driver and no root needed
	@echo "test: $(UNIT_SUITES)"
	@$(PY) -m support.spread --timeout 240 $(UNIT_SUITES) $(PYTEST_ARGS)

pictures: setup ## draw the documents' pictures and the golden texts of `ublkpool top` anew; look at the difference
	@UBLKPOOL_PICTURES=write $(PY) -m pytest -q -p no:cacheprovider tests/screen/test_top_board.py \
	    tests/screen/test_top_pictures.py tests/screen/test_symptom_pictures.py
	@git --no-pager diff --stat -- docs/pictures tests/screen/golden

$(SANITIZED): $(PACKAGED) tests/support/build_sanitized.sh | setup
	@echo "sanitized: building the C modules"
	@# The stamp has the time at which the build began: make builds again what changes meanwhile.
	@mkdir -p $(@D) && touch $@.begun
	@nice -n 5 tests/support/build_sanitized.sh $(@D)
	@mv $@.begun $@

test-sanitized: setup $(SANITIZED) ## unit and sim tests on C modules that AddressSanitizer and UBSan watch
	@echo "test: $(SANITIZED_SUITES), sanitized"
	@tests/support/test_sanitized.sh $(SANITIZED_SUITES) $(addprefix --ignore=tests/unit/,$(UNSANITIZED_UNIT_TESTS)) $(PYTEST_ARGS)

fuzz: setup ## what other processes send, FUZZ_S seconds in all: descriptors, frames, rings, attach, broker and admin messages
	@echo "fuzz: $(FUZZ_S) s"
	@tests/fuzz/run.sh $(FUZZ_S)

test-long: ## what takes longer than `make test` may, by hand before a release: every vm test on every kernel, a soak of an hour, fuzzing for half an hour
	@$(MAKE) fuzz FUZZ_S=$(if $(filter file,$(origin FUZZ_S)),1800,$(FUZZ_S))
	@$(MAKE) test-unit
	@$(MAKE) test-sanitized
	@$(MAKE) package LONG=1
	@UBLKPOOL_LONG=1 $(PY) -m pytest -m long -o faulthandler_timeout=1200 tests/sources
	@UBLKPOOL_FUZZ_FACTOR=10 UBLKPOOL_SIM_SEEDS=2000 $(PY) -m pytest -o faulthandler_timeout=3600 tests/sim
	@$(MAKE) test-vm SOAK=UBLKPOOL_EVERY_KERNEL=1
	@$(MAKE) test-systemd SOAK=UBLKPOOL_LONG=1
	@$(MAKE) test-power
	@$(MAKE) test-vm SOAK=UBLKPOOL_LONG=1 PYTEST_ARGS="-m long -o faulthandler_timeout=3600" \
	    VM_TESTS="tests/vm/test_vm_ordinary_user.py tests/vm/test_vm_user_namespace.py \
	        tests/vm/test_vm_rbd.py tests/vm/test_vm_rbd_hosts.py tests/vm/test_vm_rbd_trouble.py tests/vm/test_vm_rbd_inside.py \
	        tests/vm/test_vm_optimal_io.py"
	@# Where time is instructions, so that neither the host's load nor emulation is in the times that it compares.
	@$(GUEST) run --kernel $(lastword $(KERNELS)) --exact --timeout $(VM_TIMEOUT_S) -- \
	    env UBLKPOOL_LONG=1 UBLKPOOL_KERNELS="$(KERNELS)" $(PY) -m pytest $(IN_GUEST) \
	    -m long -o faulthandler_timeout=3600 tests/vm/test_vm_rbd_reattach.py
	@$(MAKE) soak DURATION=$(if $(filter file,$(origin DURATION)),3600,$(DURATION))

wheel: dist/.wheel ## the source distribution and the wheel for every Python from 3.11 on, in dist

dist/.wheel: $(PACKAGED) | setup
	@echo "package: building the wheel"
	@rm -rf dist
	@PYTHON=$(PY) packaging/wheel.sh dist
	@touch $@
	@ls dist/*.whl

deb: dist/.deb ## the Debian package, in dist

dist/.deb: dist/.wheel
	@echo "package: building the Debian package"
	@rm -f dist/*.deb
	@PYTHON=$(PY) packaging/deb.sh dist
	@touch $@
	@ls dist/*.deb

package: dist/.deb ## the wheel where there is no compiler, the Debian package in a clean root of Debian 13; with LONG=1 also of 12, in a guest that boots, and lintian
	@echo "test: package"
	@$(if $(LONG),tests/package/setup_host.sh)
	@$(PY) -m support.guest fetch
	@$(AS_ROOT) env $(if $(LONG),UBLKPOOL_LONG=1) PYTHONDONTWRITEBYTECODE=1 \
	    $(PY) -m pytest -p no:cacheprovider -o faulthandler_timeout=$(if $(LONG),6000,1200) tests/package $(PYTEST_ARGS)

test-vm: compiled ## tests with the driver: here if it is loaded and we are root, otherwise in a guest per kernel
	@if $(HAS_DRIVER); then \
	    echo "test: vm, on this machine ($$(uname -r))"; \
	    env $(SOAK) $(PY) -m pytest $(VM_TESTS) $(PYTEST_ARGS); \
	else \
	    $(PY) -m support.guest fetch; \
	    $(MAKE) -j$(words $(KERNELS)) $(addprefix vm-,$(KERNELS)); \
	fi

# Guests wait more than they compute, so all kernels' guests of test-vm run at once.  Beside them run those that boot Debian
# or lose their power, one after the other, with the last kernel: what they show hardly depends on it, and `make test-long` has
# them with each.  With the driver on this machine all run in turn: test-vm, then the others.  Each output line begins with its
# guest.
test-guests: compiled ## test-vm, beside it test-systemd and then test-power with the last kernel; with the driver here all in turn
	@$(PY) -m support.guest fetch
	@if $(HAS_DRIVER); then \
	    $(MAKE) test-vm booted; \
	else \
	    $(MAKE) -j$(words $(KERNELS) booted) $(addprefix vm-,$(KERNELS)) booted; \
	fi

booted:
	@$(MAKE) systemd-$(lastword $(KERNELS))
	@$(MAKE) power-$(lastword $(KERNELS))
	@$(if $(BESIDE_GUESTS),$(MAKE) $(BESIDE_GUESTS))

vm-%:
	@echo "test: vm, in a guest with Linux $*"
	@$(GUEST) run --kernel $* --timeout $(VM_TIMEOUT_S) -- \
	    env $(SOAK) UBLKPOOL_KERNELS="$(KERNELS)" $(PY) -m pytest $(IN_GUEST) $(VM_TESTS) $(PYTEST_ARGS) 2>&1 | sed -u 's/^/$*: /'

# Debian 13's systemd always runs in a guest of its own.
test-systemd: compiled ## the units on a booted Debian 13: restart, deaths, poweroff with dirty data, in guests
	@$(PY) -m support.guest fetch
	@$(MAKE) -j1 $(addprefix systemd-,$(KERNELS))

systemd-%:
	@echo "test: systemd, in a guest with Linux $*"
	@$(AS_ROOT) env $(SOAK) UBLKPOOL_KERNELS=$* UBLKPOOL_ALL_KERNELS="$(KERNELS)" PYTHONDONTWRITEBYTECODE=1 \
	    $(PY) -m pytest -p no:cacheprovider -o faulthandler_timeout=1200 tests/systemd $(PYTEST_ARGS) 2>&1 | sed -u 's/^/systemd $*: /'

test-power: compiled ## a guest that loses its power keeps what FLUSH and FUA promised
	@$(PY) -m support.guest fetch
	@$(MAKE) -j1 $(addprefix power-,$(KERNELS))

power-%:
	@echo "test: power failure, in a guest with Linux $*"
	@$(AS_ROOT) env UBLKPOOL_KERNELS=$* $(if $(UBLKPOOL_SEED),UBLKPOOL_SEED=$(UBLKPOOL_SEED)) PYTHONDONTWRITEBYTECODE=1 \
	    $(PY) -m pytest -p no:cacheprovider -o faulthandler_timeout=1200 tests/power $(PYTEST_ARGS) 2>&1 | sed -u 's/^/power $*: /'

soak: compiled ## processes killed at random under verified I/O, DURATION seconds on each of KERNELS; none may grow in eleven minutes
	@$(MAKE) test-vm VM_TESTS="tests/vm/test_vm_soak.py tests/vm/test_vm_growth.py" \
	    VM_TIMEOUT_S=$$(( 3 * $(DURATION) + 900 )) \
	    PYTEST_ARGS="-o faulthandler_timeout=$$(( 2 * $(DURATION) + 600 )) $(PYTEST_ARGS)" \
	    SOAK="UBLKPOOL_LONG=1 UBLKPOOL_EVERY_KERNEL=1 UBLKPOOL_SOAK_S=$(DURATION) UBLKPOOL_GROWTH_S=$$(( $(DURATION) < 660 ? $(DURATION) : 660 )) UBLKPOOL_SOAK_KILLS=50 UBLKPOOL_SEED=$${UBLKPOOL_SEED:-0}"

demo: compiled ## a short tour on a real driver, here or in a guest
	@if $(HAS_DRIVER); then \
	    $(PY) -m support.demo; \
	else \
	    $(PY) -m support.guest fetch; \
	    colour=0; if [ -t 1 ]; then colour=1; fi; \
	    $(GUEST) run --kernel 7.3 --timeout $(DEMO_TIMEOUT_S) -- \
	        env PYTHONPATH="$$PYTHONPATH" UBLKPOOL_COLOUR=$$colour $(PY) -m support.demo; \
	fi

bench-host:
	@bench/setup_host.sh

$(VENV)/.bench: $(VENV)/.built
	@echo "bench: installing what draws the charts"
	@UBLKPOOL_CHECKED=1 $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev,bench]'
	@touch $@

bench: compiled bench-host $(VENV)/.bench ## peers and ours side by side, MODE=quick, full, growth, density, doorbell, exact, nbd or rbd
	@$(PY) -m compileall -q bench
	@$(PY) -m bench fetch $(BENCH_OUT)
	@$(PY) -m bench cost $(BENCH_OUT)
	@revision=$$(git describe --always --dirty 2> /dev/null || true); status=0; \
	load=$$(cut -d' ' -f1 /proc/loadavg); \
	if [ $(MODE) = exact -o $(MODE) = rbd ] && $(HAS_DRIVER); then \
	    echo "bench: mode $(MODE) is measured in a guest, whatever driver there is here: no machine's time is instructions"; \
	fi; \
	if [ $(MODE) != exact -a $(MODE) != rbd ] && $(HAS_DRIVER); then \
	    for step in $(BENCH_STEPS); do $(call BENCH_STEP,$$step) || status=$$?; done; \
	else \
	    $(PY) -m support.guest fetch; \
	    for kernel in $(BENCH_KERNELS); do \
	        for step in $(BENCH_STEPS); do \
	            $(GUEST) run --kernel $$kernel $(BENCH_GUEST) --timeout $(BENCH_TIMEOUT_S) --rw $(BENCH_OUT) -- \
	                env PYTHONPATH="$$PYTHONPATH" $(call BENCH_STEP,$$step) || status=$$?; \
	        done; \
	    done; \
	fi; \
	$(PY) -m bench report $(BENCH_OUT); \
	exit $$status

clean: ## remove what was built, keep the guest's cache
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache src/*.egg-info */_*.so */*/_*.so */_*.[oc] */*/_*.[oc]
