// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/aurorasoc/edr-sensor/internal/metricstest"
)

// open opens a queue in dir and closes it at the end of the test.
func open(t testing.TB, o Options) *Queue {
	t.Helper()
	q, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeQueue(t, q) })
	return q
}

func closeQueue(t testing.TB, q *Queue) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := q.Close(ctx); err != nil {
		t.Error(err)
	}
}

// small is a queue that wraps after a few hundred kilobytes.
func small(dir string) Options {
	return Options{
		Dir: dir, Cap: 2 * mib, CommitBytes: 32 * kib, MaxRecord: 256 * kib,
		CommitInterval: time.Millisecond, AllowUnsafe: true,
	}
}

// add appends records with the given payloads in one batch.
func add(t testing.TB, q *Queue, payloads ...string) {
	t.Helper()
	b := q.NewBatch()
	for _, p := range payloads {
		if err := b.End(append(b.Begin(Events), p...), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
}

func TestQueueRoundTrip(t *testing.T) {
	dir := t.TempDir()
	q := open(t, small(dir))
	epoch := q.Epoch()
	for i := range 100 {
		b := q.NewBatch()
		for j := range 10 {
			rec := append(b.Begin(Stream(j%2)), fmt.Sprintf("record %d", i*10+j+1)...)
			if err := b.End(rec, j == 0); err != nil {
				t.Fatal(err)
			}
		}
		b.SetMark(fmt.Appendf(nil, "mark %d", i))
		if err := q.Append(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	check := func(q *Queue) {
		t.Helper()
		var after uint64
		for after < 1000 {
			recs, err := q.Read(t.Context(), after, nil, 7, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range recs {
				after++
				want := fmt.Sprintf("record %d", after)
				i := int(after-1) % 10
				if r.Seq != after || string(r.Data) != want || r.Stream != Stream(i%2) || r.Urgent != (i == 0) {
					t.Fatalf("got %d %q stream %d urgent %v, want %d %q", r.Seq, r.Data, r.Stream, r.Urgent, after, want)
				}
			}
		}
	}
	check(q)
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	closeQueue(t, q)

	q = open(t, small(dir))
	if q.Epoch() != epoch || q.Next() != 1001 || string(q.Mark()) != "mark 99" {
		t.Errorf("after reopen: epoch %s next %d mark %q", q.Epoch(), q.Next(), q.Mark())
	}
	check(q)
}

// testError returns buffer_errors_total{op}.
func testError(q *Queue, op string) float64 {
	return testutil.ToFloat64(q.metrics.errors.WithLabelValues(op))
}

// bubble opens a queue inside a synctest bubble, where time is at hand, and
// tells when its commits are durable.
func bubble(t *testing.T, o Options, fn func(t *testing.T, q *Queue, durable <-chan time.Time)) {
	o.Cap, o.Dir, o.AllowUnsafe = 16*mib, fastDir(t), true
	synctest.Test(t, func(t *testing.T) {
		durable := make(chan time.Time, 100)
		o.Committed = func([]byte) { durable <- time.Now() }
		q, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		fn(t, q, durable)
		closeQueue(t, q)
	})
}

func TestGroupCommit(t *testing.T) {
	cases := []struct {
		name   string
		urgent bool
		size   int
		want   time.Duration
	}{
		{"after the interval", false, 100, 50 * time.Millisecond},
		{"urgent", true, 100, 10 * time.Millisecond},
		{"full", false, 256 * kib, 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, Options{}, func(t *testing.T, q *Queue, durable <-chan time.Time) {
				add(t, q, "before") // the interval starts anew with each commit
				<-durable
				start := time.Now()
				b := q.NewBatch()
				if err := b.End(append(b.Begin(Events), make([]byte, c.size)...), c.urgent); err != nil {
					t.Fatal(err)
				}
				if err := q.Append(t.Context(), b); err != nil {
					t.Fatal(err)
				}
				if got := (<-durable).Sub(start); got != c.want {
					t.Errorf("durable after %v, want %v", got, c.want)
				}
			})
		})
	}
	t.Run("urgent joins what waits", func(t *testing.T) {
		bubble(t, Options{}, func(t *testing.T, q *Queue, durable <-chan time.Time) {
			start := time.Now()
			add(t, q, "patient")
			b := q.NewBatch()
			if err := b.End(append(b.Begin(DecisionsSystem), "urgent"...), true); err != nil {
				t.Fatal(err)
			}
			if err := q.Append(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			if got := (<-durable).Sub(start); got != urgentInterval || q.Bounds().Last != 2 {
				t.Errorf("durable after %v, %+v", got, q.Bounds())
			}
		})
	})
	t.Run("an acknowledgement alone within a second", func(t *testing.T) {
		bubble(t, Options{}, func(t *testing.T, q *Queue, durable <-chan time.Time) {
			add(t, q, "one")
			<-durable
			start := time.Now()
			q.Ack(1)
			if got := (<-durable).Sub(start); got != idleInterval || q.state.acked != 1 {
				t.Errorf("persisted after %v", got)
			}
		})
	})
}

func TestRetention(t *testing.T) {
	t.Run("age", func(t *testing.T) {
		bubble(t, Options{RetainAge: time.Minute}, func(t *testing.T, q *Queue, _ <-chan time.Time) {
			add(t, q, "old")
			if err := q.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			q.Ack(1)
			<-time.After(59 * time.Second)
			add(t, q, "new")
			if err := q.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			if b := q.Bounds(); b.First != 1 {
				t.Errorf("after 59 s: %+v", b)
			}
			<-time.After(3 * time.Second)
			add(t, q, "newer")
			if err := q.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := q.Stats(); s.First != 2 || s.Reclaimed != 1 || s.Truncated != 0 {
				t.Errorf("after 62 s: %+v", s)
			}
		})
	})
	t.Run("bytes", func(t *testing.T) {
		o := small(t.TempDir())
		o.RetainBytes = 100 * kib
		q := open(t, o)
		for i := range 100 {
			add(t, q, strings.Repeat("x", 5000))
			if err := q.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			q.Ack(uint64(i + 1))
		}
		if err := q.Flush(t.Context()); err != nil { // else the last one is taken in any time now
			t.Fatal(err)
		}
		if s := q.Stats(); s.Bytes > 110*kib || s.Bytes < 90*kib || s.Truncated != 0 {
			t.Errorf("%+v", s)
		}
		// What is kept can be read again.
		first := q.Bounds().First
		recs, err := q.Read(t.Context(), first-1, nil, 1000, 1<<20)
		if err != nil || recs[0].Seq != first || len(recs) < 10 {
			t.Errorf("%d records, %v", len(recs), err)
		}
	})
	t.Run("makes room first", func(t *testing.T) {
		q := open(t, small(t.TempDir()))
		for i := range 500 { // more than the file holds
			add(t, q, strings.Repeat("x", 10_000))
			if err := q.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			q.Ack(uint64(i)) // all but the last
		}
		if s := q.Stats(); s.Truncated != 0 || s.InDoubt != 0 || s.Reclaimed == 0 || s.Unsent != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestRecordLimits(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	b := q.NewBatch()
	if err := b.End(append(b.Begin(Events), make([]byte, o.MaxRecord+1)...), false); !errors.Is(err, ErrTooLarge) || b.Len() != 0 || b.Size() != 0 {
		t.Errorf("too large: %v, %d records", err, b.Len())
	}
	b.Begin(Events) // begun and forgotten
	want := []int{o.MaxRecord, 0, 1, 40_000, o.CommitBytes, 3}
	for i, n := range want {
		if i == 1 { // the largest record takes a batch of its own
			if err := q.Append(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			b = q.NewBatch()
		}
		rec := bytes.Repeat([]byte{byte(i)}, n)
		if i%2 == 0 {
			rec = append(b.Begin(DecisionsSystem), rec...)
		} else {
			b.Begin(DecisionsSystem) // a foreign slice is copied
		}
		if err := b.End(rec, true); err != nil {
			t.Fatal(err)
		}
	}
	if b.Len() != len(want)-1 {
		t.Errorf("%d records", b.Len())
	}
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	var got []int
	var recs []Record
	for len(got) < len(want) {
		var err error
		if recs, err = q.Read(t.Context(), uint64(len(got)), recs[:0], 100, 100); err != nil {
			t.Fatal(err)
		}
		for _, r := range recs {
			if r.Stream != DecisionsSystem || !r.Urgent || len(bytes.Trim(r.Data, string(rune(len(got))))) > 0 {
				t.Errorf("record %d is garbled", r.Seq)
			}
			got = append(got, len(r.Data))
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("sizes (-want +got):\n%s", d)
	}

	b = q.NewBatch()
	var err error
	for err == nil {
		err = b.End(append(b.Begin(Events), make([]byte, 100_000)...), false)
	}
	if !errors.Is(err, ErrBatchFull) || b.Size() < q.o.maxPending() {
		t.Errorf("%v at %d bytes", err, b.Size())
	}
	if err := q.Append(t.Context(), b); err != nil { // as large as can be
		t.Fatal(err)
	}
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for name, o := range map[string]Options{
		"cap too small":    {Cap: 8 * mib},
		"record too large": {Cap: 64 * mib, MaxRecord: 17 * mib},
		"chunk too small":  {Cap: 64 * mib, CommitBytes: 100},
	} {
		o.Dir = t.TempDir()
		if _, err := Open(t.Context(), o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	q := open(t, Options{Dir: t.TempDir(), Cap: 16 * mib}) // the documented minimum, with defaults
	if st, err := os.Stat(q.path); err != nil || st.Size() != 16*mib || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

func TestCapCanGrow(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	add(t, q, "kept")
	closeQueue(t, q)
	o.Cap *= 2
	q = open(t, o)
	if st, err := os.Stat(q.path); err != nil || st.Size() != o.Cap || q.Bounds().Last != 1 {
		t.Errorf("%v, %v", st, err)
	}
	closeQueue(t, q)
	o.Cap /= 2 // little of it was used
	q = open(t, o)
	if st, err := os.Stat(q.path); err != nil || st.Size() != o.Cap || q.Bounds().Last != 1 {
		t.Errorf("%v, %v", st, err)
	}
}

// A stalled disk holds the appender only when the bounded memory is full, and
// loses nothing.
func TestStalledDisk(t *testing.T) {
	stalled, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	o := small(t.TempDir())
	o.BeforeCommit = func() error {
		once.Do(func() { close(stalled); <-release })
		return nil
	}
	q := open(t, o)
	add(t, q, "first")
	<-stalled
	n := 1
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	full := make(chan error)
	go func() {
		for {
			b := q.NewBatch()
			err := b.End(append(b.Begin(Events), make([]byte, 1000)...), false)
			if err == nil {
				err = q.Append(ctx, b)
			}
			if err != nil {
				full <- err
				return
			}
			n++
			if q.Stats().Pending > o.CommitBytes*4-2000 {
				cancel() // it blocks now, or at the next record
			}
		}
	}()
	if err := <-full; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if p := q.Stats().Pending; p > 5*o.CommitBytes {
		t.Errorf("%d bytes are pending", p)
	}
	close(release)
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := q.Stats(); s.Last != uint64(n) || s.Records != uint64(n) {
		t.Errorf("appended %d, %+v", n, s)
	}
}

func TestCommitErrorIsShownAndRetried(t *testing.T) {
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprintf("durable=%v", after), func(t *testing.T) {
			hold, fail := make(chan struct{}), make(chan error)
			inject := func() error {
				select {
				case err := <-fail:
					return err
				case <-hold:
					return nil
				}
			}
			o := small(t.TempDir())
			if after {
				o.afterCommit = inject
			} else {
				o.BeforeCommit = inject
			}
			reg := prometheus.NewPedanticRegistry()
			o.Registerer = reg
			q := open(t, o)
			before := metricstest.Gather(t, reg)
			epoch := q.Epoch()
			add(t, q, "survives")
			fail <- errInjected
			if !after {
				fail <- errInjected // the first one is known to be over now
				if s := q.Stats(); !errors.Is(s.Err, errInjected) || s.ErrSince.IsZero() || s.Pending == 0 {
					t.Errorf("%+v", s)
				}
			}
			close(hold)
			if err := q.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := q.Stats(); s.Err != nil || s.Last != 1 || s.Epoch != epoch || invariant(s) != nil {
				t.Errorf("%+v", s)
			}
			metricstest.Moved(t, before, metricstest.Gather(t, reg), "buffer_errors_total")
			add(t, q, "goes on")
			recs, err := q.Read(t.Context(), 0, nil, 1, 100)
			if err != nil || string(recs[0].Data) != "survives" {
				t.Errorf("%v, %v", recs, err)
			}
			recs, err = q.Read(t.Context(), 1, nil, 1, 100)
			if err != nil || string(recs[0].Data) != "goes on" {
				t.Errorf("%v, %v", recs, err)
			}
		})
	}
}

// Chunks of very different lengths fragment the ring beyond what the limit
// provides for; then more is dropped, exactly as accounted.
func TestFragmentedRing(t *testing.T) {
	s := fragment(t, 4000, func(*sim, *Options) {})
	// Transactions that only made room are not counted as commits.
	if extra := s.q.state.gen - uint64(testutil.ToFloat64(s.q.metrics.commits)); extra == 0 {
		t.Error("the ring was never too fragmented")
	} else {
		t.Logf("room had to be made %d times", extra)
	}
	if n := testError(s.q, opCommit); n != 0 {
		t.Errorf("%v commits failed", n)
	}
	for range 20 {
		s.settle()
	}
	s.must(s.verify())
	closeQueue(t, s.q)
	check(t, s.q.path)
}

// A transaction that makes room for a commit is not that commit: who waits for it goes on
// waiting, and when it is not known whether one of the two is on disk it is found out which.
func TestRoomIsNoCommit(t *testing.T) {
	early, failed, forfeits := 0, 0, 0
	s := fragment(t, 2000, func(s *sim, o *Options) {
		o.BeforeCommit = func() error { // that is, while one is under way
			s.q.Forfeit(1, 1, causeServer)
			forfeits++
			return nil
		}
		o.Committed = func([]byte) {
			s.q.mu.Lock()
			defer s.q.mu.Unlock()
			if s.q.committed() >= s.q.lossAt && len(s.q.forfeits) > 0 {
				early++
			}
		}
		o.afterCommit = func() error {
			if failed++; failed%3 == 0 {
				return errors.New("not known to be on disk")
			}
			return nil
		}
	})
	if early > 0 {
		t.Errorf("%d of %d losses were taken for durable before they were", early, forfeits)
	}
	if st := s.q.Stats(); st.Salvaged > 0 {
		t.Errorf("a sound file was set aside, and %d records salvaged", st.Salvaged)
	}
	closeQueue(t, s.q)
	check(t, s.q.path)
}

// fragment appends records of all sizes to a ring that a few of them fill.
func fragment(t *testing.T, n int, with func(*sim, *Options)) *sim {
	t.Helper()
	s := &sim{t: t, led: newLedger(), rng: rand.New(rand.NewPCG(5, 5))}
	o := small(fastDir(t))
	o.Cap = 1536 * kib
	o.MaxRecord = 300 * kib
	o.CommitBytes = 16 * kib
	with(s, &o)
	s.q = open(t, o)
	for range n {
		if s.rng.IntN(40) == 0 {
			b := s.q.NewBatch()
			s.item++
			s.must(b.End(appendItem(b.Begin(Events), s.item, s.rng.IntN(o.MaxRecord-10)), false))
			s.must(s.q.Append(t.Context(), b))
		} else {
			s.produce(1, 1500, false)
		}
		s.must(s.q.Flush(t.Context()))
		s.must(invariant(s.q.Stats()))
	}
	return s
}

func TestForfeit(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	q.Forfeit(5, 9, "server_lost")
	q.Forfeit(0, 9, "nothing")
	q.Forfeit(9, 5, "nothing")
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []Loss{{"server_lost", 5, 9, 5}}
	if d := cmp.Diff(want, q.Unnamed(nil)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	closeQueue(t, q)
	q = open(t, o)
	if d := cmp.Diff(want, q.Unnamed(nil)); d != "" {
		t.Errorf("after reopen (-want +got):\n%s", d)
	}
	// Named as soon as the record is appended, and until that is lost.
	b := q.NewBatch()
	b.Name(want) // no record yet: no effect
	if err := b.End(append(b.Begin(DecisionsSystem), "loss"...), false); err != nil {
		t.Fatal(err)
	}
	b.Name(want)
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if l := q.Unnamed(nil); len(l) != 0 {
		t.Errorf("still unnamed: %v", l)
	}
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	q.Ack(1)
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := q.Stats().Losses; n != 0 {
		t.Errorf("%d losses after the record was delivered", n)
	}
	q.Forfeit(1, 1, "other")
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	want = append([]Loss{{"other", 1, 1, 1}}, want...)
	if d := cmp.Diff(want, q.Unnamed(nil)); d != "" {
		t.Errorf("after the record was lost (-want +got):\n%s", d)
	}
}

// What the queue itself has told as lost, as damaged say, is no loss of the server's.
func TestForfeitSparesWhatIsTold(t *testing.T) {
	q := open(t, small(t.TempDir()))
	for _, l := range []Loss{{"one", 5, 9, 0}, {"two", 3, 12, 0}, {"three", 4, 10, 0}} {
		q.Forfeit(l.First, l.Last, l.Cause)
		if err := q.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	want := []Loss{{"one", 5, 9, 5}, {"two", 3, 4, 2}, {"two", 10, 12, 3}}
	if d := cmp.Diff(want, q.Unnamed(nil)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestReadEnds(t *testing.T) {
	q := open(t, small(t.TempDir()))
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error)
	read := func(ctx context.Context) {
		_, err := q.Read(ctx, 0, nil, 1, 1)
		errs <- err
	}
	go read(ctx)
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	go read(t.Context())
	closeQueue(t, q)
	if err := <-errs; !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	b := q.NewBatch()
	b.SetMark([]byte("m"))
	if err := q.Append(t.Context(), b); !errors.Is(err, ErrClosed) {
		t.Errorf("append: %v", err)
	}
	if err := q.Flush(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("flush: %v", err)
	}
	closeQueue(t, q) // twice is fine
}

func TestMarkAlone(t *testing.T) {
	o := small(t.TempDir())
	marks := make(chan string, 10)
	o.Committed = func(m []byte) { marks <- string(m) }
	q := open(t, o)
	if q.Mark() != nil {
		t.Errorf("mark %q in a new file", q.Mark())
	}
	b := q.NewBatch()
	b.SetMark([]byte("alone"))
	if err := q.Append(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if m := <-marks; m != "alone" {
		t.Errorf("committed %q", m)
	}
	closeQueue(t, q)
	if q = open(t, o); string(q.Mark()) != "alone" || q.Next() != 1 {
		t.Errorf("mark %q, next %d", q.Mark(), q.Next())
	}
}

// A clean close stores the freelist, which spares the next open a scan.
func TestCleanCloseStoresFreelist(t *testing.T) {
	o := small(t.TempDir())
	for i, want := range []bool{true, true} {
		q := open(t, o)
		add(t, q, "x")
		closeQueue(t, q)
		f, err := os.Open(q.path)
		if err != nil {
			t.Fatal(err)
		}
		m, err := preflight(f, o.Cap, 0)
		f.Close()
		if err != nil || (m.freelist != noFreelist) != want {
			t.Errorf("close %d: freelist at %d, %v", i, m.freelist, err)
		}
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	o := small(t.TempDir())
	o.Registerer = reg
	q := open(t, o)
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	want := []string{
		"buffer_append_latency_seconds", "buffer_bytes", "buffer_capacity_bytes", "buffer_commit_seconds", "buffer_commits_total", "buffer_corrupt_chunks_total", "buffer_corrupt_records_total",
		"buffer_errors_total", "buffer_oldest_unsent_age_seconds", "buffer_quarantined_bytes", "buffer_quarantined_files", "buffer_records",
		"buffer_salvaged_records_total",
		"buffer_truncations_total", "buffer_unsent_bytes", "buffer_unsent_records",
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		got = append(got, f.GetName())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("at zero (-want +got):\n%s", d)
	}
	s := &sim{t: t, q: q, led: newLedger(), rng: rand.New(rand.NewPCG(9, 9))}
	for range 300 {
		s.produce(10, 2000, false)
	}
	s.must(q.Flush(t.Context()))
	st := q.Stats()
	if n := testutil.ToFloat64(q.metrics.truncations); n == 0 || n != float64(st.Truncated) {
		t.Errorf("truncations %v, %+v", n, st)
	}
	if testutil.ToFloat64(q.metrics.commits) == 0 {
		t.Error("no commits")
	}
	value := func(name string) float64 {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == name {
				return f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		return -1
	}
	for name, want := range map[string]float64{
		"buffer_records": float64(st.Records), "buffer_bytes": float64(st.Bytes),
		"buffer_capacity_bytes": float64(o.Cap), "buffer_unsent_records": float64(st.Unsent),
	} {
		if got := value(name); got != want || got == 0 {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if age := value("buffer_oldest_unsent_age_seconds"); age <= 0 || age > time.Hour.Seconds() {
		t.Errorf("age %v", age)
	}
	closeQueue(t, q)

	o.Registerer = prometheus.NewRegistry()
	q = open(t, o)
	if n := testutil.ToFloat64(q.metrics.truncations); n != float64(st.Truncated) {
		t.Errorf("after reopen: truncations %v, want %d", n, st.Truncated)
	}
	if s := q.Stats(); s.OldestUnsent.IsZero() || time.Since(s.OldestUnsent) > time.Hour {
		t.Errorf("after reopen: oldest unsent %v", s.OldestUnsent)
	}
}

// Nothing is allocated per record.
func TestAppendDoesNotAllocate(t *testing.T) {
	q := open(t, Options{Dir: t.TempDir(), Cap: 32 * mib, CommitInterval: time.Hour, CommitBytes: 2 * mib})
	rec := make([]byte, 500)
	batch := func() {
		b := q.NewBatch()
		for range 100 {
			if err := b.End(append(b.Begin(Events), rec...), false); err != nil {
				t.Fatal(err)
			}
		}
		if err := q.Append(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	batch()
	if n := testing.AllocsPerRun(20, batch); n > 1 {
		t.Errorf("%v allocations per batch of 100", n)
	}
}
