// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/debian"
)

// module is where go.mod is.
const module = "../.."

// release is a kernel as a Debian suite has it.
type release struct {
	series string
	suite  string
	arch   string
	cpus   int
	whole  bool // runs all tests: the oldest and the newest do

	seconds int // of CPU that its tests take, about
}

// name is what KERNEL calls it.
func (r release) name() string {
	if r.arch == "amd64" {
		return r.series
	}
	return r.series + "-" + r.arch
}

// releases lists the supported kernels, oldest first. The programs are the same for
// every processor, so one kernel is enough for another one. The tests hardly use more than
// one CPU, and with one the emulator does not meet breakpoints of code that another CPU is
// patching. But since 7.0 tasks are preempted inside of programs, and all copies of one
// may be, which emulated programs are slow enough for where there is no other CPU.
func releases() []release {
	return []release{
		{"5.10", "bullseye", "amd64", 1, true, 155},
		{"6.1", "bookworm", "amd64", 1, false, 85},
		{"6.12", "trixie", "amd64", 1, false, 80},
		{"7.2", "sid", "amd64", 2, true, 340},
		{"6.12", "trixie", "arm64", 1, false, 105},
	}
}

// require skips the test without what it needs; with EDR_REQUIRE_ALL=1 it fails.
func require(t *testing.T, err error) {
	t.Helper()
	switch {
	case err == nil:
	case os.Getenv("EDR_REQUIRE_ALL") == "1":
		t.Fatalf("EDR_REQUIRE_ALL: %v", err)
	default:
		t.Skip(err)
	}
}

// requireVM returns the machine for a kernel, and the kernel.
func requireVM(t *testing.T, r release) (machine, debian.Kernel) {
	t.Helper()
	all := machines()
	m := all[slices.IndexFunc(all, func(m machine) bool { return m.arch == r.arch })]
	m.cpus, m.accel = r.cpus, fast()
	var missing []string
	for _, tool := range []string{m.emulator, "apt-get", "dpkg-deb", "xz"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if _, err := os.Stat(debian.Keyring); err != nil {
		missing = append(missing, debian.Keyring)
	}
	if missing != nil {
		require(t, fmt.Errorf("missing %s (make deps installs it on Debian; other systems cannot have Debian's kernels checked)", strings.Join(missing, ", ")))
	}
	cache, err := debian.UserCache(t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := cache.Kernel(t.Context(), r.name(), r.suite, r.arch)
	require(t, err)
	return m, kernel
}

// selected returns the kernels that KERNEL names, with commas between, all of them without it
// or for "all", and none when only RELEASE is there.
func selected(t *testing.T) []release {
	t.Helper()
	return choose(t, "KERNEL", "RELEASE", releases(), release.name)
}

// choose returns those of a list that a variable names.
func choose[T any](t *testing.T, variable, other string, all []T, name func(T) string) (list []T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: booting machines takes minutes")
	}
	switch want := os.Getenv(variable); {
	case want == "all", want == "" && os.Getenv(other) == "":
		return all
	case want == "":
		return nil
	default:
		for one := range strings.SplitSeq(want, ",") {
			i := slices.IndexFunc(all, func(v T) bool { return name(v) == one })
			if i < 0 {
				var names []string
				for _, v := range all {
					names = append(names, name(v))
				}
				t.Fatalf("%s=%s: %q is not one of %s", variable, want, one, strings.Join(names, ", "))
			}
			list = append(list, all[i])
		}
		return list
	}
}

// host is a virtual machine with what it is to show.
type host struct {
	name    string
	seconds int // of CPU, about
	run     func(*testing.T, *builder)
}

// TestVM runs the tests of the kernel programs on every supported kernel, and the packages
// under systemd on every supported release. KERNEL=5.10,7.2 selects some of the former,
// RELEASE=bookworm some of the latter. The longest start first, so that none runs alone at
// last. A machine waits for itself for a fifth of the time, so that one more than there are
// CPUs uses them best.
func TestVM(t *testing.T) {
	var mu sync.Mutex
	covered := map[string][]seen{}
	var hosts []host
	for _, r := range selected(t) {
		hosts = append(hosts, host{r.name(), r.seconds, func(t *testing.T, b *builder) {
			list := b.boot(t, r, securityModules, suites(r))
			mu.Lock()
			defer mu.Unlock()
			if len(list) > 0 {
				covered[r.name()] = list
			}
		}})
	}
	hosts = slices.Concat(hosts, variants(selected(t)), installedHosts(t))
	slices.SortStableFunc(hosts, func(a, b host) int { return cmp.Compare(b.seconds, a.seconds) })
	seeSources(t)
	b := builder{dir: t.TempDir()}
	slots := make(chan struct{}, runtime.NumCPU()+1) // t.Parallel would start them in no order
	var wg sync.WaitGroup
	for _, h := range hosts {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			t.Run(h.name, func(t *testing.T) { h.run(t, &b) })
		})
	}
	wg.Wait()
	if !t.Failed() {
		compareCoverage(t, covered)
	}
}

// builder remembers what it built.
type builder struct {
	dir  string
	mu   sync.Mutex
	done []string // architecture and suite
}

// build builds what a machine needs for the suites and was not built yet.
func (b *builder) build(t *testing.T, m machine, suites []suite) (dir string) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	dir = filepath.Join(b.dir, m.arch)
	for _, s := range suites {
		key := m.arch + " " + s.dir
		if slices.Contains(b.done, key) {
			continue
		}
		if err := build(t.Context(), dir, m.arch, m.arch32, []suite{s}); err != nil {
			t.Fatal(err)
		}
		b.done = append(b.done, key)
	}
	return dir
}

// boot runs suites on a kernel and returns what they say is seen.
func (b *builder) boot(t *testing.T, r release, lsm string, suites []suite) (covered []seen) {
	t.Helper()
	m, kernel := requireVM(t, r)
	if !strings.HasPrefix(kernel.Version(), r.series+".") {
		t.Logf("Debian %s has Linux %s by now, no longer %s", r.suite, kernel.Version(), r.series)
	}
	b.boots(t, m, kernel, lsm, suites, func(tests *result) {
		list, err := told[seen](tests, "coverage")
		if err != nil {
			t.Error(err)
		}
		covered = append(covered, list...)
	})
	return covered
}

// boots runs suites on a machine, replays what their tests said, and visits each one's.
func (b *builder) boots(t *testing.T, m machine, kernel debian.Kernel, lsm string, suites []suite, visit func(*result)) {
	t.Helper()
	dir := b.build(t, m, suites)
	initrd := filepath.Join(t.TempDir(), "initramfs")
	if err := initramfs(initrd, m, kernel, dir, suites); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	out, console, spent, err := bootAgain(t, m, kernel, initrd, lsm)
	replay(t, out, console, err, visit)
	t.Logf("over after %s, with %s of CPU", time.Since(start).Round(100*time.Millisecond), spent.Round(100*time.Millisecond))
}

// The machine must end, and say why, when its kernel does.
func TestVMPanic(t *testing.T) {
	m, kernel := requireVM(t, append(selected(t), releases()[0])[0])
	initrd := filepath.Join(t.TempDir(), "initramfs")
	f, err := os.Create(initrd)
	if err != nil {
		t.Fatal(err)
	}
	a := newArchive(f)
	a.file("bin/busybox", kernel.Busybox(), 0o755)
	a.link("bin/sh", "busybox")
	a.bytes("init", []byte("#!/bin/sh\nexit 7\n"), 0o755)
	if err := errors.Join(a.close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	out, console, _, err := bootAgain(t, m, kernel, initrd, securityModules)
	if err != nil || len(out) > 0 || !bytes.Contains(console, []byte("Attempted to kill init! exitcode=0x00000700")) {
		t.Errorf("error %v, output %q, console:\n%s", err, out, console)
	}
}

// bootAgain boots, and again while the emulator is to blame, twice at most.
func bootAgain(t *testing.T, m machine, kernel debian.Kernel, initrd, lsm string) (out, console []byte, spent time.Duration, err error) {
	for range 3 {
		out, console, spent, err = boot(t.Context(), t.TempDir(), m, kernel, initrd, lsm)
		if !again(out, console, err) {
			break
		}
		t.Logf("the emulator failed: %v\n%s", err, tail(console, 30))
	}
	return out, console, spent, err
}

// again reports whether the emulator is to blame: a machine hung, or its clock ran away,
// before it came to the tests, at first or after a reset. Amid tests and in a shutdown it may be
// for what they did, with one exception: when the kernel patches code that all CPUs run, as
// attaching to a tracepoint makes it do, an emulated CPU can meet the breakpoint of the patching
// after it is gone.
func again(out, console []byte, err error) bool {
	if bytes.Contains(console, []byte("Oops: int3: 0000")) {
		return true
	}
	hung := err != nil || bytes.Contains(console, []byte("soft lockup"))
	reset := !amid(out) && bytes.Contains(console, []byte("reboot: Restarting system"))
	return hung && (reset || !bytes.Contains(out, []byte(begins))) && !bytes.Contains(out, []byte("\n@vm done"))
}

// replay has the tests of a machine end here as they ended there.
func replay(t *testing.T, out, console []byte, err error, visit func(*result)) {
	r, errParse := parse(out)
	if err := errors.Join(err, errParse); err != nil {
		t.Error(err)
	}
	if !r.done {
		t.Errorf("the virtual machine did not come to its end; its console:\n%s", tail(console, 60))
	}
	sums := map[string]int{}
	for _, run := range r.runs {
		t.Run(run.dir, func(t *testing.T) {
			tests, err := results(t.Context(), run.output)
			if err != nil {
				t.Fatal(err)
			}
			tests.count(sums)
			visit(tests)
			for _, test := range tests.subs {
				t.Run(test.name, test.replay)
			}
			switch said := tests.said(); {
			case !run.ended:
				t.Errorf("did not end\n%s", said)
			case run.code != 0:
				t.Errorf("exit code %d\n%s", run.code, said)
			case len(tests.subs) == 0:
				t.Errorf("no tests\n%s", said)
			}
			t.Logf("from %s to %s after the boot; the slowest:%s", run.start, run.end, slowest(tests.subs))
		})
	}
	t.Logf("Linux %s (%s): %d passed, %d failed, %d skipped", r.kernel, r.security, sums["pass"], sums["fail"]+sums[""], sums["skip"])
}

// slowest lists what takes the time.
func slowest(tests []*result) string {
	tests = slices.SortedFunc(slices.Values(tests), func(a, b *result) int { return cmp.Compare(b.took, a.took) })
	var b strings.Builder
	for _, r := range tests[:min(8, len(tests))] {
		fmt.Fprintf(&b, " %s %s", r.name, r.took)
	}
	return b.String()
}

// seeSources looks at every folder of the module: go test repeats an old verdict when
// a test saw the same files before, and does not know what the test compiles.
func seeSources(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(module, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && slices.Contains([]string{".git", "bin", "dist"}, d.Name()) {
			return filepath.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
