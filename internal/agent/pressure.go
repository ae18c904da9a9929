// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// busyWindow is over how many looks, one a second, the own CPU time is averaged.
const busyWindow = 10

// gauge reads how much the sensor takes, and how much there is. It belongs to one goroutine.
type gauge struct {
	memory    []string // directories of the memory group and of those above it, up to the root's
	cpu       string   // directory of the CPU group
	v1        bool     // of the memory group
	pressure  string   // directory of the pressure files of the own group, empty when it has none
	samples   [busyWindow + 1]usage
	n         int // of them so far
	cpuTime   func() time.Duration
	proc      string
	throttled func() (time.Duration, bool)
}

// usage is what had been used at a time.
type usage struct {
	at             time.Time
	cpu, throttled time.Duration
}

// newGauge looks for the control groups of this process: proc is /proc, root where the groups
// are mounted.
func newGauge(proc, root string) *gauge {
	g := &gauge{proc: proc, cpuTime: ownCPU}
	data, err := os.ReadFile(filepath.Join(proc, "self", "cgroup"))
	if err == nil {
		for line := range strings.Lines(string(data)) {
			_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
			controllers, path, ok := strings.Cut(rest, ":")
			if ok {
				g.found(root, controllers, path)
			}
		}
	}
	g.throttled = g.readThrottled
	return g
}

// found takes note of one of the groups that the process is in.
func (g *gauge) found(root, controllers, path string) {
	climb := func(base string) (dirs []string) {
		for dir := filepath.Join(base, path); strings.HasPrefix(dir, base) && dir != base; dir = filepath.Dir(dir) {
			dirs = append(dirs, dir)
		}
		return dirs
	}
	switch {
	case controllers == "":
		base := root
		if exists(filepath.Join(root, "unified")) {
			base = filepath.Join(root, "unified")
		}
		dir := filepath.Join(base, path)
		if exists(filepath.Join(dir, "memory.max")) && g.memory == nil {
			g.memory = climb(base)
		}
		if exists(filepath.Join(dir, "cpu.stat")) && g.cpu == "" {
			g.cpu = dir
		}
		if exists(filepath.Join(dir, "memory.pressure")) && dir != base {
			g.pressure = dir
		}
	case hasController(controllers, "memory"):
		if base := filepath.Join(root, "memory"); exists(filepath.Join(base, path, "memory.limit_in_bytes")) {
			g.memory, g.v1 = climb(base), true
		}
	case hasController(controllers, "cpu"):
		for _, name := range []string{"cpu", "cpu,cpuacct"} {
			if dir := filepath.Join(root, name, path); exists(filepath.Join(dir, "cpu.stat")) {
				g.cpu = dir
			}
		}
	}
}

func hasController(list, name string) bool {
	for c := range strings.SplitSeq(list, ",") {
		if c == name {
			return true
		}
	}
	return false
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// read takes one look.
func (g *gauge) read(now time.Time) readings {
	var r readings
	u := usage{at: now, cpu: g.cpuTime()}
	throttled, known := g.throttled()
	u.throttled = throttled
	g.samples[g.n%len(g.samples)] = u
	oldest := g.samples[0]
	if g.n >= len(g.samples) {
		oldest = g.samples[(g.n+1)%len(g.samples)]
	}
	g.n++
	// Until the window is full its length counts, so that the start is no peak.
	if span := max(now.Sub(oldest.at), busyWindow*time.Second); now.After(oldest.at) {
		r.Busy = 100 * float64(u.cpu-oldest.cpu) / float64(span)
		if known {
			r.Throttled = min(100, 100*float64(u.throttled-oldest.throttled)/float64(span))
		}
	}
	r.Waiting = g.stall("cpu", "some")
	r.Reclaim = g.stall("memory", "full")
	r.UsedBytes, r.Limit = g.memoryUse()
	if r.Limit > 0 {
		r.Used = 100 * float64(r.UsedBytes) / float64(r.Limit)
	}
	return r
}

// stall is the share of the last ten seconds in which some, or all, waited for a resource: of
// the own group, else of the host.
func (g *gauge) stall(resource, which string) float64 {
	path := filepath.Join(g.proc, "pressure", resource)
	if g.pressure != "" {
		path = filepath.Join(g.pressure, resource+".pressure")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return 0 // CONFIG_PSI is not there, or off
	}
	return parsePSI(string(data), which)
}

// parsePSI reads avg10 of a line like "some avg10=1.50 avg60=0.00 avg300=0.00 total=5".
func parsePSI(text, which string) float64 {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != which {
			continue
		}
		value, ok := strings.CutPrefix(f[1], "avg10=")
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil && v >= 0 && v <= 100 {
			return v
		}
	}
	return 0
}

// memoryUse is how much of its memory the group cannot give back, and the tightest limit that
// holds for it, 0 for none. What a group above uses counts against that one's limit.
func (g *gauge) memoryUse() (used, limit int64) {
	worst := 0.0
	for _, dir := range g.memory {
		l := g.limitOf(dir)
		if l == 0 {
			continue
		}
		u := g.usedOf(dir)
		if share := float64(u) / float64(l); limit == 0 || share > worst {
			used, limit, worst = u, l, share
		}
	}
	return used, limit
}

func (g *gauge) limitOf(dir string) int64 {
	if g.v1 {
		return limit(filepath.Join(dir, "memory.limit_in_bytes"))
	}
	l, high := limit(filepath.Join(dir, "memory.max")), limit(filepath.Join(dir, "memory.high"))
	if l == 0 || high > 0 && high < l {
		return high
	}
	return l
}

// limit reads a number of bytes; 0 is none. Version 1 writes none as a very large one.
func limit(path string) int64 {
	n, err := number(path)
	if err != nil || n >= math.MaxInt64/4096*4096/2 {
		return 0
	}
	return n
}

func number(path string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
}

func (g *gauge) usedOf(dir string) int64 {
	current, cache := "memory.current", []string{"active_file", "inactive_file", "slab_reclaimable"}
	if g.v1 {
		current, cache = "memory.usage_in_bytes", []string{"total_active_file", "total_inactive_file"}
	}
	used, err := number(filepath.Join(dir, current))
	if err != nil {
		return 0
	}
	stat := table(filepath.Join(dir, "memory.stat"))
	for _, name := range cache {
		used -= stat[name]
	}
	return max(used, 0)
}

// table reads lines of a name and a number.
func table(path string) map[string]int64 {
	t := map[string]int64{}
	data, err := os.ReadFile(path)
	if err != nil {
		return t
	}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseInt(value, 10, 64); err == nil {
			t[name] = n
		}
	}
	return t
}

// readThrottled is how long the group was kept from running by its quota.
func (g *gauge) readThrottled() (time.Duration, bool) {
	if g.cpu == "" {
		return 0, false
	}
	t := table(filepath.Join(g.cpu, "cpu.stat"))
	if us, ok := t["throttled_usec"]; ok {
		return time.Duration(us) * time.Microsecond, true
	}
	ns, ok := t["throttled_time"]
	return time.Duration(ns), ok
}

// ownCPU is the CPU time that this process has taken.
func ownCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Of the control group's memory the Go heap gets this share, after what the kernel has for
// the rings and maps; at least heapLeast.
const (
	heapShare = .8
	heapLeast = 64 << 20
	mapsBytes = 32 << 20 // beside the rings
)

// limitHeap has the Go runtime collect harder rather than be killed, unless the environment
// says how much it may take. It returns the limit, 0 for none.
func limitHeap(limit, rings int64) int64 {
	if os.Getenv("GOMEMLIMIT") != "" || limit == 0 {
		return 0
	}
	heap := max(int64(float64(limit-rings-mapsBytes)*heapShare), heapLeast)
	debug.SetMemoryLimit(heap)
	return heap
}
