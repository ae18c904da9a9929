// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// takeAll delivers to a server that knows nothing of the epoch, and returns the items it
// gets, in order.
func (s *sim) takeAll() (items []uint64) {
	s.t.Helper()
	s.led, s.pos = newLedger(), 0
	for range 5 { // names of losses are themselves delivered
		s.settle()
	}
	for seq := uint64(1); seq <= s.led.last; seq++ {
		if it := s.led.items[seq]; it != 0 {
			items = append(items, it)
		}
	}
	s.must(errors.Join(s.led.errs...))
	return items
}

// unacked returns the items that are live and not acknowledged.
func unacked(t *testing.T, q *Queue) (items []uint64) {
	t.Helper()
	b := q.Bounds()
	for _, r := range scanned(t, q) {
		if r.seq > b.Acked && r.data[0] == kindItem {
			items = append(items, be64([]byte(r.data[1:9])))
		}
	}
	return items
}

// TestRenew moves what is not acknowledged to another epoch: all of it, in order, from
// seq 1, with counts of what was lost, and again after a restart.
func TestRenew(t *testing.T) {
	for name, c := range map[string]struct {
		produce, deliver int
		fate             int
		early            bool
	}{
		"nothing stored":             {},
		"all undelivered":            {produce: 100},
		"amid a chunk":               {produce: 100, deliver: 33},
		"all delivered":              {produce: 10, deliver: 1000},
		"overrun, reply lost":        {produce: 900, deliver: 40, fate: 2, early: true},
		"overrun, much acknowledged": {produce: 900, deliver: 40, early: true},
	} {
		t.Run(name, func(t *testing.T) {
			o := small(fastDir(t))
			s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(5, 5))}
			s.q = open(t, o)
			for i := range c.produce {
				s.produce(1+i%3, 2000, false)
				if c.early && i == 50 {
					s.deliver(c.deliver, 1<<20, c.fate)
				}
			}
			s.must(s.q.Flush(t.Context()))
			if c.deliver > 0 && !c.early {
				s.deliver(c.deliver, 1<<20, 0)
				s.must(s.q.Flush(t.Context()))
			}
			before, epoch, want := s.q.Stats(), s.q.Epoch(), unacked(t, s.q)
			high := "f" + epoch[1:]
			got, err := s.q.Renew(t.Context(), high)
			s.must(err)
			if got <= high || got != s.q.Epoch() || len(got) != epochLen {
				t.Fatalf("epoch %s, was %s", got, epoch)
			}
			st := s.q.Stats()
			s.must(invariant(st))
			if st.Unsent != before.Unsent || st.Acked != 0 || st.Last != before.Last-before.Acked || st.InDoubt != 0 || s.q.Next() != st.Last+1 {
				t.Errorf("%+v, before %+v", st, before)
			}
			if lost := before.Truncated + before.InDoubt - st.Truncated; lost != 0 {
				t.Errorf("%d are no longer counted", lost)
			}
			var count uint64
			for _, l := range s.q.Unnamed(nil) {
				if l.First == 0 {
					count += l.Count
				}
			}
			if count != st.Truncated-s.led.named() {
				t.Errorf("%d records are unnamed, %d are lost", count, st.Truncated)
			}
			for range 2 { // the second time after a restart
				if diff := cmp.Diff(want, unacked(t, s.q)); diff != "" {
					t.Fatalf("(-want +got):\n%s", diff)
				}
				snap, recs, bad := walk(t, o.Dir)
				if len(bad) > 0 || snap.Damage != nil || len(recs) != int(st.Records) || snap.Last != st.Last || snap.First != st.First {
					t.Errorf("seen from outside: %+v %v, want %+v", snap.Stats, snap.Damage, st)
				}
				for i, r := range scanned(t, s.q) {
					if recs[i] != r {
						t.Fatalf("seen from outside: %v, want %v", recs[i], r)
					}
				}
				closeQueue(t, s.q)
				s.q = open(t, o)
				if s.q.Epoch() != got || s.q.Stats().Bounds != st.Bounds {
					t.Fatalf("after a restart: %s %+v", s.q.Epoch(), s.q.Stats())
				}
			}
			items := s.takeAll()
			if diff := cmp.Diff(want, append([]uint64(nil), items[:min(len(want), len(items))]...)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			s.must(invariant(s.q.Stats()))
		})
	}
}

func (l *ledger) named() (n uint64) {
	for _, x := range l.lost {
		n += x.Count
	}
	return n
}

// TestRenewIsOneTransaction: when it fails before or after the disk did its work, the one
// epoch is in force or the other, whole.
func TestRenewIsOneTransaction(t *testing.T) {
	for _, after := range []bool{false, true} {
		o := small(fastDir(t))
		var g gate
		g.install(&o)
		s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(5, 5))}
		s.q = open(t, o)
		for range 50 {
			s.produce(3, 2000, false)
		}
		s.deliver(20, 1<<20, 0)
		s.must(s.q.Flush(t.Context()))
		want, old := unacked(t, s.q), s.q.Epoch()
		var copies []string
		g.mu.Lock()
		if after {
			g.failAfter = 1
		} else {
			g.failBefore = 1
		}
		for range 2 {
			dir := filepath.Join(fastDir(t), "copy")
			s.must(os.Mkdir(dir, 0o700))
			copies = append(copies, dir)
		}
		copyFile(t, filepath.Join(copies[0], fileName), s.q.path)
		g.mu.Unlock()
		epoch, err := s.q.Renew(t.Context(), "")
		s.must(err)
		g.mu.Lock()
		copyFile(t, filepath.Join(copies[1], fileName), s.q.path)
		g.mu.Unlock()
		for i, e := range []string{old, epoch} {
			o := small(copies[i])
			q := open(t, o)
			if q.Epoch() != e || q.Stats().Recovery != nil {
				t.Fatalf("copy %d: epoch %s, want %s, %+v", i, q.Epoch(), e, q.Stats().Recovery)
			}
			if diff := cmp.Diff(want, unacked(t, q)); diff != "" {
				t.Errorf("copy %d (-want +got):\n%s", i, diff)
			}
		}
		if items := s.takeAll(); !cmp.Equal(items[:len(want)], want) {
			t.Errorf("got %v, want %v", items, want)
		}
	}
}

// TestSalvageAfterRenew: the tree of a file with a second epoch is damaged. The epoch goes
// on, and so do its numbers.
func TestSalvageAfterRenew(t *testing.T) {
	o := small(fastDir(t))
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(5, 5))}
	s.q = open(t, o)
	for range 50 {
		s.produce(3, 2000, false)
	}
	s.deliver(20, 1<<20, 0)
	epoch, err := s.q.Renew(t.Context(), "")
	s.must(err)
	for range 50 {
		s.produce(3, 2000, false)
	}
	s.must(s.q.Flush(t.Context()))
	want, st := unacked(t, s.q), s.q.Stats()
	closeQueue(t, s.q)
	data := read(t, s.q.path)
	clear(data[2*pageSize : 4*pageSize]) // one of them, and the metas lead elsewhere
	m, err := metaInForce(bytesAt(data), int64(len(data)))
	s.must(err)
	clear(data[m.root*pageSize:][:pageSize])
	plant(t, o.Dir, data)
	s.q = open(t, o)
	r := s.q.Stats().Recovery
	if r == nil || !r.Exact || s.q.Epoch() != epoch || s.q.Bounds().Last != st.Last {
		t.Fatalf("%+v, %+v", r, s.q.Stats())
	}
	// A chunk was in the pages cleared, or not.
	if got, now := unacked(t, s.q), s.q.Stats(); len(want) != len(got)+int(now.Corrupt+now.InDoubt) {
		t.Errorf("%d of %d records, %+v", len(got), len(want), now)
	}
	s.takeAll()
	s.must(invariant(s.q.Stats()))
}

type bytesAt []byte

func (b bytesAt) ReadAt(p []byte, off int64) (int, error) { return copy(p, b[off:]), nil }
