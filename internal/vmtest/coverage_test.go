// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/sensor/event"
)

var update = flag.Bool("update", false, "write docs/coverage.md or docs/costs.md")

// seen is what a kernel's tests say of an event under one form of the programs.
type seen struct {
	Form, Event, Hook, Plain, Ring, Polled, Compat string
}

// forms of the programs, as chapters of the page.
func forms() []struct{ name, title, text string } {
	return []struct{ name, title, text string }{
		{"lsm", "The best there is", "What the sensor chooses by itself on a kernel that has `bpf` in its `lsm=`. Debian's 5.10 leaves it out there, as do other old kernels; the tests put it in."},
		{"fentry", "Without LSM programs", "What it falls back to where `bpf` is not in `lsm=`; since Linux 7.0 after kprobes, of which the kernel leaves no runs out."},
		{"kprobe", "Without LSM and fentry programs", "arm64 has fentry since 6.0 only; some policies refuse both."},
		{"raw", "System calls alone", "What remains where all of these are refused, for processes and connections without `tp_btf` as well."},
	}
}

// told returns what a test and those below it say in lines of JSON after a word.
func told[T any](r *result, word string) (list []T, err error) {
	for line := range strings.Lines(r.output.String()) {
		if _, data, ok := strings.Cut(line, ": "+word+": "); ok {
			var one T
			if err := json.Unmarshal([]byte(data), &one); err != nil {
				return nil, fmt.Errorf("%s %q: %w", word, data, err)
			}
			list = append(list, one)
		}
	}
	for _, sub := range r.subs {
		below, err := told[T](sub, word)
		if err != nil {
			return nil, err
		}
		list = append(list, below...)
	}
	return list, nil
}

const (
	coverageHead = "| event | kernels | hook | system call | io_uring | io_uring, polled | 32-bit |\n|---|---|---|---|---|---|---|\n"
	everyKernel  = "all"
)

// words are the tests' words and the page's.
func words() *strings.Replacer {
	return strings.NewReplacer("yes", "seen", "no", "not seen")
}

// renderCoverage writes the tables: kernels of which the same is to be said share a row.
func renderCoverage(intro string, kernels []string, by map[string][]seen) string {
	var b strings.Builder
	b.WriteString(intro)
	for _, form := range forms() {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n%s", form.title, form.text, coverageHead)
		type row struct {
			seen
			kernels []string
		}
		for kind := range event.Kinds {
			var rows []row
			for _, kernel := range kernels {
				for _, s := range by[kernel] {
					if s.Form != form.name || s.Event != event.Kind(kind).String() {
						continue
					}
					i := slices.IndexFunc(rows, func(r row) bool { return r.seen == s })
					if i < 0 {
						i, rows = len(rows), append(rows, row{seen: s})
					}
					rows[i].kernels = append(rows[i].kernels, kernel)
				}
			}
			for _, r := range rows {
				list, hook := strings.Join(r.kernels, ", "), "missing"
				if slices.Equal(r.kernels, kernels) {
					list = everyKernel
				}
				if r.Hook != "" {
					hook = "`" + strings.ReplaceAll(r.Hook, ", ", "`, `") + "`"
				}
				w := words()
				fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n", r.Event, list, hook, w.Replace(r.Plain), w.Replace(r.Ring), w.Replace(r.Polled), w.Replace(r.Compat))
			}
		}
	}
	return b.String()
}

// readCoverage is the way back, for kernels that are not booted this time.
func readCoverage(page string, kernels []string) map[string][]seen {
	by := map[string][]seen{}
	form := ""
	for line := range strings.Lines(page) {
		for _, f := range forms() {
			if strings.TrimSpace(line) == "## "+f.title {
				form = f.name
			}
		}
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if form == "" || len(cells) != 7 || cells[0] == "| event" {
			continue
		}
		hook := strings.ReplaceAll(cells[2], "`", "")
		if hook == "missing" {
			hook = ""
		}
		word := func(s string) string {
			return strings.NewReplacer("not seen", "no", "seen", "yes", " |", "").Replace(s)
		}
		named := strings.Split(cells[1], ", ")
		if cells[1] == everyKernel {
			named = kernels
		}
		for _, kernel := range named {
			by[kernel] = append(by[kernel], seen{form, strings.TrimPrefix(cells[0], "| "), hook, word(cells[3]), word(cells[4]), word(cells[5]), word(cells[6])})
		}
	}
	return by
}

// compareCoverage fails when docs/coverage.md is not what the kernels booted say; -update
// writes it.
func compareCoverage(t *testing.T, booted map[string][]seen) {
	t.Helper()
	var kernels []string
	for _, r := range releases() {
		kernels = append(kernels, r.name())
	}
	file := filepath.Join(module, "docs", "coverage.md")
	page, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	intro, err := os.ReadFile("testdata/coverage-intro.md")
	if err != nil {
		t.Fatal(err)
	}
	by := readCoverage(string(page), kernels)
	maps.Copy(by, booted)
	made := renderCoverage(string(intro), kernels, by)
	if *update {
		if err := os.WriteFile(file, []byte(made), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if diff := cmp.Diff(strings.Split(made, "\n"), strings.Split(string(page), "\n")); diff != "" {
		t.Errorf("%s is not what the kernels say; make generate-coverage writes it (-kernels +file):\n%s", file, diff)
	}
}

// The page is what its tables and the introduction make, without any kernel.
func TestCoveragePage(t *testing.T) { compareCoverage(t, nil) }

func TestCoveragePageIsReadBack(t *testing.T) {
	kernels := []string{"1", "2", "3"}
	by := map[string][]seen{
		"1": {
			{"lsm", "process.exec", "tp_btf/a", "yes", "-", "-", "refused"},
			{"lsm", "file.delete", "lsm/a, lsm/b", "yes", "no", "yes", "-"},
			{"raw", "file.write", "", "no", "no", "no", "no"},
		},
		"2": {{"lsm", "process.exec", "tp_btf/a", "yes", "-", "-", "yes"}},
	}
	by["3"] = by["1"]
	page := renderCoverage("# x\n", kernels, by)
	if diff := cmp.Diff(by, readCoverage(page, kernels)); diff != "" {
		t.Errorf("(-want +got):\n%s\n%s", diff, page)
	}
	for _, want := range []string{"| process.exec | 1, 3 | `tp_btf/a` | seen | - | - | refused |", "| `lsm/a`, `lsm/b` | seen | not seen | seen | - |", "| missing | not seen |"} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not in\n%s", want, page)
		}
	}
	if got := renderCoverage("# x\n", kernels, readCoverage(page, kernels)); got != page {
		t.Errorf("another page:\n%s", got)
	}
	by["2"] = by["1"]
	page = renderCoverage("# x\n", kernels, by)
	if diff := cmp.Diff(by, readCoverage(page, kernels)); diff != "" || !strings.Contains(page, "| process.exec | all |") {
		t.Errorf("(-want +got):\n%s\n%s", diff, page)
	}
}
