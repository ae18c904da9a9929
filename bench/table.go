// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// results answers questions about samples.
type results []sample

// values returns what of gives for the samples of a cell and store, by round.
func (r results) values(cell, store string, of func(result) float64) map[int]float64 {
	m := map[int]float64{}
	for _, s := range r {
		if s.Cell == cell && s.Store == store {
			m[s.Round] = of(s.result)
		}
	}
	return m
}

// median is NaN when nothing was measured.
func median(m map[int]float64) float64 {
	var v []float64
	for _, x := range m {
		v = append(v, x)
	}
	if len(v) == 0 {
		return math.NaN()
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func (r results) median(cell, store string, of func(result) float64) float64 {
	return median(r.values(cell, store, of))
}

// ratio is the median over the rounds of how many times a does of what b does.
func (r results) ratio(cell, a, b string, of func(result) float64) float64 {
	x, y := r.values(cell, a, of), r.values(cell, b, of)
	m := map[int]float64{}
	for round := range x {
		if y[round] > 0 {
			m[round] = x[round] / y[round]
		}
	}
	return median(m)
}

func (r results) rounds() (n int) {
	for _, s := range r {
		n = max(n, s.Round+1)
	}
	return n
}

func speed(r result) float64   { return float64(r.Bytes) / r.Seconds / 1e6 } // MB/s
func seconds(r result) float64 { return r.Seconds }
func cpu(r result) float64     { return r.CPU / float64(r.Events) * 1e6 } // us per event
func written(r result) float64 { return float64(r.Written) / float64(r.Bytes) }
func diskMiB(r result) float64 { return float64(r.Disk) / mib }
func rssMiB(r result) float64  { return float64(r.RSS) / mib }
func p50ms(r result) float64   { return r.P50 * 1e3 }
func p99ms(r result) float64   { return r.P99 * 1e3 }
func perSec(r result) float64  { return float64(r.Events) / r.Seconds }

// number prints three digits, or what is missing.
func number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "-"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// targets are what the buffer was to reach against the others.
var targets = []struct {
	store string
	least float64
}{{"otel", 2}, {"diskqueue", 1.3}, {"tidwall", 1.1}, {"wlog", 0.8}, {raw, 0.7}}

// tables prints everything as Markdown.
func tables(samples []sample) string {
	r := results(samples)
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }

	p("### Against the others\n")
	p("How many times as fast the buffer made the same batches durable, and read them from a cold cache: the median of the\nratios of %d rounds.\n", r.rounds())
	head := []string{"against", "at least"}
	for _, s := range shapes {
		head = append(head, s.name)
	}
	p("| %s | drain, cold |\n|---%s|", strings.Join(head, " | "), strings.Repeat("|--:", len(head)))
	for _, t := range targets {
		row := []string{label(t.store), number(t.least)}
		for _, s := range shapes {
			row = append(row, number(r.ratio("append "+s.name, ours, t.store, speed)))
		}
		row = append(row, number(r.ratio("drain cold", ours, t.store, speed)))
		p("| %s |", strings.Join(row, " | "))
	}

	for _, c := range cells() {
		if c.op != "append" {
			continue
		}
		p("\n### Append, %s\n", c.shape.name)
		p("| store | MB/s | events/s | buffer is x as fast | CPU µs/event | written/payload | p50 ms | p99 ms | disk MiB | memory MiB |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
		for _, s := range c.stores {
			med := func(of func(result) float64) string { return number(r.median(c.name, s, of)) }
			lat := []string{med(p50ms), med(p99ms)}
			if s == "adaptive" {
				lat = []string{"", ""}
			}
			p("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |", label(s), med(speed), med(perSec),
				number(r.ratio(c.name, ours, s, speed)), med(cpu), med(written), lat[0], lat[1], med(diskMiB), med(rssMiB))
		}
	}

	p("\n### Drain\n")
	p("| store | cold MB/s | buffer is x as fast | warm MB/s | buffer is x as fast | CPU µs/event | memory MiB |\n|---|--:|--:|--:|--:|--:|--:|")
	for _, c := range cells() {
		if c.name != "drain cold" {
			continue
		}
		for _, s := range c.stores {
			p("| %s | %s | %s | %s | %s | %s | %s |", label(s), number(r.median(c.name, s, speed)), number(r.ratio(c.name, ours, s, speed)),
				number(r.median("drain warm", s, speed)), number(r.ratio("drain warm", ours, s, speed)),
				number(r.median(c.name, s, cpu)), number(r.median(c.name, s, rssMiB)))
		}
	}

	p("\n### Open\n")
	p("Milliseconds, with a cold cache.\n")
	p("| store | size | after a clean close | after a kill |\n|---|--:|--:|--:|")
	for _, c := range cells() {
		if c.op != "open" || c.kill {
			continue
		}
		for _, s := range c.stores {
			p("| %s | %d MiB | %s | %s |", label(s), c.limit/mib, number(1e3*r.median(c.name, s, seconds)), number(1e3*r.median(c.name+" killed", s, seconds)))
		}
	}
	return b.String()
}

func label(store string) string {
	p, err := peerNamed(store)
	if err != nil {
		return store
	}
	return p.label
}

// The tables are written between these lines of the page, the rest of which is by hand.
const (
	pageName    = "buffer.md"
	pictureName = "buffer.svg"
	tablesBegin = "<!-- tables: make bench-buffer -->\n"
	tablesEnd   = "<!-- end of tables -->\n"
)

// writeDocs puts the tables into the page and draws the picture.
func writeDocs(dir, text string, samples []sample) error {
	name := filepath.Join(dir, pageName)
	old, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(old), tablesBegin)
	_, after, end := strings.Cut(rest, tablesEnd)
	if !ok || !end {
		return fmt.Errorf("%s has no place for tables", name)
	}
	if err := os.WriteFile(name, []byte(before+tablesBegin+"\n"+text+"\n"+tablesEnd+after), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, pictureName), []byte(picture(panels(samples))), 0o644)
}
