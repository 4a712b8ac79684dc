# Targets for people; README.md says when to use which.

CARGO_TEST = cargo test --release --workspace
ARGS ?=

.PHONY: run reference test test-long test-gpu bench bench-setup fuzz kernels setup optional-models build clean gpu-bundle gpu-check packaged deb tarball

## Two context workers, a generation worker and the router with a real model; prints an answer, stays up.
run: build
	@exec target/release/baton-up config/cluster.toml --try $(ARGS)

## The whole suite.
test: build optional-models
	$(CARGO_TEST)

## The long matrices too.
test-long: build optional-models
	$(CARGO_TEST)
	$(CARGO_TEST) --test it -- --ignored
	$(CARGO_TEST) --test manual -- --ignored --nocapture
	$(CARGO_TEST) --lib -- --ignored --nocapture --test-threads=1 long_

## The pages of docs/src/reference that hold programs' output, or tables of the code, written anew.
reference: build
	BATON_WRITE=1 $(CARGO_TEST) --test manual -- commands
	BATON_WRITE=1 $(CARGO_TEST) --test it -- observability::reference

## Hand-overs from and to the memory of this machine's first GPU.
test-gpu:
	$(CARGO_TEST) --lib -- --ignored --nocapture --test-threads=1 gpu_
	BATON_TEST_POOL_PLACE=cuda:0 $(CARGO_TEST) --lib -- --nocapture --test-threads=2 handover::nixl::tests

## The CPU engine beside llama.cpp, as tables of ratios: under 10 minutes, after building llama.cpp once.
## ARGS="engine --rounds 5" for a part, ARGS="--ik-llama DIR" for one more peer, ARGS=--help for all there is.
bench: build bench-setup
	@cargo bench --workspace --bench cpu -- $(ARGS)

## llama.cpp for this processor, into .deps.
bench-setup: setup
	@integration/benches/llama-cpp.sh

## The readers of untrusted files under libFuzzer, FUZZ_SECONDS each.
FUZZ_SECONDS ?= 600
fuzz: setup
	@integration/fuzz/run.sh $(FUZZ_SECONDS)

## PTX of the GPU kernels, and the registers they may use. ARGS="attention" for one source, ARGS=--check to compare only.
kernels:
	@for cu in workerd/kernels/*.cu; do for target in $$(sed -n 's,^// Targets:,,p' $$cu); do \
		ptx=workerd/kernels/ptx/$$(basename $$cu .cu).$$target.ptx; [ -e $$ptx ] || touch $$ptx; done; done
	@integration/setup.sh --tools
	@cargo build --quiet --release --workspace --bin kernels
	@target/release/kernels $(ARGS)

## A folder that needs only an NVIDIA driver and checks the CUDA back end there: target/gpu-bundle/gpu-check.
gpu-bundle: build
	@integration/gpu-bundle.sh

## The same, and runs it here. ARGS="--parts numbers,steps" for a part. Exit code 3: there is no GPU.
gpu-check: gpu-bundle
	@target/gpu-bundle/gpu-check $(ARGS)

## Debian packages, into target/dist; needs dpkg-dev. PROFILE=release for the binaries of `make build`, REVISION=2 for the next.
## QUICK=1 for little compression.
deb: packaged
	@PROFILE=$(PROFILE) integration/packages/build.sh deb

## One archive that runs wherever it is unpacked, into target/dist; needs zstd. The same variables.
tarball: packaged
	@PROFILE=$(PROFILE) integration/packages/build.sh tarball

# The binaries that are shipped, and what makes their manuals. Those of `dist` know their commit; others would be built anew for each.
PROFILE ?= dist
COMMIT = $(shell git rev-parse --short HEAD 2>/dev/null)
packaged: setup
	@cargo build --release --workspace --bin manuals
	@$(if $(and $(filter dist,$(PROFILE)),$(COMMIT)),BATON_GIT_HASH=$(COMMIT)) cargo build --profile $(PROFILE) --workspace --bin baton-router --bin baton-workerd --bin baton-up --bin baton-client

## What a build and a run need beyond the toolchain, into .deps.
setup:
	@integration/setup.sh

## Models that some tests use, where they can be had; else these tests are skipped by name.
optional-models: setup
	@integration/optional-models.sh

build: setup
	@cargo build --release --workspace --bins

clean:
	cargo clean
	rm -rf .deps
