// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestScanSeesTheRetentionTail reads what was delivered long ago and what was not,
// while the file is written, and disturbs neither delivery nor accounting.
func TestScanSeesTheRetentionTail(t *testing.T) {
	q, err := Open(t.Context(), Options{Dir: t.TempDir(), Cap: 16 * mib, CommitInterval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close(context.Background())
	add := func(s Stream, data string) {
		t.Helper()
		b := q.NewBatch()
		if err := b.End(append(b.Begin(s), data...), false); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(q.Append(t.Context(), b), q.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	scan := func(since time.Time) (got []string) {
		t.Helper()
		err := q.Scan(t.Context(), since, func(r Record) bool {
			got = append(got, fmt.Sprintf("%d %d %s", r.Seq, r.Stream, r.Data))
			return true
		})
		if err != nil {
			t.Error(err)
		}
		return got
	}
	if got := scan(time.Time{}); got != nil {
		t.Errorf("an empty queue: %q", got)
	}
	add(Events, "a")
	add(DecisionsSystem, "b")
	add(DecisionsApprovals, "c")
	q.Ack(2)
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	between := time.Now()
	add(DecisionsAgents, "d")
	before := q.Stats()
	if d := cmp.Diff([]string{"1 0 a", "2 1 b", "3 3 c", "4 2 d"}, scan(time.Time{})); d != "" {
		t.Errorf("all (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"4 2 d"}, scan(between)); d != "" {
		t.Errorf("the newest (-want +got):\n%s", d)
	}
	n := 0
	if err := q.Scan(t.Context(), time.Time{}, func(Record) bool { n++; return n < 2 }); err != nil || n != 2 {
		t.Errorf("ended after %d records, %v", n, err)
	}
	if d := cmp.Diff(before.Bounds, q.Stats().Bounds); d != "" || q.Stats().Unsent != before.Unsent {
		t.Errorf("the scan moved something (-before +after):\n%s", d)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.Scan(ended, time.Time{}, func(Record) bool { return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}

	// Under a writer that overwrites what is being read every record is whole, and
	// they ascend.
	var wg sync.WaitGroup
	payload := make([]byte, 60<<10)
	wg.Go(func() {
		for i := range 1000 {
			for j := range payload {
				payload[j] = byte(i)
			}
			b := q.NewBatch()
			if err := errors.Join(b.End(append(b.Begin(Events), payload...), false), q.Append(t.Context(), b)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 20 {
		last := uint64(0)
		err := q.Scan(t.Context(), time.Time{}, func(r Record) bool {
			if r.Seq <= last || len(r.Data) > 1 && r.Data[0] != r.Data[len(r.Data)-1] {
				t.Errorf("seq %d after %d, %d bytes", r.Seq, last, len(r.Data))
			}
			last = r.Seq
			return true
		})
		if err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
}
