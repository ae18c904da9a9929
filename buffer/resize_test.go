// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// resized fills a queue, changes its size while it is in use, and asks for an account.
func TestResize(t *testing.T) {
	yes := true
	for _, c := range []struct {
		name     string
		from, to int64
		drops    *bool
	}{
		{"grow", 2 * mib, 5*mib + 100, new(bool)},
		{"shrink", 5 * mib, 2 * mib, &yes},
		{"shrink by a page", 2 * mib, 2*mib - pageSize, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := small(fastDir(t))
			o.Cap, o.RetainBytes = c.from, 256*kib
			s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(4, 4))}
			s.q = open(t, o)
			fillUp := func() {
				for range 3 * s.q.Stats().Cap / (40 * kib) {
					s.produce(30, 2700, false)
				}
				s.must(s.q.Flush(t.Context()))
			}
			fillUp()
			s.connect()
			s.deliver(100, 1<<20, 2) // the reply is lost: some of what is dropped is in doubt
			before := s.q.Stats()
			// Appends go on meanwhile.
			done := make(chan error, 1)
			go func() { done <- s.q.Resize(context.Background(), c.to) }()
			var err error
			for n, busy := 0, true; busy || n < 20; n++ {
				s.produce(5, 2000, false)
				select {
				case err = <-done:
					busy = false
				default:
				}
				s.must(invariant(s.q.Stats()))
			}
			s.must(err)
			s.must(s.q.Flush(t.Context()))
			to := c.to - c.to%pageSize
			st := s.q.Stats()
			if fi, err := os.Stat(s.q.path); err != nil || fi.Size() != to || st.Cap != to || st.Bytes > to {
				t.Fatalf("%v, %v, %+v", fi.Size(), err, st)
			}
			if r := st.Resized; r == nil || r.From != before.Cap || r.To != to || r.Err != nil || c.drops != nil && (r.Dropped > 0) != *c.drops {
				t.Errorf("%+v", st.Resized)
			}
			if left, err := filepath.Glob(s.q.path + ".*"); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
			fillUp() // and the new size is used
			if got := s.q.Stats().Bytes; float64(got) < 0.6*float64(to) {
				t.Errorf("%d bytes of %d are used", got, to)
			}
			for range 30 {
				s.settle()
			}
			s.must(s.verify())
			o.Cap = c.to
			closeQueue(t, s.q)
			check(t, s.q.path)
			s.q = open(t, o)
			if s.q.Stats().Recovery != nil || s.q.Stats().Resized != nil {
				t.Errorf("%+v", s.q.Stats())
			}
			for range 3 {
				s.settle()
			}
			s.must(s.verify())
		})
	}
}

// TestResizeIsRefused: what cannot be keeps the size, and says why.
func TestResizeIsRefused(t *testing.T) {
	dir := filepath.Join(mount(t, "-t", "tmpfs", "-o", "size=3m", "tmpfs"), "buffer")
	o := small(dir)
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(4, 4))}
	s.q = open(t, o)
	s.produce(20, 2000, false)
	for _, c := range []struct {
		to   int64
		want string
	}{
		{8 * mib, "make room, or set a smaller buffer.cap"},
		{1 * mib, "too small for commits"},
	} {
		err := s.q.Resize(t.Context(), c.to)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d: %v", c.to, err)
		}
		st := s.q.Stats()
		if st.Cap != o.Cap || st.Resized == nil || !errors.Is(err, st.Resized.Err) && st.Resized.Err.Error() != err.Error() {
			t.Errorf("%+v", st)
		}
		if fi, err := os.Stat(s.q.path); err != nil || fi.Size() != o.Cap {
			t.Errorf("%v, %v", fi, err)
		}
	}
	for range 3 {
		s.settle()
	}
	s.must(s.verify())
	// The same at a start: better the old size than none.
	closeQueue(t, s.q)
	o.Cap = 8 * mib
	s.q = open(t, o)
	if st := s.q.Stats(); st.Cap != 2*mib || st.Resized == nil || st.Resized.Err == nil {
		t.Errorf("%+v", st)
	}
	closeQueue(t, s.q)
	if err := s.q.Resize(t.Context(), 2*mib); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// TestShrinkAtOpen: a file that has used more than the cap is made smaller when it is
// opened, and the oldest records go.
func TestShrinkAtOpen(t *testing.T) {
	o := small(fastDir(t))
	o.Cap = 4 * mib
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(4, 4))}
	s.q = open(t, o)
	for range 300 {
		s.produce(20, 2000, false)
	}
	s.must(s.q.Flush(t.Context()))
	closeQueue(t, s.q)
	o.Cap = 2 * mib
	s.q = open(t, o)
	st := s.q.Stats()
	if r := st.Resized; st.Cap != o.Cap || r == nil || r.Err != nil || r.Dropped == 0 || st.Recovery != nil {
		t.Fatalf("%+v %+v", st, r)
	}
	for range 30 {
		s.settle()
	}
	s.must(s.verify())
}

// TestShrinkMeetsDamage: a damaged chunk does not stop it, and is accounted for.
func TestShrinkMeetsDamage(t *testing.T) {
	o := small(fastDir(t))
	o.Cap = 4 * mib
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(4, 4))}
	s.q = open(t, o)
	for range 300 {
		s.produce(20, 2000, false)
	}
	s.must(s.q.Flush(t.Context()))
	s.q.mu.Lock()
	l := s.q.index.live()
	bad := l[len(l)-3]
	s.q.mu.Unlock()
	f, err := os.OpenFile(s.q.path, os.O_RDWR, 0)
	s.must(err)
	defer f.Close()
	_, err = f.WriteAt([]byte{0xff, 0xff, 0xff}, int64(bad.root)*pageSize+leafHeader+60)
	s.must(err)
	s.must(s.q.Resize(t.Context(), 2*mib))
	st := s.q.Stats()
	if st.Corrupt != uint64(bad.count) || st.Cap != 2*mib || st.Recovery != nil {
		t.Errorf("%+v", st)
	}
	for range 30 {
		s.settle()
	}
	s.must(s.verify())
}

// TestResizeUnderReader resizes while records are read as fast as they come: none is
// missed, none comes twice, and no read fails.
func TestResizeUnderReader(t *testing.T) {
	o := small(fastDir(t))
	o.Cap = 6 * mib
	q := open(t, o)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	const total = 20_000
	errs := make(chan error, 2)
	go func() {
		for n := 0; n < total; {
			b := q.NewBatch()
			for range 50 {
				if err := b.End(appendItem(b.Begin(Events), uint64(n+1), 700), false); err != nil {
					errs <- err
					return
				}
				n++
			}
			for q.Stats().UnsentBytes > 1*mib { // so that nothing has to be dropped
				select {
				case <-ctx.Done():
					errs <- ctx.Err()
					return
				case <-time.After(time.Millisecond):
				}
			}
			if err := q.Append(ctx, b); err != nil {
				errs <- err
				return
			}
		}
		errs <- nil
	}()
	go func() {
		for i := 0; ; i++ {
			to := int64(3+i%4) * mib
			if err := q.Resize(ctx, to); err != nil {
				errs <- err
				return
			}
			if q.Bounds().Last >= total {
				errs <- nil
				return
			}
		}
	}()
	var recs []Record
	for seq := uint64(0); seq < total; {
		var err error
		if recs, err = q.Read(ctx, seq, recs[:0], 200, 256*kib); err != nil {
			t.Fatal(err)
		}
		for _, r := range recs {
			if seq++; r.Seq != seq || be64(r.Data[1:9]) != seq {
				t.Fatalf("seq %d holds item %d, expected %d", r.Seq, be64(r.Data[1:9]), seq)
			}
		}
		q.Ack(seq)
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if s := q.Stats(); s.Truncated+s.Corrupt > 0 || s.Resized == nil {
		t.Errorf("%+v", s)
	}
}

// TestResizeMeetsDamage: a damaged chunk that cannot be copied may have been delivered
// before this process began, with the reply lost. Then it is in doubt, not lost.
func TestResizeMeetsDamage(t *testing.T) {
	o := small(fastDir(t))
	o.Cap = 4 * mib
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(4, 4))}
	s.q = open(t, o)
	for range 20 {
		s.produce(10, 2000, false)
		s.must(s.q.Flush(t.Context()))
	}
	s.connect()
	s.deliver(100, 1<<20, 2)
	closeQueue(t, s.q)
	s.q = open(t, o)
	bad := s.q.index.live()[3]
	f, err := os.OpenFile(s.q.path, os.O_RDWR, 0)
	s.must(err)
	_, err = f.WriteAt([]byte("rot"), int64(bad.root)*pageSize+leafHeader+20)
	s.must(errors.Join(err, f.Close()))
	s.must(s.q.Resize(t.Context(), 2*mib))
	if st := s.q.Stats(); st.InDoubt != uint64(bad.count) || st.Corrupt != 0 {
		t.Errorf("%+v", st)
	}
	for range 5 {
		s.settle()
	}
	s.must(s.verify())
}
