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
	"sort"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write docs/metrics.md instead of comparing it")

const moduleRoot = "../.."

// checkMetricsDoc holds three lists against each other: the metrics that the
// code declares, those that a running sensor exposes, and docs/metrics.md.
func checkMetricsDoc(t *testing.T, page string) {
	t.Helper()
	exposed := parsePage(page)
	for _, name := range declaredMetrics(t) {
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
	label  = regexp.MustCompile(`([a-z0-9_]+)="`)
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
		if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") && !strings.HasPrefix(name, "promhttp_") {
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

// declaredMetrics lists the names in every prometheus.…Opts literal of the code.
func declaredMetrics(t *testing.T) (names []string) {
	t.Helper()
	err := filepath.WalkDir(moduleRoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "bench") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
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
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(names) < 20 {
		t.Errorf("%d declared metrics found, the search is broken", len(names))
	}
	return names
}
