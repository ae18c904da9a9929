// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// runs are the kernel's statistics of a hook's programs.
type runs struct {
	count uint64
	time  time.Duration
}

func runsOf(t testing.TB, k *kernel) []runs {
	t.Helper()
	list := make([]runs, len(k.attached))
	for i, a := range k.attached {
		for _, program := range a.programs {
			s, err := program.Stats()
			if err != nil {
				t.Fatal(err)
			}
			list[i].count += s.RunCount
			list[i].time += s.Runtime
		}
	}
	return list
}

// TestRootCost logs what the programs take in the kernel, by its own run statistics, in
// nanoseconds of each run: for a process in scope, and for one that is not (docs/costs.md).
func TestRootCost(t *testing.T) {
	worker, stranger := startActor(t), startActor(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	start := time.Now()
	k := watchFiles(t, worker, FileOptions{Rate: 1_000_000, Burst: 1000}, "")
	attached := time.Since(start)
	dir := real(t, t.TempDir())
	work := func(a *actor, name string) (spent []runs) {
		before := runsOf(t, k)
		path := filepath.Join(dir, name)
		steps := []string{"create", "append", "chmod", "chown", "truncate", "times", "rename", "unlink", "mkdir", "rmdir"}
		a.must(request{Op: "storm of files", Args: steps, Env: []string{path, path}, Count: 50})
		a.must(request{Op: "storm", Path: "/bin/true", Count: 20})
		a.must(request{Op: "converse", Network: "tcp4", Count: 20})
		for i, after := range runsOf(t, k) {
			spent = append(spent, runs{after.count - before[i].count, after.time - before[i].time})
		}
		return spent
	}
	in, out := work(worker, "in"), work(stranger, "out")
	each := func(r runs) int64 {
		if r.count == 0 {
			return -1
		}
		return r.time.Nanoseconds() / int64(r.count)
	}
	tell := func(kinds, hook string, in, out int64, verified uint32) {
		line, err := json.Marshal(map[string]any{"event": kinds, "hook": hook, "inscope": in, "outscope": out, "verified": verified})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("cost: %s", line)
	}
	for i, a := range k.attached {
		if in[i].count > 0 || out[i].count > 0 {
			tell(codes(a.kinds), a.section, each(in[i]), each(out[i]), 0)
		}
	}
	var verified uint32
	for _, a := range k.attached {
		for _, program := range append(slices.Clip(a.programs), a.spares...) {
			info, err := program.Info()
			if err != nil {
				t.Fatal(err)
			}
			n, _ := info.VerifiedInstructions() // 0 before 5.16, which does not tell
			verified += n
		}
	}
	tell("attach", "", attached.Nanoseconds(), -1, verified)
}

func codes(kinds []event.Kind) string {
	var list []string
	for _, kind := range kinds {
		list = append(list, kind.String())
	}
	return strings.Join(list, " ")
}

// TestVerifierCost logs what the verifier has to do for each form of the programs, a good
// part of what attaching takes. A kernel that refuses kprobes still verifies them, so this
// tells for the complete set even there what it would take.
func TestVerifierCost(t *testing.T) {
	k := prepare(t, kernelOptions{Scope: Scope{Mode: ScopeAll}, Files: FileOptions{On: true}})
	k.lsm = func() error { return nil }
	for _, form := range []string{"lsm_", "fentry_", "kprobe_", "on_", "raw_"} {
		var sum, largest uint32
		var name string
		programs, start := 0, time.Now()
		for candidate, spec := range k.spec.Programs {
			if !strings.HasPrefix(candidate, form) || candidate == "lsm_probe" {
				continue
			}
			program, _, err := k.load(hook{}, candidate, kernelTypes)
			if errors.Is(err, ebpf.ErrNotSupported) {
				continue // no such function in this kernel
			}
			if err != nil {
				t.Logf("%s: this kernel refuses %s: %.100v", form, spec.SectionName, err)
				break
			}
			programs++
			info, err := program.Info()
			if err != nil {
				t.Fatal(err)
			}
			if n, ok := info.VerifiedInstructions(); ok {
				if sum += n; n > largest {
					largest, name = n, candidate
				}
			}
			if err := program.Close(); err != nil {
				t.Error(err)
			}
		}
		t.Logf("%s: %d programs loaded in %s, %d instructions verified, the most by %s: %d", form, programs, time.Since(start).Round(time.Millisecond), sum, name, largest)
	}
}
