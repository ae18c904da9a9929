// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
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
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := q.Close(ctx); err != nil {
		t.Error(err)
	}
}

// small is a queue that wraps after a few hundred kilobytes.
func small(dir string) Options {
	return Options{
		Dir: dir, Cap: 2 * mib, CommitBytes: 32 * kib, MaxRecord: 256 * kib,
		CommitInterval: time.Millisecond,
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
