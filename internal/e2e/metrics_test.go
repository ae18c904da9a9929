// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/transport"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

var update = flag.Bool("update", false, "write docs/metrics.md instead of comparing it")

const moduleRoot = "../.."

// checkMetricsDoc holds three lists against each other: the metrics that the
// code declares, those that a running sensor exposes, and docs/metrics.md.
func checkMetricsDoc(t *testing.T, page string) {
	t.Helper()
	exposed := parsePage(page)
	moved := movedMetrics(t)
	for _, name := range declaredMetrics(t) {
		if !moved[name] {
			t.Errorf("no test moves %s: do in one what it counts, and say so with metricstest.Moved", name)
		}
		if _, ok := exposed[name]; !ok {
			t.Errorf("%s is declared in the code and missing in /metrics", name)
			continue
		}
		if meaning, action, ok := strings.Cut(exposed[name].help, ". If it "); !ok || len(meaning) < 10 || len(action) < 20 || !strings.HasSuffix(action, ".") {
			t.Errorf("%s: the help %q does not say what it means and then \"If it …\" what to do", name, exposed[name].help)
		}
	}
	want := metricsDoc(exposed)
	path := filepath.Join(moduleRoot, "docs", "metrics.md")
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/metrics.md is not what the sensor exposes (-want +got); go test ./internal/e2e -run TestMetrics -args -update writes it\n%s", diff)
	}
}

type metric struct {
	kind, help string
	labels     map[string]bool
}

var (
	sample = regexp.MustCompile(`^([a-z0-9_]+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? [^ ]+$`)
	label  = regexp.MustCompile(`([a-z0-9_]+)="([^"]*)"`)
)

// parsePage reads the text format; names are those of the HELP lines.
func parsePage(page string) map[string]*metric {
	out := map[string]*metric{}
	for line := range strings.Lines(page) {
		line = strings.TrimSuffix(line, "\n")
		if rest, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, help, _ := strings.Cut(rest, " ")
			out[name] = &metric{help: help, labels: map[string]bool{}}
			continue
		}
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			out[name].kind = kind
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m == nil || out[m[1]] == nil {
			continue
		}
		for _, l := range label.FindAllStringSubmatch(m[2], -1) {
			if l[1] != "le" && l[1] != "quantile" {
				out[m[1]].labels[l[1]] = true
			}
		}
	}
	return out
}

// metricsDoc describes our own metrics; those of the Go runtime and the process
// are documented by their makers.
func metricsDoc(exposed map[string]*metric) string {
	var b strings.Builder
	b.WriteString("# Metrics\n\nGenerated from a running sensor: what `/metrics` exposes, beside the usual `go_*` and `process_*`.\n" +
		"The unit is the end of the name; `_total` are counters. Labels come from closed sets.\n" +
		"[operations.md](operations.md) says more about those that alerts watch.\n\n" +
		"| metric | type | labels | meaning | what to do when it moves |\n|---|---|---|---|---|\n")
	names := make([]string, 0, len(exposed))
	for name := range exposed {
		if ours(name) {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		m := exposed[name]
		labels := make([]string, 0, len(m.labels))
		for l := range m.labels {
			labels = append(labels, "`"+l+"`")
		}
		sort.Strings(labels)
		meaning, action, _ := strings.Cut(m.help, ". If it ")
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s. | If it %s |\n", name, m.kind, strings.Join(labels, ", "),
			strings.ReplaceAll(meaning, "|", "\\|"), strings.ReplaceAll(action, "|", "\\|"))
	}
	return b.String()
}

func ours(name string) bool {
	return !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") && !strings.HasPrefix(name, "promhttp_")
}

// maxSeries bounds what one sensor costs Prometheus, histogram buckets included.
const maxSeries = 400

// closedSets are all values that a label can have. What describes the build or the
// configuration has one value at a time, in one series.
func closedSets() map[string][]string {
	var kinds, classes, risks []string
	for k := event.None + 1; int(k) < event.Kinds; k++ {
		kinds = append(kinds, k.String())
	}
	for _, c := range transport.Classes() {
		classes = append(classes, string(c))
	}
	for _, r := range transport.Risks() {
		risks = append(risks, string(r))
	}
	return map[string][]string{
		"kind": kinds, "event": kinds, "class": classes,
		"hook":   {"tp_btf", "raw_tp", "lsm", "fentry", "fexit", "kprobe", "iter", "none"},
		"how":    {"adopted", "replaced"},
		"mode":   {"starting", "online", "buffering", "degraded", "truncating", "stopping"},
		"op":     {"commit", "reopen", "read", "note"},
		"result": {"ok", "dup", "gap", "overlap", "fenced", "error", "pending", "rate", "size", "gone", "changed", "shed"},
		"ring":   {"priority", "bulk"},
		"risk":   risks,
		"state":  {"running", "exited"},
		"stream": {"events", "decisions_system", "decisions_agents", "decisions_approvals"},
	}
}

// checkSeries holds the labels of our metrics against the sets they come from, and
// their number against the bound: nothing that the host does can make a series.
func checkSeries(t *testing.T, page string) {
	t.Helper()
	sets, infos, n := closedSets(), map[string]int{}, 0
	for line := range strings.Lines(page) {
		m := sample.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil || !ours(m[1]) {
			continue
		}
		n++
		if strings.HasSuffix(m[1], "_info") {
			if infos[m[1]]++; infos[m[1]] > 1 {
				t.Errorf("%s has more than one series", m[1])
			}
			continue
		}
		for _, l := range label.FindAllStringSubmatch(m[2], -1) {
			if l[1] != "le" && !slices.Contains(sets[l[1]], l[2]) {
				t.Errorf("%s: label %s=%q is not of a closed set known here", m[1], l[1], l[2])
			}
		}
	}
	t.Logf("%d series", n)
	if n > maxSeries {
		t.Errorf("%d series of ours, want at most %d", n, maxSeries)
	}
}

// checkScrapeCost scrapes often and asks the sensor what that cost it.
func checkScrapeCost(t *testing.T, h *host) {
	t.Helper()
	const scrapes, maxAlloc = 50, 1 << 20
	_, first := h.get("/metrics")
	var last string
	for range scrapes {
		_, last = h.get("/metrics")
	}
	alloc := (value(t, last, "go_memstats_alloc_bytes_total") - value(t, first, "go_memstats_alloc_bytes_total")) / scrapes
	cpu := (value(t, last, "process_cpu_seconds_total") - value(t, first, "process_cpu_seconds_total")) / scrapes
	t.Logf("a scrape: %d bytes, at most %.1f ms of CPU and %.0f KiB allocated, what else the sensor did included", len(last), 1e3*cpu, alloc/1024)
	if alloc > maxAlloc {
		t.Errorf("a scrape allocates %.0f bytes, want at most %d", alloc, maxAlloc)
	}
}

// checkLatency holds the way of each record against the count of those delivered, and
// against what cannot be: longer than the whole test, or no time at all.
func checkLatency(t *testing.T, h *host) {
	t.Helper()
	const name = "transport_end_to_end_latency_seconds"
	h.delivered(30 * time.Second)
	var n, sum float64
	eventually(t, 30*time.Second, "each delivered record has its latency", func() bool {
		_, page := h.get("/metrics")
		var delivered float64
		for _, stream := range closedSets()["stream"] {
			delivered += value(t, page, `transport_delivered_records_total{stream="`+stream+`"}`)
		}
		n, sum = value(t, page, name+"_count"), value(t, page, name+"_sum")
		return n == delivered
	})
	if sum <= 0 || sum/n > 60 {
		t.Errorf("%v latencies of %v s in all", n, sum)
	}
	t.Logf("kernel to Redis: %.0f ms on average over %v records, those that ran before the sensor included", 1e3*sum/n, n)
}

// value is that of one series.
func value(t *testing.T, page, name string) float64 {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindStringSubmatch(page)
	if m == nil {
		t.Fatalf("no %s in /metrics", name)
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// inspect visits the syntax of all Go files of ours, tests or the others.
func inspect(t *testing.T, tests bool, visit func(ast.Node) bool) {
	t.Helper()
	err := filepath.WalkDir(moduleRoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "bench") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") != tests {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, visit)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// movedMetrics lists the names that tests give to metricstest.Moved.
func movedMetrics(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	inspect(t, true, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		if sel, ok := call.Fun.(*ast.SelectorExpr); !ok || sel.Sel.Name != "Moved" {
			return true
		}
		for _, a := range call.Args {
			if lit, ok := a.(*ast.BasicLit); ok {
				if name, err := strconv.Unquote(lit.Value); err == nil {
					names[name] = true
				}
			}
		}
		return true
	})
	return names
}

// declaredMetrics lists the names in every prometheus.…Opts literal of the code.
func declaredMetrics(t *testing.T) (names []string) {
	t.Helper()
	inspect(t, false, func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		sel, ok := lit.Type.(*ast.SelectorExpr)
		if !ok || !strings.HasSuffix(sel.Sel.Name, "Opts") {
			return true
		}
		for _, e := range lit.Elts {
			kv, ok := e.(*ast.KeyValueExpr)
			if !ok {
				continue
			}
			key, _ := kv.Key.(*ast.Ident)
			value, _ := kv.Value.(*ast.BasicLit)
			if key != nil && key.Name == "Name" && value != nil {
				if name, err := strconv.Unquote(value.Value); err == nil {
					names = append(names, name)
				}
			}
		}
		return true
	})
	if len(names) < 20 {
		t.Errorf("%d declared metrics found, the search is broken", len(names))
	}
	return names
}

// TestMetricsMove does what the metrics of a whole sensor count and looks whether they
// tell: work, a flood, Redis away, a disk that stands still, another configuration.
func TestMetricsMove(t *testing.T) {
	requireHost(t)
	mount := loopMount(t)
	w := startWorkload(t)
	server := redistest.Start(t, redistest.Options{AOF: "everysec"})
	const settings = "buffer: {dir: %q, cap: %s, compression: none}\nsensor: {scope: \"tree:%d\", priority_ring: %s, bulk_ring: 64KiB, file: {per_process: 50}}"
	dir := filepath.Join(mount, "buffer")
	h := newHost(t, w, server.Addr(), fmt.Sprintf(settings, dir, "16MiB", w.pid(), "64KiB"))
	scrape := func() metricstest.Page {
		_, page := h.get("/metrics")
		return metricstest.Parse(page)
	}
	h.start()
	fresh := scrape()
	w.do(order{Op: "exec", From: 1, N: 20})
	w.do(order{Op: "create", Dir: t.TempDir(), N: 500})
	h.delivered(30 * time.Second)
	eventually(t, 30*time.Second, "what was left out is counted", func() bool {
		return h.mustStatus().Sensor.Suppressed["file.create"] > 0 && h.mustStatus().Ready
	})
	eventually(t, 30*time.Second, "the tick after it", func() bool {
		return !cmp.Equal(fresh["sensor_suppressed_events_total"], scrape()["sensor_suppressed_events_total"])
	})
	worked := scrape()
	metricstest.Moved(t, fresh, worked,
		"sensor_events_total", "sensor_suppressed_events_total", "sensor_read_latency_seconds", "enrich_hashes_total",
		"buffer_append_latency_seconds", "buffer_commit_seconds", "buffer_commits_total", "buffer_bytes", "buffer_records",
		"transport_batch_seconds", "transport_batches_total", "transport_delivered_records_total",
		"transport_delivery_latency_seconds", "transport_end_to_end_latency_seconds")

	server.Kill9()
	w.do(order{Op: "exec", From: 30, N: 20})
	h.readyz(200, "ready: buffering")
	away := scrape()
	metricstest.Moved(t, worked, away, "agent_mode", "agent_mode_changes_total", "transport_connected", "transport_errors_total",
		"buffer_unsent_bytes", "buffer_unsent_records", "buffer_oldest_unsent_age_seconds")

	thaw := freeze(t, mount)
	w.do(order{Op: "exec", From: 100, N: 120, ArgSize: 60 << 10})
	eventually(t, 30*time.Second, "the ring is full", func() bool { return h.mustStatus().Sensor.Lost["process.exec"] > 0 })
	metricstest.Moved(t, away, scrape(), "sensor_ring_used_bytes")
	thaw()
	h.readyz(503, "(sensor_lost_events_total")
	metricstest.Moved(t, away, scrape(), "sensor_lost_events_total", "agent_ready")

	h.kill9()
	h = newHost(t, w, server.Addr(), fmt.Sprintf(settings, dir, "20MiB", w.pid(), "128KiB"))
	h.env = []string{"EDR_SENSOR_TRANSPORT__BACKOFF_LIMIT=1s"} // the return of Redis is waited for
	h.start()
	metricstest.Moved(t, worked, scrape(), "agent_config_info", "buffer_capacity_bytes", "sensor_ring_size_bytes")
	server.Restart()
	h.delivered(30 * time.Second)
	h.stop()
}
