// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// tallyMost is how many names a tally remembers before it forgets the quieter half.
const tallyMost = 2048

// halfLife is how long it takes until an event counts half for the rate.
const halfLife = 5 * time.Second

// family is what an event is about.
type family uint8

const (
	ofProcess family = iota
	ofNet
	ofFile
	ofOther
	familyCount
)

func familyOf(code string) family {
	name, _, _ := strings.Cut(code, ".")
	switch name {
	case "process":
		return ofProcess
	case "net":
		return ofNet
	case "file":
		return ofFile
	}
	return ofOther
}

// counted is what is known of a name.
type counted struct {
	pid   int
	user  string
	text  string // what to show for it
	thin  bool   // which is not what it should be
	heat  float64
	total uint64
	by    [familyCount]uint64
}

func (c *counted) add(f family) {
	c.heat++
	c.total++
	c.by[f]++
}

// tally counts events by name in bounded memory. A name that is forgotten and comes
// back starts at zero, so that what is shown of one is never too much; the sum over all
// is exact.
type tally struct {
	names map[string]*counted
	all   counted
	age   time.Duration // for how long it has been counted
}

func newTally() *tally { return &tally{names: map[string]*counted{}} }

// add counts an event. A name that is new is still to be described.
func (t *tally) add(name string, f family) (c *counted, fresh bool) {
	t.all.add(f)
	if c = t.names[name]; c == nil {
		if len(t.names) >= tallyMost {
			t.forget()
		}
		c, fresh = &counted{}, true
		t.names[name] = c
	}
	c.add(f)
	return c, fresh
}

func (t *tally) forget() {
	for _, name := range t.hottest()[tallyMost/2:] {
		delete(t.names, name)
	}
}

// hottest are the names in the order of what happens now, then of all that happened.
func (t *tally) hottest() []string {
	return slices.SortedFunc(maps.Keys(t.names), func(a, b string) int {
		x, y := t.names[a], t.names[b]
		return cmp.Or(cmp.Compare(y.heat, x.heat), cmp.Compare(y.total, x.total), cmp.Compare(a, b))
	})
}

// pass lets time go by.
func (t *tally) pass(d time.Duration) {
	keep := math.Exp2(-float64(d) / float64(halfLife))
	t.age += d
	t.all.heat *= keep
	for _, c := range t.names {
		c.heat *= keep
	}
}

// rate is how many events a second there are now.
func (t *tally) rate(c *counted) float64 {
	age := max(t.age, time.Second)                          // of a moment no rate can be told
	whole := 1 - math.Exp2(-float64(age)/float64(halfLife)) // what a steady rate would have by now
	return c.heat * math.Ln2 / halfLife.Seconds() / whole
}
