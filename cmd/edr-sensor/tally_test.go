// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// TestTallyIsBounded has one name that is busy among very many that come once.
func TestTallyIsBounded(t *testing.T) {
	y := newTally()
	fresh := 0
	const others = 10 * tallyMost
	for i := range others {
		for name, f := range map[string]family{"busy": ofNet, fmt.Sprint(i): ofProcess} {
			if _, is := y.add(name, f); is {
				fresh++
			}
		}
		if n := len(y.names); n > tallyMost {
			t.Fatalf("%d names are remembered", n)
		}
	}
	if c := y.names[y.hottest()[0]]; c.total != others || c.by[ofNet] != others || c.by[ofProcess] != 0 {
		t.Errorf("the busiest has %d of %d", c.total, others)
	}
	if y.all.total != 2*others || fresh != others+1 {
		t.Errorf("%d events in all, %d fresh", y.all.total, fresh)
	}
}

func TestTallyRate(t *testing.T) {
	y := newTally()
	check := func(when string, want, within float64) {
		t.Helper()
		if got := y.rate(&y.all); math.Abs(got-want) > within {
			t.Errorf("%s: %f a second, want %f", when, got, want)
		}
	}
	check("at first", 0, 0)
	for second := range 120 {
		for range 40 {
			y.add("x", ofFile)
			y.pass(time.Second / 40)
		}
		if second == 0 || second == 10 || second == 119 {
			check(fmt.Sprint("after second ", second), 40, 0.6)
		}
	}
	y.pass(halfLife)
	check("after a half-life of nothing", 20, 0.3)
	y.pass(time.Hour)
	check("after an hour of nothing", 0, 0.001)
}

func TestShort(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 9999: "9999", 10000: "10k", 12345: "12k", 999_499: "999k", 999_500: "1.0M", 1_234_567: "1.2M", 98_765_432_100: "99G", math.MaxUint64: "many"} {
		if got := short(n); got != want || len(got) > 5 {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

// FuzzFold holds texts against the width that they are for.
func FuzzFold(f *testing.F) {
	f.Add("some words that are long enough", 9, 3)
	f.Add("日本語 ü", 3, 1)
	f.Add(nasty, 20, 2)
	f.Fuzz(func(t *testing.T, text string, width, most int) {
		if width <= 0 || most <= 0 || width > 1000 {
			return
		}
		clean := safe(text)
		lines := fold(clean, width, most)
		if len(lines) > most {
			t.Errorf("%d lines, not %d", len(lines), most)
		}
		shown := 0
		for _, l := range lines {
			if columns(l) > width || !utf8.ValidString(l) {
				t.Errorf("%q takes %d columns of %d", l, columns(l), width)
			}
			if a := asciiText(l); utf8.RuneCountInString(l) != len(a) || strings.ContainsFunc(a, func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("%q is %q in ASCII", l, a)
			}
			shown += len(strings.ReplaceAll(l, " ", ""))
		}
		if whole := len(strings.ReplaceAll(clean, " ", "")); len(lines) < most && shown != whole && width > 1 {
			t.Errorf("%q loses %d bytes: %q", clean, whole-shown, lines)
		}
		if got := pad(text, width); columns(got) != width {
			t.Errorf("%q takes %d columns, want %d", got, columns(got), width)
		}
	})
}

// BenchmarkTop counts events as they are.
func BenchmarkTop(b *testing.B) {
	files, err := filepath.Glob("../../sensor/ocsf/testdata/*.json")
	if err != nil || len(files) == 0 {
		b.Fatalf("%d golden events, %v", len(files), err)
	}
	var lines [][]byte
	size := 0
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			b.Fatal(err)
		}
		var line bytes.Buffer
		if json.Compact(&line, text) == nil {
			lines = append(lines, line.Bytes())
			size += line.Len()
		}
	}
	t := &top{now: time.Now}
	t.reset()
	b.SetBytes(int64(size / len(lines)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		t.count(lines[i%len(lines)])
	}
}
