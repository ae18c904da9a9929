// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// costs is what the programs take in one kernel, in nanoseconds.
type costs struct {
	Attaching attaching `json:"attaching"`
	Runs      []cost    `json:"runs"`
}

// attaching is what the start of the sensor takes.
type attaching struct {
	Types    int64 `json:"types"` // reading the kernel's own
	Maps     int64 `json:"maps"`
	Load     int64 `json:"load"`
	Attach   int64 `json:"attach"`
	Programs int64 `json:"programs"` // that were loaded, also if then they could not be attached
	Verified int64 `json:"verified"` // instructions; 0 where the kernel does not tell
}

func (a attaching) all() int64 { return a.Types + a.Maps + a.Load + a.Attach }

// cost is what a run of a hook's programs takes, -1 where there was none.
type cost struct {
	Event string `json:"event"`
	Hook  string `json:"hook"`
	In    int64  `json:"in"` // scope
	Out   int64  `json:"out"`
}

const (
	costsFile = "testdata/costs.json"
	native    = " native" // stands behind the release of a kernel that is not emulated
	// attachWithin is what attaching everything may take on a host of today.
	attachWithin = 2e9
)

// costSuite is the tests that measure. Nothing of theirs can fail that others do not see.
func costSuite() suite { return suite{dir: "sensor", run: costTests} }

const costTests = "^TestRootCost"

// TestVMCosts measures on every kernel that KERNEL names and on this machine's, under a
// clock that counts instructions, so that neither this machine nor its load is in the figures.
func TestVMCosts(t *testing.T) {
	if !*update {
		t.Skip("a measurement for docs/costs.md: make generate-costs")
	}
	seeSources(t)
	b := builder{dir: t.TempDir()}
	measured := map[string]costs{}
	var mu sync.Mutex
	t.Cleanup(func() { // after the subtests, which run in parallel
		if !t.Failed() {
			saveCosts(t, measured)
		}
	})
	measure := func(t *testing.T, kernel string, of *result) {
		t.Helper()
		runs, err := told[cost](of, "cost")
		if err != nil {
			t.Fatal(err)
		}
		starts, err := told[attaching](of, "attaching")
		if err != nil || len(starts) == 0 || len(runs) == 0 {
			t.Fatalf("%d runs, %d starts, %v", len(runs), len(starts), err)
		}
		mu.Lock()
		defer mu.Unlock()
		measured[kernel] = least(starts, runs)
	}
	for _, r := range selected(t) {
		t.Run(r.name(), func(t *testing.T) {
			t.Parallel()
			m, kernel := requireVM(t, r)
			m.accel, m.cpus = steady(), 1
			var all result
			b.boots(t, m, kernel, securityModules, []suite{costSuite()}, func(tests *result) { all.subs = append(all.subs, tests) })
			measure(t, r.name(), &all)
		})
	}
	t.Run("native", func(t *testing.T) {
		cmd := exec.CommandContext(t.Context(), "go", "test", "-v", "-count=15", "-run", costTests, "./sensor")
		cmd.Dir = module
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		all, err := results(t.Context(), out)
		if err != nil {
			t.Fatal(err)
		}
		measure(t, thisRelease(t)+native, all)
	})
}

// least is what was measured when it was least disturbed by what else a machine does.
func least(starts []attaching, runs []cost) costs {
	c := costs{Attaching: slices.MinFunc(starts, func(a, b attaching) int { return cmp.Compare(a.all(), b.all()) })}
	for _, r := range runs {
		i := slices.IndexFunc(c.Runs, func(had cost) bool { return had.Event == r.Event && had.Hook == r.Hook })
		if i < 0 {
			c.Runs = append(c.Runs, r)
			continue
		}
		c.Runs[i].In, c.Runs[i].Out = min(c.Runs[i].In, r.In), min(c.Runs[i].Out, r.Out)
	}
	return c
}

// thisRelease is the release of the running kernel as far as it tells something to others.
func thisRelease(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`^\d+\.\d+`).FindString(unix.ByteSliceToString(u.Release[:]))
}

func readCosts(t *testing.T) map[string]costs {
	t.Helper()
	by := map[string]costs{}
	data, err := os.ReadFile(costsFile)
	if err == nil {
		err = json.Unmarshal(data, &by)
	}
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return by
}

// saveCosts puts what was measured beside what was not, and writes the page.
func saveCosts(t *testing.T, measured map[string]costs) {
	t.Helper()
	by := readCosts(t)
	for name, c := range measured {
		for old := range by {
			if strings.HasSuffix(old, native) && strings.HasSuffix(name, native) {
				delete(by, old)
			}
		}
		by[name] = c
	}
	data, err := json.MarshalIndent(by, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(costsFile, append(data, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(costsPage(), []byte(costsText(t, by)), 0o644); err != nil {
		t.Fatal(err)
	}
}

func costsPage() string { return filepath.Join(module, "docs", "costs.md") }

func costsText(t *testing.T, by map[string]costs) string {
	t.Helper()
	intro, err := os.ReadFile("testdata/costs-intro.md")
	if err != nil {
		t.Fatal(err)
	}
	var kernels []string
	for _, r := range releases() {
		kernels = append(kernels, r.name())
	}
	for name := range by {
		if strings.HasSuffix(name, native) {
			kernels = append(kernels, name)
		}
	}
	return renderCosts(string(intro), kernels, by)
}

// derive is what attaching everything takes on the CPU of the native kernel, if that
// allowed it: it verifies at its own speed what the kernel with most to verify has, and
// attaches as slowly as the slowest one in the emulator.
func derive(kernels []string, by map[string]costs) (own, complete attaching) {
	for _, kernel := range kernels {
		a := by[kernel].Attaching
		if strings.HasSuffix(kernel, native) {
			own = a
			continue
		}
		complete.Attach = max(complete.Attach, a.Attach)
		if a.Verified > complete.Verified {
			complete.Verified, complete.Programs = a.Verified, a.Programs
		}
	}
	complete.Types, complete.Maps = own.Types, own.Maps
	if own.Verified > 0 {
		complete.Load = int64(math.Round(float64(own.Load) / float64(own.Verified) * float64(complete.Verified)))
	}
	return own, complete
}

// renderCosts writes one row for each event and hook, with a column for each kernel.
func renderCosts(intro string, kernels []string, by map[string]costs) string {
	var b strings.Builder
	b.WriteString(intro)
	b.WriteString("\n## Attaching all programs\n\n| kernel | programs | instructions verified | types | maps | load | attach | all |\n|---|---|---|---|---|---|---|---|\n")
	ms := func(n int64) string { return fmt.Sprintf("%.0f ms", float64(n)/1e6) }
	for _, kernel := range kernels {
		a := by[kernel].Attaching
		verified := "not told"
		if a.Verified > 0 {
			verified = fmt.Sprint(a.Verified)
		}
		fmt.Fprintf(&b, "| %s | %d | %s | %s | %s | %s | %s | %s |\n", kernel, a.Programs, verified, ms(a.Types), ms(a.Maps), ms(a.Load), ms(a.Attach), ms(a.all()))
	}
	own, all := derive(kernels, by)
	fmt.Fprintf(&b, `
A host's CPU reads types and makes maps in %s and %s, and verifies %.1f instructions in a microsecond (%d in %s). The most that a kernel has to verify
are %d instructions in %d programs, %s; to attach them takes the slowest kernel %s in the emulator, which no CPU exceeds. Together **%s**, where 2 s are allowed.

## Each run

Nanoseconds for a process in scope / out of scope.

| event | hook | %s |
|---|---|%s
`, ms(own.Types), ms(own.Maps), float64(own.Verified)/max(float64(own.Load)/1e3, 1), own.Verified, ms(own.Load),
		all.Verified, all.Programs, ms(all.Load), ms(all.Attach), ms(all.all()),
		strings.Join(kernels, " | "), strings.Repeat("---|", len(kernels)))
	var rows []cost // without figures
	for _, kernel := range kernels {
		for _, c := range by[kernel].Runs {
			if key := (cost{Event: c.Event, Hook: c.Hook}); !slices.Contains(rows, key) {
				rows = append(rows, key)
			}
		}
	}
	slices.SortStableFunc(rows, func(a, b cost) int { return cmp.Compare(a.Event, b.Event) })
	ns := func(n int64) string {
		if n < 0 {
			return "-"
		}
		return fmt.Sprint(n)
	}
	for _, row := range rows {
		fmt.Fprintf(&b, "| %s | `%s` |", strings.ReplaceAll(row.Event, " ", ", "), strings.ReplaceAll(row.Hook, ", ", "`, `"))
		for _, kernel := range kernels {
			cell := "-"
			for _, c := range by[kernel].Runs {
				if c.Event == row.Event && c.Hook == row.Hook {
					cell = ns(c.In) + " / " + ns(c.Out)
				}
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// The page is what the figures make of it, and attaching takes no longer than it may.
func TestCostsPage(t *testing.T) {
	by := readCosts(t)
	page, err := os.ReadFile(costsPage())
	if err != nil {
		t.Fatal(err)
	}
	if costsText(t, by) != string(page) {
		t.Errorf("%s is not what %s and the introduction make; make generate-costs writes both", costsPage(), costsFile)
	}
	var kernels []string
	for name := range by {
		kernels = append(kernels, name)
	}
	if own, complete := derive(kernels, by); own.Verified == 0 || complete.all() > attachWithin {
		t.Errorf("natively %+v, so that all takes %+v", own, complete)
	}
}

func TestRenderCosts(t *testing.T) {
	got := renderCosts("# x\n", []string{"1", "2", "3 native"}, map[string]costs{
		"1":        {attaching{1e6, 2e6, 3e6, 700e6, 5, 0}, []cost{{"process.exec", "tp_btf/a", 900, 30}, {"file.create", "lsm/a, lsm/b", 5, -1}}},
		"2":        {attaching{1e6, 2e6, 3e6, 400e6, 8, 8000}, []cost{{"process.exec", "tp_btf/a", 800, 20}}},
		"3 native": {attaching{10e6, 20e6, 4e6, 1e6, 4, 4000}, []cost{{"process.exec", "tp_btf/a", 80, 2}}},
	})
	for _, want := range []string{
		"# x\n\n## Attaching all programs\n", "\n| 1 | 5 | not told | 1 ms | 2 ms | 3 ms | 700 ms | 706 ms |\n", "\n| 2 | 8 | 8000 |",
		"verifies 1.0 instructions in a microsecond (4000 in 4 ms)", "8000 instructions in 8 programs, 8 ms", "kernel 700 ms", "**738 ms**",
		"| file.create | `lsm/a`, `lsm/b` | 5 / - | - | - |\n| process.exec | `tp_btf/a` | 900 / 30 | 800 / 20 | 80 / 2 |\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}
