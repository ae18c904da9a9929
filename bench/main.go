// SPDX-License-Identifier: Apache-2.0

// Command bench measures the buffer side by side with what others use to keep events
// on disk: rounds in which every store does the same work one after the other, so that
// what the host does meanwhile meets all of them. What it measured it appends to a file
// of results; a run that was ended goes on there.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	var err error
	if len(os.Args) == 2 && os.Args[1] == childFlag {
		err = child(os.Stdin, os.Stdout)
	} else {
		err = run(os.Args[1:], os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// cell is one question, asked of several stores.
type cell struct {
	name   string
	shape  shape
	op     string
	stores []string
	limit  int64
	fill   int64 // bytes of events before the measurement
	bytes  int64 // bytes of events that are measured
	cold   bool
	kill   bool
}

const (
	kib = 1 << 10
	mib = 1 << 20
)

func cells() []cell {
	var all, readers []string
	for _, p := range peers {
		all = append(all, p.name)
		if p.name != "ring" && p.name != "adaptive" {
			readers = append(readers, p.name)
		}
	}
	product := shapes[len(shapes)-1]
	var c []cell
	for _, s := range shapes {
		c = append(c, cell{name: "append " + s.name, op: "append", shape: s, stores: all, limit: 64 * mib, fill: 68 * mib, bytes: 40 * mib})
	}
	for _, cold := range []bool{true, false} {
		name := "drain warm"
		if cold {
			name = "drain cold"
		}
		c = append(c, cell{name: name, op: "drain", shape: product, stores: readers, limit: 128 * mib, fill: 48 * mib, cold: cold})
	}
	for _, size := range []int64{512, 5 << 10} {
		stores := []string{ours, "otel", "diskqueue", "tidwall", "wlog"}
		if size > 512 {
			stores = []string{ours}
		}
		for _, kill := range []bool{false, true} {
			name := fmt.Sprintf("open %d MiB", size)
			if kill {
				name += " killed"
			}
			c = append(c, cell{name: name, op: "open", shape: product, stores: stores, limit: size * mib, fill: size * mib * 9 / 10, cold: true, kill: kill})
		}
	}
	return c
}

// sample is one line of the results.
type sample struct {
	Cell, Store string
	Round       int
	result
}

func run(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	dir := fs.String("dir", "/var/tmp/edr-sensor-bench", "folder on the disk to measure, where the results are kept")
	rounds := fs.Int("rounds", 7, "rounds")
	pick := fs.String("cells", "", "only cells whose name contains one of these, separated by commas")
	stores := fs.String("stores", "", "only these stores, separated by commas")
	fresh := fs.Bool("fresh", false, "forget the results there are")
	docs := fs.String("docs", "", "write the tables and the picture into this folder")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := os.MkdirAll(*dir, 0o700); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(*dir, &st); err != nil {
		return err
	}
	if st.Type == unix.TMPFS_MAGIC {
		return fmt.Errorf("%s is in memory: give a folder on a disk with -dir", *dir)
	}
	name := filepath.Join(*dir, "results.jsonl")
	if *fresh {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	b := &bench{dir: *dir, out: out}
	if err := b.load(name); err != nil {
		return err
	}
	defer b.file.Close()
	for round := range *rounds {
		for _, c := range cells() {
			if *pick != "" && !slices.ContainsFunc(strings.Split(*pick, ","), func(s string) bool { return strings.Contains(c.name, s) }) {
				continue
			}
			for i := range c.stores {
				// Another one begins each time: none always follows the same one.
				store := c.stores[(i+round)%len(c.stores)]
				if *stores != "" && !slices.Contains(strings.Split(*stores, ","), store) {
					continue
				}
				if err := b.measure(c, store, round); err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
			}
		}
	}
	text := tables(b.samples)
	if *docs != "" {
		return errors.Join(writeDocs(*docs, text, b.samples), b.clean())
	}
	_, err := io.WriteString(out, text)
	return err
}

// bench is a run.
type bench struct {
	dir     string
	out     io.Writer
	file    *os.File
	samples []sample
}

// load reads the results there are, and will append to them.
func (b *bench) load(name string) (err error) {
	if b.file, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		return err
	}
	for s := bufio.NewScanner(b.file); s.Scan(); {
		var x sample
		if err := json.Unmarshal(s.Bytes(), &x); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		b.samples = append(b.samples, x)
	}
	return nil
}

func (b *bench) has(c cell, store string, round int) bool {
	return slices.ContainsFunc(b.samples, func(s sample) bool { return s.Cell == c.name && s.Store == store && s.Round == round })
}

// measure does one cell for one store, unless that is among the results.
func (b *bench) measure(c cell, store string, round int) error {
	if b.has(c, store, round) {
		return nil
	}
	probe, err := newBatch(c.shape)
	if err != nil {
		return err
	}
	batches := func(n int64) int { return int((n + int64(probe.bytes) - 1) / int64(probe.bytes)) }
	dir := filepath.Join(b.dir, "scratch")
	if c.op == "open" {
		dir = filepath.Join(b.dir, fmt.Sprintf("open-%d-%s", c.limit/mib, store))
	} else if err := os.RemoveAll(dir); err != nil {
		return err
	}
	// What the one before has left to the disk is not this one's.
	unix.Sync()
	fill := job{Op: "append", Store: store, Shape: c.shape.name, Dir: dir, Limit: c.limit, Warm: batches(c.fill), Count: batches(c.bytes)}
	var r result
	switch _, err := os.Stat(dir); {
	case err == nil: // of an earlier round
	case !errors.Is(err, os.ErrNotExist):
		return err
	default:
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if r, err = fill.start(); err != nil {
			return err
		}
	}
	switch c.op {
	case "append":
		if round == 0 && store != "ring" {
			if err := verify(fill, r); err != nil {
				return err
			}
		}
	default:
		if c.cold {
			if err := dropCache(dir); err != nil {
				return err
			}
		}
		// The cell that opens after a kill follows the one that is to be killed.
		j := job{Op: c.op, Store: store, Shape: c.shape.name, Dir: dir, Limit: c.limit, Kill: c.op == "open" && !c.kill}
		filled := r
		if r, err = j.start(); err != nil {
			return err
		}
		if c.op == "drain" && (r.Last != filled.Last || r.First != 1) {
			return fmt.Errorf("%s: has events %d to %d of %d", store, r.First, r.Last, filled.Last)
		}
	}
	s := sample{Cell: c.name, Store: store, Round: round, result: r}
	b.samples = append(b.samples, s)
	fmt.Fprintf(os.Stderr, "%d  %-20s %-10s %8.1f ms\n", round+1, c.name, store, r.Seconds*1e3)
	line, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if _, err := b.file.Write(append(line, '\n')); err != nil {
		return err
	}
	if c.op == "open" {
		return nil
	}
	return os.RemoveAll(dir)
}

// verify reads back from the disk what the job j has appended.
func verify(j job, wrote result) error {
	if err := dropCache(j.Dir); err != nil {
		return err
	}
	j.Op = "drain"
	read, err := j.start()
	if err == nil && (read.Last != wrote.Last || read.Bytes < j.Limit/4) {
		err = fmt.Errorf("%s: has events %d to %d of %d", j.Store, read.First, read.Last, wrote.Last)
	}
	return err
}

// clean removes what the measurements have left, the results aside.
func (b *bench) clean() error {
	left, err := filepath.Glob(filepath.Join(b.dir, "open-*"))
	for _, dir := range append(left, filepath.Join(b.dir, "scratch")) {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}
