# make demo and make test do all the set-up that they need.

PREFIX  ?= /usr/local
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
GO      ?= go
BIN     := bin/kmsfs
FUZZ    ?= 100000

DIST    ?= dist

.PHONY: build install release demo test test-shared soak lint bench deps deps-test fuzz

build:
	$(GO) build -ldflags '-X main.version=$(VERSION)' -o $(BIN) ./cmd/kmsfs

# The helpers are what mount(8) and umount(8) call for fuse.kmsfs in fstab.
install: build
	install -D -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/kmsfs
	install -d $(DESTDIR)/sbin
	ln -sf $(PREFIX)/bin/kmsfs $(DESTDIR)/sbin/mount.fuse.kmsfs
	ln -sf $(PREFIX)/bin/kmsfs $(DESTDIR)/sbin/umount.fuse.kmsfs

# Static programs, packages, bills of materials and checksums, in a new directory: see packaging.
release:
	sh packaging/release.sh $(DIST)

deps:
	@sh tests/deps.sh fuse3

deps-test:
	@sh tests/deps.sh test

demo: deps build
	@bash tests/demo.sh $(BIN)

lint:
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	for os in darwin windows; do GOOS=$$os CGO_ENABLED=0 $(GO) vet -trimpath ./cmd/kmsfs || exit 1; done
	@test -z "$$(gofmt -l .)" || { echo "not gofmt-ed:"; gofmt -l .; exit 1; }

# -race for what has goroutines. The mounts are never taken from the cache of results,
# which does not know that they build the program.
test: deps-test lint
	$(MAKE) fuzz FUZZ=20000
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(GO) test -race -timeout 20m ./blockcrypt/... ./keystore/... ./fs/... ./cmd/...
	KMSFS_TEST_SHARED=1 $(GO) test -timeout 10m -run '$(SHARED)' ./fs/volume
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(GO) test -count 1 -timeout 20m ./tests/...
	sh tests/guests/fetch.sh .guests
	KMSFS_GUESTS="$(CURDIR)/.guests" KMSFS_HOST_SECONDS=3 $(GO) test -count 1 -timeout 10m -run '$(GUESTS)' ./tests

# The part of test-shared that every test has: two minutes.
GUESTS := TestHosts/nfs/^(one_writer|peer|reopened|append|replaced|lock_of_the_last_host|power_cut_during_append|end)$$

# Tests of volumes in general that are made again with shared ones.
SHARED := TestModel|TestKillAnywhere|TestRekey|TestRecipients|TestLong|TestRename|TestSparse

# Several hosts with kernels of their own, on NFS, CephFS, GlusterFS, MooseFS and SMB: User-Mode Linux, as
# root, some 50 minutes. HOST_SECONDS is how long each workload runs; HOSTS chooses a part, as TestHosts/nfs.
HOST_SECONDS ?= 5
HOSTS ?= Hosts
test-shared:
	@sh tests/deps.sh hosts
	sh tests/guests/fetch.sh .guests
	KMSFS_GUESTS="$(CURDIR)/.guests" KMSFS_HOST_SECONDS=$(HOST_SECONDS) $(GO) test -count 1 -timeout 8h -v -run '$(HOSTS)' ./tests

# What takes longer: run before a change is called finished.
soak: deps-test fuzz
	@sh tests/deps.sh soak
	KMSFS_MODEL_OPS=2000000 $(GO) test -timeout 60m -run Model ./fs/volume
	KMSFS_CRASH_STATES=1000000 $(GO) test -timeout 90m -v -run CrashStates ./fs/volume
	@test "$$(id -u)" = 0 || echo "without root: no power cuts"
	test "$$(id -u)" != 0 || KMSFS_POWER_CUTS=300 $(GO) test -timeout 60m -v -run PowerCut ./fs/volume
	PATH="$(CURDIR)/.venv/bin:$$PATH" KMSFS_SOAK=1 KMSFS_TREE_OPS=30000 KMSFS_KILL_ROUNDS=100 $(GO) test -count 1 -race -timeout 90m ./tests/...

# FUZZ executions on files, ten times as many on what costs less. A number, since
# the end of a time can be taken for a failure (golang/go#75804, before Go 1.27). By
# default all of a short run can go into making one input smaller.
fuzz:
	for f in FuzzParseHeader FuzzParseConfig FuzzDecodeName FuzzOpenBlock FuzzOpenMarker FuzzOpenValue; do \
		$(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZ)0x -fuzzminimizetime 5x ./blockcrypt || exit 1; done
	$(GO) test -run '^$$' -fuzz '^FuzzFile$$' -fuzztime $(FUZZ)x -fuzzminimizetime 5x ./fs/volume

# The last one puts a disk with latency below kmsfs, and below gocryptfs and securefs where
# they are installed.
bench:
	$(GO) test -run '^$$' -bench . -benchmem ./blockcrypt ./fs/volume
	@test "$$(id -u)" = 0 || echo "without root: no disk with latency"
	test "$$(id -u)" != 0 || $(GO) test -run '^$$' -bench SlowDisk -benchtime 1x -v ./tests
