// SPDX-License-Identifier: Apache-2.0

// Package metricstest lets tests show that a metric moves when what it counts
// happens. A test of internal/e2e finds the calls of [Moved] and fails for a
// metric that no test moves, so the names in them are literals.
package metricstest

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
)

// Page is what a scrape returns, by metric: its samples, one a line.
type Page map[string][]string

// Parse splits the text that /metrics answers.
func Parse(page string) Page {
	p, name := Page{}, ""
	for line := range strings.Lines(page) {
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, _, _ = strings.Cut(rest, " ")
		} else if !strings.HasPrefix(line, "#") {
			p[name] = append(p[name], line)
		}
	}
	return p
}

// Gather scrapes a registry.
func Gather(t testing.TB, g prometheus.Gatherer) Page {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return Parse(b.String())
}

// Moved fails the test for each metric whose samples are the same in both pages, or
// that is not in both.
func Moved(t testing.TB, before, after Page, names ...string) {
	t.Helper()
	for _, name := range names {
		if len(before[name]) == 0 || len(after[name]) == 0 || cmp.Equal(before[name], after[name]) {
			t.Errorf("%s did not move: %q, %q", name, before[name], after[name])
		}
	}
}
