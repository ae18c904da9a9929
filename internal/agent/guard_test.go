// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/config"
)

func TestPolicy(t *testing.T) {
	calm := readings{Busy: 10, Used: 20}
	busy := readings{Busy: 120}
	between := readings{Busy: 80}
	for _, tt := range []struct {
		name   string
		budget int
		steps  []readings // one a second
		want   []string   // the changes, by second
	}{
		{"quiet", 100, repeated(calm, 100), nil},
		{"a peak", 100, append(repeated(busy, 5), repeated(calm, 100)...), nil},
		{"busy", 100, repeated(busy, 25), []string{
			"5: hashes: cpu is 120, at or above 100 for 5s", "10: lookups: cpu is 120, at or above 100 for 5s",
			"15: files: cpu is 120, at or above 100 for 5s", "20: most files: cpu is 120, at or above 100 for 5s",
		}},
		{"no budget", 0, repeated(readings{Busy: 400, Waiting: 100}, 100), nil},
		{"back", 100, append(repeated(busy, 11), repeated(calm, 100)...), []string{
			"5: hashes: cpu is 120, at or above 100 for 5s", "10: lookups: cpu is 120, at or above 100 for 5s",
			"41: hashes: there was no pressure for 30s", "71: nothing: there was no pressure for 30s",
		}},
		{"hysteresis", 100, append(repeated(busy, 6), repeated(between, 200)...), []string{"5: hashes: cpu is 120, at or above 100 for 5s"}},
		{"flapping", 100, alternating(busy, between, 100), nil},
		{"calm is interrupted", 100, append(append(repeated(busy, 6), repeated(calm, 29)...), append([]readings{between}, repeated(calm, 29)...)...), []string{"5: hashes: cpu is 120, at or above 100 for 5s"}},
		{"a busy host, and the sensor is idle", 100, repeated(readings{Waiting: 100, Busy: 5}, 100), nil},
		{"a busy host, and the sensor takes part", 100, repeated(readings{Waiting: 90, Busy: 40}, 6), []string{"5: hashes: cpu stall is 90, at or above 80 for 5s"}},
		{"memory", 100, repeated(readings{Used: 90, Reclaim: 12}, 6), []string{"5: hashes: memory is 90, at or above 85, memory stall is 12, at or above 10 for 5s"}},
		{"memory without a budget", 0, repeated(readings{Used: 90}, 6), []string{"5: hashes: memory is 90, at or above 85 for 5s"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policy{signals: signals(tt.budget)}
			start := time.Unix(1_000_000, 0)
			var got []string
			for i, r := range tt.steps {
				if changed, why := p.step(r, start.Add(time.Duration(i)*time.Second)); changed {
					got = append(got, fmt.Sprintf("%d: %s: %s", i, steps()[p.level].name, why))
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func repeated(r readings, n int) []readings {
	list := make([]readings, n)
	for i := range list {
		list[i] = r
	}
	return list
}

func alternating(a, b readings, n int) (list []readings) {
	for range n {
		list = append(list, a, b)
	}
	return list
}

// TestPolicyModel holds the policy against what must be true of every course of things: the
// level changes by one, up only after pressure and down only after calm that lasted all the
// time since the change before.
func TestPolicyModel(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		p := policy{signals: signals(100)}
		now := time.Unix(0, 0)
		var r readings
		pressed, quiet := time.Time{}, time.Time{} // since when, without a break
		for range 2000 {
			if rng.IntN(20) == 0 {
				r = readings{Busy: rng.Float64() * 150, Used: rng.Float64() * 100, Reclaim: rng.Float64() * 12, Waiting: rng.Float64() * 100}
				if rng.IntN(2) == 0 {
					r = readings{}
				}
			}
			now = now.Add(time.Duration(500+rng.IntN(1000)) * time.Millisecond)
			over, calm := r.Busy >= 100 || r.Used >= 85 || r.Reclaim >= 10 || r.Busy >= 10 && r.Waiting >= 80, r.Busy < 70 && r.Used < 70 && r.Reclaim < 2 && (r.Busy < 10 || r.Waiting < 50)
			pressed, quiet = since(pressed, over, now), since(quiet, calm, now)
			before := p.level
			changed, _ := p.step(r, now)
			if changed != (p.level != before) || p.level < 0 || p.level >= len(steps()) {
				t.Fatalf("seed %d: changed %t from %d to %d", seed, changed, before, p.level)
			}
			switch p.level - before {
			case 0:
			case 1:
				if !over || now.Sub(pressed) < shedAfter {
					t.Fatalf("seed %d: sheds after %s of pressure", seed, now.Sub(pressed))
				}
				pressed = now
			case -1:
				if !calm || now.Sub(quiet) < restoreAfter {
					t.Fatalf("seed %d: restores after %s of calm", seed, now.Sub(quiet))
				}
				quiet = now
			default:
				t.Fatalf("seed %d: from %d to %d", seed, before, p.level)
			}
		}
	}
}

func since(was time.Time, holds bool, now time.Time) time.Time {
	switch {
	case !holds:
		return time.Time{}
	case was.IsZero():
		return now
	}
	return was
}

// Each step gives up all that the one before it does.
func TestSteps(t *testing.T) {
	var before shed
	for _, s := range steps() {
		if before.hashes && !s.shed.hashes || before.lookups && !s.shed.lookups || before.files > s.shed.files {
			t.Errorf("%s gives up %+v, the step before %+v", s.name, s.shed, before)
		}
		before = s.shed
	}
}

func TestShedFiles(t *testing.T) {
	for _, tt := range []struct{ rate, divisor, want int }{{1000, 0, 1000}, {1000, 10, 100}, {1000, 100, 10}, {0, 10, 100}, {5, 10, 1}, {0, 0, 0}} {
		a := &Agent{files: tt.divisor}
		o := a.shedFiles(config.File{Enabled: true, PerProcess: tt.rate, ExcludePaths: []string{"/x"}})
		if o.Rate != tt.want || len(o.ExcludeDirectories) != 1 || (o.Shed != "") != (tt.divisor > 0) {
			t.Errorf("%+v: %+v", tt, o)
		}
	}
}

func TestPSI(t *testing.T) {
	const text = "some avg10=12.50 avg60=3.00 avg300=0.10 total=123\nfull avg10=1.25 avg60=0.00 avg300=0.00 total=5\n"
	for _, tt := range []struct {
		text, which string
		want        float64
	}{
		{text, "some", 12.5},
		{text, "full", 1.25},
		{"", "some", 0},
		{"some\nfull avg10=x", "full", 0},
		{"some avg10=-1", "some", 0},
		{"some avg10=NaN", "some", 0},
		{"some avg10=1e9", "some", 0},
	} {
		if got := parsePSI(tt.text, tt.which); got != tt.want {
			t.Errorf("%s of %q is %v, want %v", tt.which, tt.text, got, tt.want)
		}
	}
}

func FuzzPSI(f *testing.F) {
	f.Add("some avg10=12.50 avg60=3.00 avg300=0.10 total=123\n")
	f.Fuzz(func(t *testing.T, text string) {
		if v := parsePSI(text, "some"); !(v >= 0 && v <= 100) {
			t.Errorf("%v", v)
		}
	})
}

// tree writes files below a new directory.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// The limits of all groups above count, and the tightest of them: here on a made-up host, for
// what this one does not have.
func TestGaugeReadsGroups(t *testing.T) {
	const stat = "anon 5\nactive_file 100\ninactive_file 50\nslab_reclaimable 10\n"
	for _, tt := range []struct {
		name   string
		groups string
		files  map[string]string
		want   readings
	}{
		{"version 2", "0::/system.slice/edr-sensor.service\n", map[string]string{
			"system.slice/edr-sensor.service/memory.max": "1000\n", "system.slice/edr-sensor.service/memory.high": "800\n", "system.slice/edr-sensor.service/memory.current": "560\n",
			"system.slice/edr-sensor.service/memory.stat": stat, "system.slice/memory.max": "max\n", "system.slice/memory.high": "max\n", "system.slice/memory.current": "99999\n",
			"system.slice/edr-sensor.service/memory.pressure": "some avg10=9.00\nfull avg10=7.00\n", "system.slice/edr-sensor.service/cpu.pressure": "some avg10=55.00\n",
		}, readings{Used: 50, UsedBytes: 400, Limit: 800, Reclaim: 7, Waiting: 55}},
		{"a limit above", "0::/a/b\n", map[string]string{
			"a/b/memory.max": "max\n", "a/b/memory.high": "max\n", "a/b/memory.current": "10\n", "a/memory.max": "200\n", "a/memory.current": "260\n", "a/memory.stat": stat,
		}, readings{Used: 50, UsedBytes: 100, Limit: 200}},
		{"no limit", "0::/a\n", map[string]string{"a/memory.max": "max\n", "a/memory.high": "max\n", "a/memory.current": "10\n"}, readings{}},
		{"version 1", "3:cpu,cpuacct:/x\n4:memory:/y\n0::/\n", map[string]string{
			"memory/y/memory.limit_in_bytes": "1000", "memory/y/memory.usage_in_bytes": "900", "memory/y/memory.stat": "total_active_file 300\ntotal_inactive_file 100\n",
			"unified/cgroup.procs": "",
		}, readings{Used: 50, UsedBytes: 500, Limit: 1000}},
		{"garbage", "x\n0::/a\n::\n", map[string]string{"a/memory.max": "many\n", "a/memory.current": "-5\n", "a/memory.stat": "x y z\n\n"}, readings{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proc := tree(t, map[string]string{"self/cgroup": tt.groups, "pressure/cpu": "some avg10=0.00\n", "pressure/memory": "full avg10=0.00\n"})
			g := newGauge(proc, tree(t, tt.files))
			g.cpuTime = func() time.Duration { return 0 }
			if diff := cmp.Diff(tt.want, g.read(time.Unix(1, 0))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// The own CPU time counts over ten seconds, from the start on.
func TestGaugeAverages(t *testing.T) {
	g := newGauge(t.TempDir(), t.TempDir())
	cpu, now := time.Duration(0), time.Unix(0, 0)
	g.cpuTime = func() time.Duration { return cpu }
	var got []float64
	for i := range 30 {
		got = append(got, g.read(now).Busy)
		now = now.Add(time.Second)
		if i < 15 {
			cpu += 2 * time.Second
		}
	}
	want := []float64{0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 200, 200, 200, 200, 200, 180, 160, 140, 120, 100, 80, 60, 40, 20, 0, 0, 0, 0, 0}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

const gaugeEnv = "EDR_TEST_GAUGE"

// useMuch is a process in a group: it says what the gauge reads, before and while it uses much
// of what it is asked to.
func useMuch(what string) {
	g := newGauge("/proc", "/sys/fs/cgroup")
	say := func() {
		b, err := json.Marshal(g.read(time.Now()))
		if err == nil {
			_, err = fmt.Printf("%s\n", b)
		}
		if err != nil {
			os.Exit(1)
		}
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Scan() // it is in its group
	g = newGauge("/proc", "/sys/fs/cgroup")
	say()
	var block []byte
	switch what {
	case "memory":
		size, err := strconv.Atoi(os.Getenv("EDR_TEST_BYTES"))
		if err != nil {
			os.Exit(1)
		}
		// Not of the heap: the race detector would take as much again.
		if block, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err != nil {
			os.Exit(1)
		}
	case "cpu":
		for range runtime.NumCPU() {
			go func() {
				for n := 0; n >= 0; n = (n + 1) & math.MaxInt32 { // for ever
				}
			}()
		}
	}
	for lines.Scan() {
		say()
	}
	runtime.KeepAlive(block)
}

// group makes a control group of this machine, of the version that it has.
func group(t *testing.T, controller string, set map[string]string) string {
	t.Helper()
	lacks := func(err error) {
		if os.Getenv("EDR_REQUIRE_ALL") == "1" && os.Geteuid() == 0 && !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("needs a control group with %s: %v", controller, err)
		}
		t.Skipf("needs a control group with %s: %v", controller, err)
	}
	root := "/sys/fs/cgroup/" + controller
	if exists("/sys/fs/cgroup/cgroup.controllers") {
		root = "/sys/fs/cgroup"
		// Inner groups are given controllers; that of a service may not be changed.
		if err := os.WriteFile(root+"/cgroup.subtree_control", []byte("+"+controller), 0o644); err != nil {
			lacks(err)
		}
	}
	dir := filepath.Join(root, fmt.Sprintf("edr-guard-test-%d-%s", os.Getpid(), controller))
	if err := os.Mkdir(dir, 0o755); err != nil {
		lacks(err)
	}
	t.Cleanup(func() {
		for range 100 { // a process that was just reaped may still count
			if err := os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
				return
			}
			runtime.Gosched()
		}
	})
	for name, value := range set {
		if exists(filepath.Join(dir, name)) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0o644); err != nil {
				lacks(err)
			}
		}
	}
	return dir
}

// inGroup runs useMuch in a group and returns a way to ask for readings: the first are from
// before, when nothing was used.
func inGroup(t *testing.T, dir, what string, env ...string) (calm readings, ask func() readings) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), gaugeEnv+"="+what), env...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	next := func() (r readings) {
		t.Helper()
		if _, err := fmt.Fprintln(in); err != nil || !lines.Scan() {
			t.Fatalf("no reading: %v, %v", err, lines.Err())
		}
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	return next(), next
}

// TestMemoryPressure fills a real group with memory. Before that there is no pressure; the
// cache of a file that is as large is none.
func TestMemoryPressure(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a control group")
	}
	const most = 512 << 20 // a tenth of it has room for the test itself, with the race detector
	limits := map[string]string{"memory.limit_in_bytes": fmt.Sprint(most), "memory.max": fmt.Sprint(most)}
	dir := group(t, "memory", limits)
	calm, ask := inGroup(t, dir, "memory", fmt.Sprintf("EDR_TEST_BYTES=%d", most*9/10))
	if calm.Limit != most || calm.Used > 50 {
		t.Errorf("before: %+v", calm)
	}
	if r := ask(); r.Used < 85 || r.Used > 100 {
		t.Errorf("with the memory filled: %+v", r)
	}
	p := policy{signals: signals(0)}
	var why string
	start := time.Now()
	for i := range 6 {
		if changed, said := p.step(ask(), start.Add(time.Duration(i)*time.Second)); changed {
			why = said
		}
	}
	if p.level != 1 || !strings.HasPrefix(why, "memory is ") {
		t.Errorf("level %d: %q", p.level, why)
	}
}

// TestCPUPressure has a process spin in a real group that may have a hundredth of a CPU, and in one
// that may have all.
func TestCPUPressure(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a control group")
	}
	dir := group(t, "cpu", nil)
	calm, ask := inGroup(t, dir, "cpu")
	await := func(ok func(readings) bool) { // however busy the machine is
		t.Helper()
		for !ok(ask()) {
			_, _ = unix.Poll(nil, 200)
		}
	}
	await(func(r readings) bool { return r.Busy > 5 })
	if r := ask(); calm.Throttled != 0 || r.Throttled != 0 {
		t.Errorf("without a quota: %+v, then %+v", calm, r)
	}
	for name, value := range map[string]string{"cpu.cfs_quota_us": "1000", "cpu.max": "1000 100000"} {
		if exists(filepath.Join(dir, name)) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	await(func(r readings) bool { return r.Throttled > 20 })
}
