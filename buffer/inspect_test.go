// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// walked is a record as a test compares it.
type walked struct {
	seq    uint64
	stream Stream
	urgent bool
	data   string
}

// walk returns every record of a snapshot, and its chunks that are not intact.
func walk(t *testing.T, path string) (s *Snapshot, recs []walked, bad []Chunk) {
	t.Helper()
	s, err := Inspect(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	err = s.Walk(t.Context(), Range{}, func(c *Chunk) bool {
		if c.Err != nil {
			bad = append(bad, *c)
		} else if c.Written.IsZero() || time.Since(c.Written) > time.Hour {
			t.Errorf("chunk at seq %d was written %s", c.First, c.Written)
		}
		for r := range c.Records() {
			recs = append(recs, walked{r.Seq, r.Stream, r.Urgent, string(r.Data)})
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, recs, bad
}

func scanned(t *testing.T, q *Queue) (recs []walked) {
	t.Helper()
	err := q.Scan(t.Context(), time.Unix(0, 0), func(r Record) bool {
		recs = append(recs, walked{r.Seq, r.Stream, r.Urgent, string(r.Data)})
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return recs
}

// TestInspectSeesWhatTheQueueHas compares a snapshot with the queue itself: open, closed
// and as a kill leaves it, with a retention tail.
func TestInspectSeesWhatTheQueueHas(t *testing.T) {
	o := small(fastDir(t))
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(1, 2))}
	s.q = open(t, o)
	for i := range 600 {
		s.produce(1+i%3, 2000, i%9 == 0)
		s.must(s.q.Flush(t.Context()))
	}
	s.deliver(40, 1<<20, 0)
	s.q.mu.Lock()
	s.q.force = true
	s.q.mu.Unlock()
	s.must(s.q.Flush(t.Context()))

	want, stats := scanned(t, s.q), s.q.Stats()
	compare := func(name string, inUse bool) {
		t.Helper()
		before := read(t, s.q.path)
		snap, got, bad := walk(t, o.Dir)
		if !bytes.Equal(before, read(t, s.q.path)) {
			t.Errorf("%s: the file was changed", name)
		}
		if snap.Damage != nil || len(bad) > 0 || snap.InUse != inUse {
			t.Fatalf("%s: damage %v, bad %v, in use %v", name, snap.Damage, bad, snap.InUse)
		}
		if inUse && !strings.HasPrefix(snap.Holder, "pid ") {
			t.Errorf("%s: held by %q", name, snap.Holder)
		}
		if len(got) != len(want) {
			t.Fatalf("%s: %d records, want %d", name, len(got), len(want))
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%s: record %d is %v, want %v", name, i, got[i], want[i])
			}
		}
		st := snap.Stats
		if st.Bounds != stats.Bounds || st.Records != stats.Records || st.Unsent != stats.Unsent || st.Bytes != stats.Bytes ||
			st.Truncated != stats.Truncated || st.Reclaimed != stats.Reclaimed || st.Epoch != stats.Epoch || st.Cap != o.Cap || st.OldestUnsent.IsZero() {
			t.Errorf("%s: %+v, want %+v", name, st, stats)
		}
		if err := invariant(st); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	compare("open", true)
	killed := filepath.Join(fastDir(t), "killed")
	plant(t, killed, read(t, s.q.path))
	if _, got, bad := walk(t, killed); len(got) != len(want) || len(bad) > 0 {
		t.Errorf("as killed: %d records, want %d, bad %v", len(got), len(want), bad)
	}
	closeQueue(t, s.q)
	compare("closed", false)
	if _, err := Inspect(t.Context(), t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
}

// TestInspectShowsDamagedChunk: one is shown as that, with what was expected in it, and
// the others are not affected.
func TestInspectShowsDamagedChunk(t *testing.T) {
	dir := fastDir(t)
	data := filled(t, true)
	plant(t, dir, data)
	_, all, _ := walk(t, dir)
	s, err := Inspect(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	e := s.index.live()[5]
	s.Close()
	data[int(e.root)*pageSize+leafHeader+chunkHeader+1] ^= 1
	plant(t, dir, data)
	snap, got, bad := walk(t, dir)
	if snap.Damage != nil || len(bad) != 1 || bad[0].First != e.first || bad[0].Last != e.last() || bad[0].Gone || !errors.Is(bad[0].Err, errChunk) {
		t.Fatalf("%v, bad %+v", snap.Damage, bad)
	}
	if uint64(len(all)-len(got)) != bad[0].Last-bad[0].First+1 {
		t.Errorf("%d records of %d", len(got), len(all))
	}
}

// TestInspectAgreesWithSalvage: of a file whose tree is damaged, a snapshot has exactly
// what the next Open salvages.
func TestInspectAgreesWithSalvage(t *testing.T) {
	for _, clean := range []bool{true, false} {
		data := filled(t, clean)
		rng := rand.New(rand.NewPCG(3, 3))
		for kind := range 21 {
			name, harmed := harm(t, rng, kind, bytes.Clone(data))
			dir := filepath.Join(fastDir(t), "b")
			plant(t, dir, harmed)
			snap, got, _ := walk(t, dir)
			q, err := Open(t.Context(), small(dir))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			r, want := q.Stats().Recovery, scanned(t, q)
			closeQueue(t, q)
			if (r != nil) != (snap.Damage != nil) {
				t.Fatalf("%s: damage %v, recovery %+v", name, snap.Damage, r)
			}
			if r != nil && r.Exact != snap.Exact {
				t.Errorf("%s: exact %v, recovery %+v", name, snap.Exact, r)
			}
			if len(got) != len(want) {
				t.Fatalf("%s: %d records, Open has %d (%v)", name, len(got), len(want), snap.Damage)
			}
			for i := range got {
				if got[i].data != want[i].data {
					t.Fatalf("%s: record %d is %v, want %v", name, i, got[i].seq, want[i].seq)
				}
			}
		}
	}
}

// TestInspectBesideRunningQueue takes snapshots while the ring turns: all they show is
// intact, of one transaction, or has left.
func TestInspectBesideRunningQueue(t *testing.T) {
	o := small(fastDir(t))
	q := open(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := uint64(0); ctx.Err() == nil; i++ {
			b := q.NewBatch()
			for range 40 {
				rec := binary.BigEndian.AppendUint64(b.Begin(Events), b.count64()+q.Next())
				if b.End(append(rec, make([]byte, i*97%900)...), false) != nil {
					t.Error("record refused")
				}
			}
			if q.Append(ctx, b) != nil {
				return
			}
		}
	}()
	defer func() { cancel(); <-done }()
	gone, chunks := 0, 0
	for n := 0; n < 60 || gone == 0 && n < 5000; n++ {
		s, recs, bad := walk(t, o.Dir)
		if s.Damage != nil {
			t.Fatal(s.Damage)
		}
		for _, c := range bad {
			if !c.Gone {
				t.Fatalf("chunk at seq %d: %v", c.First, c.Err)
			}
			gone++
		}
		for _, r := range recs {
			if binary.BigEndian.Uint64([]byte(r.data)) != r.seq {
				t.Fatalf("seq %d holds that of %d", r.seq, binary.BigEndian.Uint64([]byte(r.data)))
			}
		}
		if err := invariant(s.Stats); err != nil {
			t.Fatal(err)
		}
		chunks += len(s.index.live())
		s.Close()
	}
	t.Logf("%d chunks seen, %d of them gone when read", chunks, gone)
}

func (b *Batch) count64() uint64 { return uint64(b.count) }
