// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == childFlag {
		if err := child(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestStores appends to every store, past its limit, and reads back what has to be
// there: the newest events, without a gap, byte for byte, all of them on disk.
func TestStores(t *testing.T) {
	const limit = 16 << 20
	for _, p := range peers {
		for _, s := range []shape{shapes[0], shapes[4]} {
			t.Run(p.name+"/"+s.name, func(t *testing.T) {
				j := job{Op: "append", Store: p.name, Shape: s.name, Dir: t.TempDir(), Limit: limit, Warm: 16, Count: 64}
				wrote, err := j.start()
				if err != nil {
					t.Fatal(err)
				}
				if wrote.Events != 64*s.events || wrote.Written < wrote.Bytes || wrote.RSS == 0 || wrote.CPU == 0 {
					t.Errorf("measured %+v", wrote)
				}
				if p.name == "ring" {
					return // has forgotten where it starts
				}
				if err := dropCache(j.Dir); err != nil {
					t.Fatal(err)
				}
				j.Op = "drain"
				read, err := j.start()
				if err != nil {
					t.Fatal(err)
				}
				if read.Last != wrote.Last || read.Bytes < limit/4 {
					t.Errorf("has events %d to %d, %d bytes, of %d that were appended", read.First, read.Last, read.Bytes, wrote.Last)
				}
				if p.name == raw {
					return // forgets nothing
				}
				if again, err := j.start(); err != nil || again.Events > s.events {
					t.Errorf("after all were read: %d events, %v", again.Events, err)
				}
			})
		}
	}
}

// TestVolatilePages is the control of the check that append is durable.
func TestVolatilePages(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Cachestat(^uint(0), &unix.CachestatRange{}, &unix.Cachestat_t{}, 0); errors.Is(err, unix.ENOSYS) {
		t.Skip("needs cachestat, Linux 6.5")
	}
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := uint64(0)
	for range 10 { // the kernel may have written them before they are counted, but not each time
		if _, err := f.WriteAt(make([]byte, 5*4096), 0); err != nil {
			t.Fatal(err)
		}
		if n, err = volatilePages(dir, ""); n == 5 || err != nil {
			break
		}
	}
	if n != 5 || err != nil {
		t.Errorf("%d volatile pages, want 5: %v", n, err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if n, err := volatilePages(dir, ""); n != 0 || err != nil {
		t.Errorf("%d volatile pages after a sync: %v", n, err)
	}
}
