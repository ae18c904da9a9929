// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestSetAside gives up records that cannot be delivered: a bounded number of copies is
// kept, each is a loss with a name, and what a record that is given up told is told again.
func TestSetAside(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	q.Forfeit(900, 909, "server_loss") // told by record 1
	told := Loss{"server_loss", 900, 909, 10}
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	b := q.NewBatch()
	for i := range maxRefused + 3 {
		if err := b.End(fmt.Appendf(b.Begin(Events), "record %d", i+1), false); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			b.Name([]Loss{told})
		}
	}
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	recs, err := q.Read(t.Context(), 0, nil, 100, 1<<20)
	if err != nil || len(recs) != maxRefused+3 {
		t.Fatalf("%d records, %v", len(recs), err)
	}
	var paths []string
	for _, r := range recs[:maxRefused+2] {
		path, err := q.SetAside(r, "refused")
		if err != nil {
			t.Fatal(err)
		}
		if content, err := os.ReadFile(path); err != nil || string(content) != string(r.Data) {
			t.Errorf("%s: %q, %v", path, content, err)
		}
		paths = append(paths, path)
	}
	if again, err := q.SetAside(recs[maxRefused], "refused"); err != nil || again != paths[maxRefused] {
		t.Errorf("a second copy: %s, %v", again, err)
	}
	for i, path := range paths {
		if _, err := os.Stat(path); os.IsNotExist(err) != (i < 2) {
			t.Errorf("copy %d: %v", i+1, err)
		}
	}
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []Loss{span{1, maxRefused + 2}.loss("refused"), told}
	if d := cmp.Diff(want, q.Unnamed(nil)); d != "" {
		t.Errorf("losses (-want +got):\n%s", d)
	}
	info := q.Info()
	if len(info.Aside) != maxRefused || info.Quarantined == 0 {
		t.Fatalf("set aside: %+v, %d bytes", info.Aside, info.Quarantined)
	}
	if a := info.Aside[0]; a.Record != 3 || a.Chunk != 0 || a.Path != paths[2] || a.At.IsZero() {
		t.Errorf("the oldest copy: %+v", a)
	}
	// Without a copy there is an error.
	if path, err := quarantineRecord(filepath.Join(o.Dir, "gone", fileName), time.Now(), o.Cap, q.Epoch(), &recs[maxRefused+2]); err == nil {
		t.Errorf("a copy in a directory that is not there: %s", path)
	}
}

// TestGivenUp: what was given up stays so over a restart that tells nobody of it, is no loss
// a second time when it is dropped, and is forgotten with it.
func TestGivenUp(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	appendRecords := func(n, size int) {
		t.Helper()
		for range n {
			b := q.NewBatch()
			if err := b.End(append(b.Begin(Events), make([]byte, size)...), false); err != nil {
				t.Fatal(err)
			}
			if err := q.Append(t.Context(), b); err != nil {
				t.Fatal(err)
			}
		}
		if err := q.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	again := func() {
		t.Helper()
		if err := q.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		q = open(t, o)
	}
	appendRecords(5, 100)
	recs, err := q.Read(t.Context(), 0, nil, 100, 1<<20)
	if err != nil || len(recs) != 5 {
		t.Fatalf("%d records, %v", len(recs), err)
	}
	for _, i := range []int{1, 3} {
		if _, err := q.SetAside(recs[i], "refused"); err != nil {
			t.Fatal(err)
		}
	}
	want := []uint64{2, 4}
	if got := q.GivenUp(); !slices.Equal(got, want) {
		t.Errorf("given up %v, want %v", got, want)
	}
	again()
	if got := q.GivenUp(); !slices.Equal(got, want) {
		t.Errorf("given up %v after a restart, want %v", got, want)
	}
	refused := []Loss{span{2, 2}.loss("refused"), span{4, 4}.loss("refused")}
	if d := cmp.Diff(refused, q.Unnamed(nil)); d != "" {
		t.Errorf("losses (-want +got):\n%s", d)
	}
	// The disk overflows, and nothing of it was delivered.
	for q.Bounds().First < 10 {
		appendRecords(10, 32<<10)
	}
	if recs, err = q.Read(t.Context(), 0, nil, 1, 1); err != nil {
		t.Fatal(err)
	}
	appendRecords(1, 100)
	if got := q.GivenUp(); got != nil {
		t.Errorf("given up %v after all were dropped", got)
	}
	lost := map[uint64]int{}
	for _, l := range q.Unnamed(nil) {
		for seq := l.First; seq <= l.Last; seq++ {
			lost[seq]++
		}
	}
	for seq := uint64(1); seq < recs[0].Seq; seq++ {
		if lost[seq] != 1 {
			t.Errorf("record %d is lost %d times", seq, lost[seq])
		}
	}
	if st := q.Stats(); st.Truncated != recs[0].Seq-1-2 {
		t.Errorf("%d counted as truncated of the %d before %d, of which two were given up", st.Truncated, recs[0].Seq-1, recs[0].Seq)
	}
	again()
	if got := q.GivenUp(); got != nil {
		t.Errorf("given up %v after a restart", got)
	}
}

// TestGivenUpInAnotherEpoch: the server of another epoch is asked anew.
func TestGivenUpInAnotherEpoch(t *testing.T) {
	q := open(t, small(t.TempDir()))
	b := q.NewBatch()
	for range 3 {
		if err := b.End(append(b.Begin(Events), "record"...), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	recs, err := q.Read(t.Context(), 0, nil, 100, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := q.SetAside(recs[1], "refused"); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Renew(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if got := q.GivenUp(); got != nil {
		t.Errorf("given up %v", got)
	}
}
