// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// quiet fails when the ring holds a record of this process.
func quiet(t *testing.T, bulk *tap) {
	t.Helper()
	for _, r := range bulk.rest() {
		if int(r.Pid) == os.Getpid() {
			t.Errorf("reported: %s %+v", kindOf(r.SensorEventHeader), r.file)
		}
	}
}

// tryHooks exercises the hooks: all of them see what they are to see, and none reports it.
// TestRootEveryWay does so in each form of the programs, out of scope.
func tryHooks(t *testing.T, k *kernel, bulk *tap, inScope bool) {
	dir := t.TempDir()
	bulk.rest() // of making the directory
	lost, err := k.examine(dir)
	if err != nil || len(lost) > 0 {
		t.Errorf("lost %v, %v", lost, err)
	}
	done, seen, err := k.exercise(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range k.attached {
		for _, kind := range h.kinds {
			if kind >= event.FileCreate && kind <= event.FileTimes && h.section != "" && (done[kind] == 0 || seen[kind] < done[kind]) {
				t.Errorf("%s: done %d times, seen %d times", kind, done[kind], seen[kind])
			}
		}
	}
	t.Logf("extended attributes: %d, file flags: %d", done[event.FileXattr], done[event.FileChattr])
	quiet(t, bulk)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	var thread announcement
	if err := k.maps["announced_threads"].Lookup(announcedExercise, &thread); err != nil || thread.Tid != 0 {
		t.Errorf("still announced: %+v, %v", thread, err)
	}

	// Without being announced the same is reported: quiet looks at the right ring.
	if _, err := changeFiles(filepath.Join(dir, exerciseDir)); err != nil {
		t.Fatal(err)
	}
	reported := slices.ContainsFunc(bulk.rest(), func(r record) bool { return int(r.Pid) == os.Getpid() })
	if reported != inScope {
		t.Errorf("in scope %t, reported %t", inScope, reported)
	}
	// What cannot be tried is no reason to call a hook lost.
	if lost, err = k.examine(filepath.Join(dir, "missing")); err == nil || !strings.Contains(err.Error(), "missing") || len(lost) > 0 {
		t.Errorf("lost %v, %v", lost, err)
	}
}

func TestRootExerciseInScope(t *testing.T) {
	k := watchFiles(t, &actor{pid: os.Getpid()}, FileOptions{}, "raw")
	tryHooks(t, k, newTap(t, k.bulk), true)
}

// An exercise removes what a killed one has left, and nothing that is somebody else's.
func TestExerciseLeavesAloneWhatIsNotItsOwn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), exerciseDir)
	foreign := filepath.Join(dir, "a", "theirs")
	if err := os.MkdirAll(filepath.Dir(foreign), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(foreign, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := changeFiles(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("with a foreign file in the way: %v", err)
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "d"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if done, err := changeFiles(dir); err != nil || done[event.FileCreate] != 1 {
		t.Errorf("after a killed exercise: %v, %v", done, err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("left behind: %v", err)
	}
}

// forms is the section of each hook by its first kind.
func forms(k *kernel) map[event.Kind]string {
	m := map[event.Kind]string{}
	for _, a := range k.hooks() {
		if len(a.kinds) > 0 {
			m[a.kinds[0]] = a.seenBy()
		}
	}
	return m
}

// TestRootLostLinkIsMended closes the links of each hook in turn: the next examination says
// which was lost and puts the same form in its place.
func TestRootLostLinkIsMended(t *testing.T) {
	a := startActor(t)
	k := watchFiles(t, a, FileOptions{}, "", event.FileModify, event.FileRename)
	dir := t.TempDir()
	before := forms(k)
	if changes, err := k.mend(dir); err != nil || len(changes) > 0 {
		t.Fatalf("nothing was lost, and yet %+v, %v", changes, err)
	}
	for _, kind := range kinds(event.Exec, event.Exit, event.FileModify, event.FileRename, event.FileOpenWrite) {
		h := k.find(kind)
		if h == nil || len(h.links) == 0 {
			continue // refused, or told by system calls
		}
		t.Run(h.kinds[0].String(), func(t *testing.T) {
			if err := h.links[0].Close(); err != nil {
				t.Fatal(err)
			}
			changes, err := k.mend(dir)
			if err != nil {
				t.Fatal(err)
			}
			// Kinds that system calls tell have one program.
			at := slices.IndexFunc(changes, func(c hookChange) bool { return slices.Equal(c.kinds, h.kinds) })
			if at < 0 {
				t.Fatalf("changes %+v", changes)
			}
			if c := changes[at]; c.why == nil || c.before != before[h.kinds[0]] || c.after != c.before {
				t.Errorf("change %+v", c)
			}
			for _, c := range changes {
				i := c.decision()
				if i.Code != "HOOK_LOST" || i.Before == "none" || i.After != i.Before || i.Attrs["evidence"] == nil || !i.Failed {
					t.Errorf("decision %+v", i)
				}
			}
			if diff := cmp.Diff(before, forms(k)); diff != "" {
				t.Errorf("hooks (-before +after):\n%s", diff)
			}
			if changes, err := k.mend(dir); err != nil || len(changes) > 0 {
				t.Errorf("afterwards %+v, %v", changes, err)
			}
		})
	}
	a.must(request{Op: "run", Path: "/bin/true"})
	if sums, err := k.counters(); err != nil || sums[event.Exec].Attempts != 1 || sums[event.Exit].Attempts != 1 {
		t.Errorf("afterwards counted %+v, %v", sums, err)
	}
}

// TestRootLostForGood takes the candidates away from a hook before it is lost: the kind is
// reported missing, and comes back when its program is there again.
func TestRootLostForGood(t *testing.T) {
	a := startActor(t)
	k := watch(t, a)
	s := &Sensor{kernel: k, metrics: newMetrics(nil)}
	dir := t.TempDir()
	exec := k.find(event.Exec)
	chain, section := exec.chain, exec.section
	exec.chain = []candidate{{"not_there"}, {"not_there"}}
	for _, l := range exec.links {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		changes, err := k.mend(dir)
		if err != nil {
			t.Fatal(err)
		}
		s.cover(k.coverage())
		c := covered(t, s.Coverage(), event.Exec)
		if c.Hook != "" || !strings.Contains(strings.Join(c.Errs, "; "), section+" is lost") {
			t.Errorf("coverage %+v", c)
		}
		if len(changes) == 0 {
			break // said once
		}
		if len(changes) != 1 || changes[0].before != section || changes[0].after != "" {
			t.Errorf("changes %+v", changes)
		}
		if i := changes[0].decision(); i.Severity != 4 || i.After != "none" || !strings.Contains(i.Message, "process.exec is not seen") {
			t.Errorf("decision %+v", i)
		}
	}
	exec = k.find(event.Exec)
	exec.chain = chain
	if err := exec.take(exec.candidate, k.loader()); err != nil {
		t.Fatal(err)
	}
	changes, err := k.mend(dir)
	if err != nil || len(changes) != 1 || changes[0].why != nil || changes[0].after != section {
		t.Fatalf("changes %+v, %v", changes, err)
	}
	if i := changes[0].decision(); i.Code != "HOOK_BACK" || i.Before != "none" || i.After != section || i.Failed {
		t.Errorf("decision %+v", i)
	}
}

func covered(t *testing.T, coverage []Coverage, kind event.Kind) Coverage {
	t.Helper()
	i := slices.IndexFunc(coverage, func(c Coverage) bool { return c.Kind == kind })
	if i < 0 {
		t.Fatalf("%s is not in %+v", kind, coverage)
	}
	return coverage[i]
}

// kprobesOff switches kprobes off for the whole kernel, as an administrator can: the
// exercise finds out, and system calls take their place.
func kprobesOff(t *testing.T, k *kernel) {
	cpus, err := os.ReadFile("/proc/cpuinfo")
	if err == nil && strings.HasPrefix(release(), "5.") && strings.Contains(string(cpus), "QEMU TCG CPU") {
		// The jump at the end of every system call is in memory, and the CPU goes on
		// meeting the breakpoint that stood there while it was patched.
		t.Skip("with kprobes switched off, an emulated CPU of Linux 5.10 does not see that code is patched, and hangs")
	}
	const enabled = "/sys/kernel/debug/kprobes/enabled"
	if _, err := os.Stat(enabled); errors.Is(err, os.ErrNotExist) {
		if err := unix.Mount("debugfs", "/sys/kernel/debug", "debugfs", 0, ""); err != nil {
			t.Skipf("no debugfs: %v", err)
		}
		t.Cleanup(func() { _ = unix.Unmount("/sys/kernel/debug", unix.MNT_DETACH) })
	}
	if err := os.WriteFile(enabled, []byte("0"), 0); err != nil {
		t.Skipf("kprobes cannot be switched off: %v", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(enabled, []byte("1"), 0); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	changes, err := k.mend(dir)
	if err != nil {
		t.Fatal(err)
	}
	told := map[event.Kind]bool{}
	for _, c := range changes {
		for _, kind := range c.kinds {
			told[kind] = true
			t.Logf("%s: %q, then %q: %v", kind, c.before, c.after, c.why)
		}
	}
	for kind := event.FileCreate; kind <= event.FileTimes; kind++ {
		c := covered(t, k.coverage(), kind)
		if !told[kind] || kind != event.FileModify && c.Hook != sysExit {
			t.Errorf("%s: told %t, seen by %q", kind, told[kind], c.Hook)
		}
	}
	if c := covered(t, k.coverage(), event.FileOpenWrite); c.Hook != sysExit {
		t.Errorf("opening for writing: %+v", c)
	}
	if changes, err := k.mend(dir); err != nil || len(changes) > 0 {
		t.Errorf("afterwards %+v, %v", changes, err)
	}
}
