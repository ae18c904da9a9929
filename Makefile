# SPDX-License-Identifier: Apache-2.0
#
# `make help` lists the targets. A build needs only Go; `make generate` needs
# clang; `make test` and `make run` install what they need on Debian.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO          ?= go
CLANG       ?= clang-19
STRIP       ?= llvm-strip-19
CLANG_FORMAT ?= clang-format-19
VERSION     ?= $(shell packaging/scripts/version.sh)
LDFLAGS     := -s -w -X main.version=$(VERSION)
SCOPE       ?= all
FUZZTIME    ?= 20s
export CGO_ENABLED ?= 0

.DEFAULT_GOAL := help

## help: list the targets
.PHONY: help
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST) | awk -F': ' '{ printf "  %-18s %s\n", $$1, $$2 }'

## build: the binary for this machine, in bin/
.PHONY: build
build:
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/edr-sensor ./cmd/edr-sensor

## run: build, start a private Redis and the sensor, show the host's events live (root); SCOPE=tree for this shell's only
.PHONY: run
run: build
	@packaging/scripts/run.sh $(SCOPE)

## test: every test on the real kernel and a real Redis (root installs what is missing)
.PHONY: test
test: deps lint
	CGO_ENABLED=1 $(GO) test -race -timeout 40m ./internal/e2e ./transport $$($(GO) list ./... | grep -v /internal/vmtest) # the longest first
	$(GO) -C bench test ./...
	$(GO) test -count=1 -timeout 45m ./internal/vmtest # alone: emulated kernels want the whole machine

## test-vm: the kernel programs' tests on every supported kernel, in virtual machines; KERNEL=6.1 (or 6.12-arm64) for one only
.PHONY: test-vm
test-vm: deps
	KERNEL=$(or $(KERNEL),all) $(GO) test -count=1 -v -timeout 45m -run TestVM ./internal/vmtest

## test-systemd: the packages' lives on Debian 11, 12 and 13 under systemd, in virtual machines (root); RELEASE=bookworm-rpm for one only
.PHONY: test-systemd
test-systemd: deps
	RELEASE=$(or $(RELEASE),all) $(GO) test -count=1 -v -timeout 45m -run 'TestVM$$' ./internal/vmtest

## test-short: the tests that need neither root nor servers, quickly
.PHONY: test-short
test-short:
	$(GO) test -short ./...

## test-long: the whole of the buffer's proofs of which make test runs a share: a million operations, 1,200 kills, 12,000 power cuts (root)
.PHONY: test-long
test-long: deps
	EDR_LONG=1 $(GO) test -count=1 -v -timeout 60m -run '^Test(Model|Kill|PowerCut)$$' ./buffer

## fuzz: every fuzz target for FUZZTIME each
.PHONY: fuzz
fuzz:
	@for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
	    echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p; \
	  done; \
	done

## bench: decode, enrich, encode, append, deliver and the whole sensor, with ratios against the raw limits
.PHONY: bench
bench: deps
	$(GO) test -run "^$$" -bench . -benchmem ./...
	EDR_FOOTPRINT=1 $(GO) test -count=1 -v -run 'Test(Service)?Footprint' ./internal/e2e
	$(MAKE) bench-buffer

## bench-buffer: the buffer beside others, into docs/buffer.md, from where the last run was ended; BENCH=-fresh anew
.PHONY: bench-buffer
bench-buffer:
	$(GO) -C bench run . -docs ../docs $(BENCH)

## bench-fleet: what many sensors cost a Redis and how they come back to it, into docs/operations.md; FLEET="-sensors 10,10000"
.PHONY: bench-fleet
bench-fleet: deps
	$(GO) -C bench run ./fleet -docs ../docs $(FLEET)

## soak: 30 minutes of every fault and failover at 5,000 events a second, and the long forms of the proofs of exactly-once delivery
.PHONY: soak
soak: deps
	EDR_LONG=1 $(GO) test -count=1 -v -timeout 60m -parallel 4 -run 'TestT[0-9]|TestModel|TestSoak|TestCompatibility' ./transport

## generate-compatibility: run the proofs against the servers of other Debian suites, and write docs/compatibility.md
.PHONY: generate-compatibility
generate-compatibility: deps
	$(GO) test -count=1 -v -timeout 25m -run TestCompatibility ./transport -args -update

## test-storm: 20 minutes of events under the shipped unit, with Redis down and up (root)
.PHONY: test-storm
test-storm: deps
	EDR_LONG=1 $(GO) test -count=1 -v -timeout 60m -run TestServiceStorm ./internal/e2e

## lint: formatting, vet, staticcheck, golangci-lint (import rules), drift of go.mod
.PHONY: lint
lint:
	@test -z "$$($(GO) tool gofumpt -l . | tee /dev/stderr)" || { echo 'run: make format' >&2; exit 1; }
	$(GO) vet ./...
	$(GO) tool -modfile=golangci.mod golangci-lint run ./...
	$(GO) mod tidy -diff
	$(GO) -C bench vet ./...
	$(GO) -C bench mod tidy -diff
	cd bench && $(GO) tool -modfile=../golangci.mod golangci-lint run --config ../.golangci.yml ./...

## format: rewrite Go and C sources in the project's format
.PHONY: format
format:
	$(GO) tool gofumpt -w .
	$(CLANG_FORMAT) -i bpf/*.c bpf/*.h

## generate: compile the BPF objects (needs clang) and write docs/events.md and docs/decisions.md
.PHONY: generate
generate:
	$(GO) generate ./bpf
	$(GO) test -count=1 ./sensor/ocsf ./sensor/event -run "Docs|Golden" -args -update

## generate-metrics: write docs/metrics.md from a running sensor (root)
.PHONY: generate-metrics
generate-metrics: deps
	$(GO) test -count=1 ./internal/e2e -run TestMetrics -args -update

## generate-coverage: write docs/coverage.md from the kernels' tests; KERNEL=6.1 for that one's part
.PHONY: generate-coverage
generate-coverage: deps
	KERNEL=$(or $(KERNEL),all) $(GO) test -count=1 -timeout 25m -run 'TestVM$$' ./internal/vmtest -args -update

## screens: write the screens in README.md from a running sensor (root)
.PHONY: screens
screens: deps
	$(GO) test -count=1 ./internal/e2e -run TestScreens -args -update

## generate-costs: measure what the programs take on each kernel, and write docs/costs.md; KERNEL=6.1 for that one's part
.PHONY: generate-costs
generate-costs: deps
	KERNEL=$(KERNEL) $(GO) test -count=1 -timeout 25m -run TestVMCosts ./internal/vmtest -args -update

## check-generated: fail when the committed BPF objects differ from their sources
.PHONY: check-generated
check-generated:
	$(GO) generate ./bpf
	$(CLANG_FORMAT) --dry-run --Werror bpf/*.c bpf/*.h
	git diff --exit-code -- bpf

## deps: install the tools that tests need, when they are missing (Debian, root)
.PHONY: deps
deps:
	@packaging/scripts/deps.sh

## packages: deb and rpm for amd64 and arm64 with their SBOMs, in dist/; ARCH=amd64 for one only
.PHONY: packages
packages:
	@VERSION='$(VERSION)' packaging/scripts/packages.sh $(ARCH)

## lint-packages: build the packages and hold them against the rules of Debian and Fedora, and the lists of their files
.PHONY: lint-packages
lint-packages: deps
	$(GO) test -count=1 ./packaging/...

## clean: remove what the targets above made
.PHONY: clean
clean:
	rm -rf bin dist
