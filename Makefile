# `make demo` and `make test` do all the set-up on a fresh Debian or Ubuntu with rustup.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help packages test-packages build everything demo test e2e bench model sim verify fix

CARGO ?= cargo
# One profile for everything that links RocksDB, so that it is compiled once.
RELEASE := --release
NAVE := target/release/nave

help: ## what there is to make
	@grep -E '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

packages: ## install the build packages that are missing (Debian and Ubuntu)
	@tools/packages.sh

test-packages: # and those that the tests run
	@tools/packages.sh test

# The whole workspace is named here and below, since features of shared crates differ by what is asked for: so nothing
# is compiled once for the binary and again for the tests.
build: packages ## build the one binary, target/release/nave
	$(CARGO) build $(RELEASE) --locked --workspace --bin nave --bin hello

everything: test-packages ## build the binary, the tests and the measurements
	$(CARGO) build $(RELEASE) --locked --workspace --all-targets

demo: build ## a tour of the main job that ends by itself and cleans up
	@tools/demo.sh $(NAVE) target/release/hello

test: everything ## unit tests, property tests, and real clusters on loopback
	$(CARGO) test $(RELEASE) --locked --workspace

e2e: everything ## only the tests that start real clusters
	$(CARGO) test $(RELEASE) --locked --workspace --test e2e

bench: everything ## measurements for docs/performance.md (about 10 minutes)
	target/release/nave-bench all

model: everything ## 100,000 histories each of deployments and of a host; `RUNS=1000 make model` for fewer
	NAVE_MODEL_RUNS=$${RUNS:-100000} $(CARGO) test $(RELEASE) --locked --workspace --test decide any_deployment
	PROPTEST_CASES=$${RUNS:-100000} $(CARGO) test $(RELEASE) --locked --workspace --test model

sim: ## 100,000 seeded worlds through hub and agent; `SEEDS=1000 make sim` for fewer
	$(CARGO) run $(RELEASE) --locked -p nave-sim -- --seeds $${SEEDS:-100000}

verify: packages ## what a change must pass; writes nothing to the tree
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(RELEASE) --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(RELEASE) --locked --workspace --no-deps
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check bans licenses sources; \
	else echo "cargo-deny is not installed: licences and sources were not checked"; fi
	@for crate in nave-orchestrator-core nave-agent-core nave-keeper; do \
	  if $(CARGO) tree --locked -p $$crate -e normal -i tokio 2>/dev/null | grep -q tokio; then echo "$$crate depends on tokio"; exit 1; fi; done

fix: ## format and apply what clippy can mend by itself
	$(CARGO) fmt --all
	$(CARGO) clippy $(RELEASE) --workspace --all-targets --fix --allow-dirty --allow-staged
