// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// cost is what a hook's programs take in a kernel, in nanoseconds of each run, or under
// the event "attach" what attaching them all takes.
type cost struct {
	Event, Hook       string
	InScope, OutScope int64 // -1: did not run
	Verified          uint32
}

// attachEvent is the event under which the time to attach is told.
const attachEvent = "attach"

// renderCosts writes one row for each event and hook, with a column for each kernel.
func renderCosts(intro string, kernels []string, by map[string][]cost) string {
	var b strings.Builder
	b.WriteString(intro)
	fmt.Fprintf(&b, "\n## Attaching all programs\n\n| kernel | time | instructions verified |\n|---|---|---|\n")
	for _, kernel := range kernels {
		for _, c := range by[kernel] {
			if c.Event == attachEvent {
				verified := "not told before Linux 5.16"
				if c.Verified > 0 {
					verified = fmt.Sprint(c.Verified)
				}
				fmt.Fprintf(&b, "| %s | %.2f s | %s |\n", kernel, float64(c.InScope)/1e9, verified)
			}
		}
	}
	fmt.Fprintf(&b, "\n## Each run\n\nNanoseconds for a process in scope / out of scope.\n\n| event | hook | %s |\n|---|---|%s\n", strings.Join(kernels, " | "), strings.Repeat("---|", len(kernels)))
	var rows []cost // without figures
	for _, kernel := range kernels {
		for _, c := range by[kernel] {
			key := cost{Event: c.Event, Hook: c.Hook}
			if c.Event != attachEvent && !slices.Contains(rows, key) {
				rows = append(rows, key)
			}
		}
	}
	slices.SortStableFunc(rows, func(a, b cost) int { return cmp.Compare(a.Event, b.Event) })
	for _, row := range rows {
		fmt.Fprintf(&b, "| %s | `%s` |", row.Event, strings.ReplaceAll(row.Hook, ", ", "`, `"))
		for _, kernel := range kernels {
			cell := "-"
			for _, c := range by[kernel] {
				if c.Event == row.Event && c.Hook == row.Hook {
					cell = ns(c.InScope) + " / " + ns(c.OutScope)
				}
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteString("\n")
	}
	return b.String()
}

func ns(n int64) string {
	if n < 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

// writeCosts writes docs/costs.md when every kernel was booted with -update. Figures are
// never compared: they depend on the machine.
func writeCosts(t *testing.T, booted map[string][]cost) {
	t.Helper()
	var kernels []string
	for _, r := range releases() {
		if len(booted[r.name()]) == 0 {
			return
		}
		kernels = append(kernels, r.name())
	}
	if !*update {
		return
	}
	intro, err := os.ReadFile("testdata/costs-intro.md")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(module, "docs", "costs.md"), []byte(renderCosts(string(intro), kernels, booted)), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestRenderCosts(t *testing.T) {
	got := renderCosts("# x\n", []string{"1", "2"}, map[string][]cost{
		"1": {{"attach", "", 1_500_000_000, -1, 0}, {"process.exec", "tp_btf/a", 900, 30, 0}, {"file.create", "lsm/a, lsm/b", 5, -1, 0}},
		"2": {{"attach", "", 2_000_000_000, -1, 77}, {"process.exec", "tp_btf/a", 800, 20, 0}},
	})
	want := "# x\n\n## Attaching all programs\n\n| kernel | time | instructions verified |\n|---|---|---|\n" +
		"| 1 | 1.50 s | not told before Linux 5.16 |\n| 2 | 2.00 s | 77 |\n" +
		"\n## Each run\n\nNanoseconds for a process in scope / out of scope.\n\n| event | hook | 1 | 2 |\n|---|---|---|---|\n" +
		"| file.create | `lsm/a`, `lsm/b` | 5 / - | - |\n| process.exec | `tp_btf/a` | 900 / 30 | 800 / 20 |\n"
	if got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}
