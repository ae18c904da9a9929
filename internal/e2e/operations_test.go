// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/transport"
)

// The operations kit in packaging/ and docs/operations.md, held against Prometheus'
// own tool, against each other, and (from TestMetrics) against a running sensor.

var (
	ruleDir       = filepath.Join(moduleRoot, "packaging", "prometheus")
	dashboardFile = filepath.Join(moduleRoot, "packaging", "grafana", "edr-sensor.json")
)

// promtool runs Prometheus' tool in dir and fails the test on its verdict.
func promtool(t *testing.T, dir, stdin string, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	require(t, err == nil, "no promtool (Debian package prometheus)")
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

type rule struct {
	Alert, Record, Expr string
	Labels, Annotations map[string]string
}

func readYAML(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(ruleDir, name))
	if err == nil {
		err = yaml.Unmarshal(b, v)
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func readRules(t *testing.T, name string) (rules []rule) {
	t.Helper()
	var f struct{ Groups []struct{ Rules []rule } }
	readYAML(t, name, &f)
	for _, g := range f.Groups {
		rules = append(rules, g.Rules...)
	}
	if len(rules) == 0 {
		t.Fatalf("%s: no rules found, the search is broken", name)
	}
	return rules
}

func TestAlertRules(t *testing.T) {
	promtool(t, ruleDir, "", "check", "rules", "alerts.yaml", "recording.yaml")
	promtool(t, ruleDir, "", "test", "rules", "alerts_test.yaml")

	var cases struct {
		Tests []struct {
			Name    string
			Queries []struct {
				Expr    string
				Samples []struct{ Labels string } `yaml:"exp_samples"`
			} `yaml:"promql_expr_test"`
		}
	}
	readYAML(t, "alerts_test.yaml", &cases)
	fires, clears := map[string]bool{}, map[string]bool{}
	for _, c := range cases.Tests {
		on := ""
		for _, q := range c.Queries {
			if !strings.Contains(q.Expr, `(ALERTS{alertstate="firing"})`) {
				continue // what else an alert says
			}
			if len(q.Samples) == 0 {
				clears[on] = true
			}
			for _, s := range q.Samples {
				on = strings.TrimSuffix(strings.TrimPrefix(s.Labels, `{alertname="`), `"}`)
				fires[on] = true
			}
		}
	}
	chapters := headings(t, "operations.md")
	for _, r := range readRules(t, "alerts.yaml") {
		if !fires[r.Alert] || !clears[r.Alert] {
			t.Errorf("%s: fires in a rule test: %v, clears there: %v", r.Alert, fires[r.Alert], clears[r.Alert])
		}
		if !chapters[r.Alert] {
			t.Errorf("%s has no paragraph in docs/operations.md", r.Alert)
		}
		if want := "docs/operations.md#" + strings.ToLower(r.Alert); r.Annotations["runbook"] != want || r.Annotations["summary"] == "" {
			t.Errorf("%s: runbook %q, want %q, and a summary", r.Alert, r.Annotations["runbook"], want)
		}
		if s := r.Labels["severity"]; s != "critical" && s != "warning" {
			t.Errorf("%s: severity %q", r.Alert, s)
		}
	}
}

func readDoc(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(moduleRoot, "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// headings lists the titles of a page, those of table rows included.
func headings(t *testing.T, page string) map[string]bool {
	t.Helper()
	list := map[string]bool{}
	for line := range strings.Lines(readDoc(t, page)) {
		if m := heading.FindStringSubmatch(line); m != nil {
			list[m[1]] = true
		}
	}
	return list
}

var heading = regexp.MustCompile("^(?:#+ |\\| `)([A-Za-z_ ]+?)`?(?: \\|.*)?\n")

func TestOperationsDocuments(t *testing.T) {
	chapters := headings(t, "operations.md")
	for _, c := range transport.Classes() {
		if !chapters[string(c)] {
			t.Errorf("error class %s has no row in docs/operations.md", c)
		}
	}
	decisions := headings(t, "decisions.md")
	for _, d := range event.DecisionTable() {
		if !decisions[d.Code] {
			t.Errorf("decision %s has no paragraph in docs/decisions.md", d.Code)
		}
	}
	for _, m := range regexp.MustCompile("`([A-Z]+_?[A-Z_]+)`").FindAllStringSubmatch(readDoc(t, "operations.md"), -1) {
		if _, ok := event.Explain(m[1]); !ok && !slices.Contains([]string{"SLOWLOG", "REFUSED"}, m[1]) { // of Redis, and of a log line
			t.Errorf("docs/operations.md speaks of a decision %s, which there is not", m[1])
		}
	}
}

type dashboard struct {
	Panels []struct {
		ID                       int
		Type, Title, Description string
		Datasource               struct{ UID string }
		GridPos                  struct{ H, W, X, Y int }
		FieldConfig              struct{ Defaults struct{ Unit string } }
		Targets                  []struct {
			Expr       string
			Datasource struct{ UID string }
		}
	}
	Annotations struct{ List []struct{ Expr string } }
}

// exprs lists what the dashboard asks, with its variables replaced.
func (d *dashboard) exprs() (list []string) {
	fill := strings.NewReplacer("$__rate_interval", "5m", "$job", ".+", "$instance", ".+")
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			list = append(list, fill.Replace(q.Expr))
		}
	}
	for _, a := range d.Annotations.List {
		list = append(list, fill.Replace(a.Expr))
	}
	return list
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	b, err := os.ReadFile(dashboardFile)
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err != nil {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	return d
}

// TestDashboard checks what can be checked without Grafana: every expression parses,
// every panel says what it shows, in which unit and from where, and none hides
// another.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	ids, cells := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q: no title, or its id is taken", p.ID, p.Title)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := cells[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("panel %q is over %q, or beyond the right edge", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || p.FieldConfig.Defaults.Unit == "" || p.Datasource.UID != "${datasource}" || len(p.Targets) == 0 {
			t.Errorf("panel %q lacks a description, a unit, the data source variable or a query", p.Title)
		}
		for _, q := range p.Targets {
			if q.Datasource.UID != "${datasource}" || strings.Count(q.Expr, "{") != strings.Count(q.Expr, `{job=~"$job",instance=~"$instance"`) {
				t.Errorf("panel %q: %s does not follow the variables", p.Title, q.Expr)
			}
		}
	}
	exprs := d.exprs()
	if len(exprs) < 40 {
		t.Errorf("%d expressions found, the search is broken", len(exprs))
	}
	var rules strings.Builder
	rules.WriteString("groups:\n  - name: dashboard\n    rules:\n")
	for i, e := range exprs {
		fmt.Fprintf(&rules, "      - {record: 'panel:%d', expr: '%s'}\n", i, strings.ReplaceAll(e, "'", "''"))
	}
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, ".", "", "check", "rules", file)
}

// checkExpressions holds what rules and dashboard ask for against what a running
// sensor exposes: metrics, the values of their labels, and what is grouped by.
func checkExpressions(t *testing.T, page string) {
	t.Helper()
	d := readDashboard(t)
	exprs := d.exprs()
	recorded := map[string]bool{}
	for _, file := range []string{"alerts.yaml", "recording.yaml"} {
		for _, r := range readRules(t, file) {
			exprs = append(exprs, r.Expr)
			recorded[r.Record] = true
		}
	}
	live, sets := parsePage(page), closedSets()
	for _, e := range exprs {
		labels := map[string]bool{"job": true, "instance": true, "le": true}
		for _, s := range selectors(e) {
			name := s.name
			if live[name] == nil {
				name = strings.TrimSuffix(name, "_bucket")
			}
			if s.name == "up" || recorded[s.name] {
				continue
			}
			m := live[name]
			if m == nil {
				t.Errorf("%s asks for %s, which a running sensor does not expose", e, s.name)
				continue
			}
			for l := range m.labels {
				labels[l] = true
			}
			for _, want := range s.matchers {
				k, v, _ := strings.Cut(want, "=")
				k, v = strings.TrimSuffix(k, "!"), strings.Trim(strings.TrimPrefix(v, "~"), `"`)
				if !labels[k] || len(sets[k]) > 0 && !slices.Contains(sets[k], v) {
					t.Errorf("%s asks for %s{%s}: no series can have that label", e, name, want)
				}
			}
		}
		for _, g := range grouping.FindAllStringSubmatch(e, -1) {
			for l := range strings.SplitSeq(g[1], ",") {
				if l = strings.TrimSpace(l); !labels[l] {
					t.Errorf("%s groups by %s, which is no label of its metrics", e, l)
				}
			}
		}
	}
}

type selector struct {
	name     string
	matchers []string
}

var (
	grouping = regexp.MustCompile(`\b(?:by|on) \(([^)]*)\)`)
	vector   = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[^}]*\}|\s*\()?`)
	numbers  = regexp.MustCompile(`\[[^\]]*\]|\boffset \d+[a-z]+|\b\d[\d.e]*[a-z]*\b`)
)

// selectors finds the metrics in an expression: the names that are neither
// functions, nor operators, nor labels. That it parses is promtool's to say.
func selectors(expr string) (list []selector) {
	expr = grouping.ReplaceAllString(numbers.ReplaceAllString(expr, ""), "")
	for _, m := range vector.FindAllStringSubmatch(expr, -1) {
		if strings.HasSuffix(m[2], "(") || slices.Contains([]string{"and", "or", "unless", "bool", "by", "on", "offset"}, m[1]) {
			continue
		}
		s := selector{name: m[1]}
		if in := strings.Trim(m[2], "{}"); in != "" {
			s.matchers = strings.Split(in, ",")
		}
		list = append(list, s)
	}
	return list
}

func TestSelectors(t *testing.T) {
	got := fmt.Sprint(selectors(`sum by (job, le) (rate(a_total{x="y",z=~"w"}[5m])) > 0.5 or b:c unless on (job) (d_bucket offset 10m) == 1e3`))
	if want := `[{a_total [x="y" z=~"w"]} {b:c []} {d_bucket []}]`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
