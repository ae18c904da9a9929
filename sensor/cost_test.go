// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
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

// TestRootCost tells what the programs take in the kernel, by its own run statistics, in
// nanoseconds of each run: for a process in scope, and for one that is not. docs/costs.md
// collects it.
func TestRootCost(t *testing.T) {
	worker, stranger := startActor(t), startActor(t)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	k := watchFiles(t, worker, FileOptions{Rate: 1_000_000, Burst: 1000}, "")
	dir := real(t, t.TempDir())
	work := func(a *actor, name string) (spent []runs) {
		path := filepath.Join(dir, name)
		steps := []string{"create", "append", "chmod", "chown", "truncate", "times", "setxattr", "removexattr", "rename", "mkdir", "rmdir", "symlink", "unlink"}
		do := func(count int) {
			a.must(request{Op: "storm of files", Args: steps, Env: []string{path, path + "'"}, Count: count})
			a.must(request{Op: "storm", Path: "/bin/true", Count: count})
			a.must(request{Op: "converse", Network: "tcp4", Count: count})
		}
		do(2) // so that what is done once is done
		before := runsOf(t, k)
		do(20)
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
	for i, a := range k.attached {
		if in[i].count > 0 || out[i].count > 0 {
			tell(t, "cost", map[string]any{"event": codes(a.kinds), "hook": a.section, "in": each(in[i]), "out": each(out[i])})
		}
	}
}

// tell logs a finding for docs/costs.md.
func tell(t *testing.T, what string, finding map[string]any) {
	t.Helper()
	line, err := json.Marshal(finding)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s", what, line)
}

// ownTime is the CPU time of this process. What others do on a busy machine is not in it.
func ownTime(t *testing.T) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// TestRootCostOfAttaching tells where the time goes that the sensor's start takes in the
// kernel, from reading the kernel's types on. A kernel that refuses to attach to kprobes
// verifies the programs nevertheless, so that this tells most even there. All is CPU time
// but for attaching, which also waits.
func TestRootCostOfAttaching(t *testing.T) {
	a := startActor(t)
	spent := map[string]any{}
	start := ownTime(t)
	took := func(what string) {
		now := ownTime(t)
		spent[what], start = (now - start).Nanoseconds(), now
	}
	types := btf.NewCache()
	if _, err := types.Kernel(); err != nil {
		t.Fatal(err)
	}
	took("types")
	k, _, err := loadKernel(kernelOptions{
		Scope: Scope{Mode: ScopeTree, PID: uint32(a.pid)}, Files: FileOptions{On: true}, Types: types,
		PriorityBytes: 16 << 20, BulkBytes: 8 << 20, // as by default
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	took("maps")
	var loading, loadingCPU time.Duration
	var programs int
	var verified uint32
	load := k.loader()
	began := time.Now()
	err = k.attachBy(func(h hook, name string) (*ebpf.Program, *ebpf.ProgramSpec, error) {
		began, beganCPU := time.Now(), ownTime(t)
		program, spec, err := load(h, name)
		loading += time.Since(began)
		loadingCPU += ownTime(t) - beganCPU
		if program != nil {
			programs++
			if info, err := program.Info(); err == nil {
				n, _ := info.VerifiedInstructions() // 0 before 5.16, which does not tell
				verified += n
			}
		}
		return program, spec, err
	})
	attaching := time.Since(began) - loading
	if err := errors.Join(err, k.close()); err != nil {
		t.Fatal(err)
	}
	spent["load"], spent["attach"] = loadingCPU.Nanoseconds(), attaching.Nanoseconds()
	spent["programs"], spent["verified"] = programs, verified
	tell(t, "attaching", spent)
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
