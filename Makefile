# The front door. `make demo` and `make test`, run as root on a fresh machine, do all the set-up
# they need.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# Outside the tree, so that a fresh clone on the same machine builds in a minute or two.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/underpass
export CARGO_TARGET_DIR ?= $(CACHE)/target

RUST_SOURCES := $(shell find dataplane proto -name '*.rs' -o -name '*.toml' -o -name '*.proto' -o -name Cargo.lock 2>/dev/null)

FUZZ_SECONDS ?= 600

.PHONY: setup demo test test-long fuzz lint bench docs clean proto lock help

help: ## What there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed ## Debian packages, the virtual environment, the data plane in release mode

# Two stamps: dependencies change seldom, the project's own binary often.
$(VENV)/.dependencies: requirements.lock tools/setup
	tools/setup $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies pyproject.toml $(RUST_SOURCES)
	tools/install $(VENV)
	touch $@

demo: setup ## Two nodes, six pods, every claim proved, everything removed again
	$(BIN)/underpass demo $(if $(CAPTURE),--capture $(CAPTURE))

test: setup ## Everything that CI runs of tests
	cargo test --manifest-path dataplane/Cargo.toml --workspace --locked
	tools/fuzz 5
	tools/istioctl >/dev/null
	$(BIN)/python -m pytest

test-long: setup ## What takes too long for `make test`: a hundred thousand connections in turn, thirty thousand at once
	UNDERPASS_TEST_LONG=1 $(BIN)/python -m pytest tests/netns/test_recorded_state.py

fuzz: setup ## Every parser of foreign bytes for FUZZ_SECONDS (600) each
	tools/fuzz $(FUZZ_SECONDS)

lint: setup ## ruff, mypy, clippy, rustfmt, shellcheck, fresh generated code
	$(BIN)/python proto/generate.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cargo fmt --manifest-path dataplane/Cargo.toml --all --check
	cargo fmt --manifest-path dataplane/fuzz/Cargo.toml --check
	cargo clippy --manifest-path dataplane/Cargo.toml --workspace --all-targets --locked -- -D warnings
	shellcheck tools/setup tools/install tools/fuzz tools/istioctl .ci/run

bench: setup ## Figures beside no mesh, in one run (bench/README.md)
	$(BIN)/python -m bench

docs: ## The table of compatibility; checks that internal links of the pages hold
	/usr/bin/python3 tools/compatibility.py
	/usr/bin/python3 tools/check_links.py README.md docs bench

proto: $(VENV)/.dependencies ## Generates proto/gen
	$(BIN)/python proto/generate.py

lock: ## Renews the lock files
	tools/lock

clean: ## Removes what the build made in the tree (the cache in ~/.cache/underpass stays)
	rm -rf $(VENV) build dist dataplane/target *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
