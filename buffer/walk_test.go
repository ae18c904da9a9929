// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
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

// shown is what a walk shows, in few words.
func shown(t *testing.T, q *Queue, r Range) (got []string) {
	t.Helper()
	err := q.Walk(t.Context(), r, func(c *Chunk) bool {
		text := fmt.Sprintf("%d-%d", c.First, c.Last)
		for rec := range c.Records() {
			text += " " + string(rec.Data)
		}
		if c.Err != nil {
			text += fmt.Sprintf(" damaged %t", errors.Is(c.Err, errChunk))
		}
		got = append(got, text)
		return true
	})
	if err != nil {
		t.Error(err)
	}
	return got
}

// TestWalkShowsDamage walks over a chunk that is damaged, which it shows and leaves to
// the reader, and over the hole that the reader makes of it.
func TestWalkShowsDamage(t *testing.T) {
	q := open(t, small(t.TempDir()))
	var at []time.Time
	for _, words := range [][]string{{"a", "b"}, {"c"}, {"d", "e"}, {"f"}} {
		at = append(at, time.Now())
		add(t, q, words...)
		if err := q.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	q.Ack(1)
	for _, c := range []struct {
		name string
		r    Range
		want []string
	}{
		{"all", Range{}, []string{"1-2 a b", "3-3 c", "4-5 d e", "6-6 f"}},
		{"a part of a chunk", Range{First: 2, Last: 4}, []string{"1-2 a b", "3-3 c", "4-5 d e"}},
		{"beyond the end", Range{First: 6, Last: 99}, []string{"6-6 f"}},
		{"nothing yet", Range{First: 7}, nil},
		{"since", Range{Since: at[2]}, []string{"1-2", "3-3", "4-5 d e", "6-6 f"}},
		{"since, of a range", Range{First: 1, Last: 5, Since: at[2]}, []string{"1-2", "3-3", "4-5 d e"}},
	} {
		if d := cmp.Diff(c.want, shown(t, q, c.r)); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}

	q.mu.Lock()
	bad := q.index.live()[2]
	q.mu.Unlock()
	f, err := os.OpenFile(q.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("rot"), int64(bad.root)*pageSize+leafHeader+chunkHeader)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	before := q.Stats()
	if d := cmp.Diff([]string{"1-2 a b", "3-3 c", "4-5 damaged true", "6-6 f"}, shown(t, q, Range{})); d != "" {
		t.Errorf("damaged (-want +got):\n%s", d)
	}
	if d := cmp.Diff(before, q.Stats()); d != "" {
		t.Errorf("the walk moved something (-before +after):\n%s", d)
	}
	for after := uint64(0); after < 6; {
		recs, err := q.Read(t.Context(), after, nil, 100, mib)
		if err != nil {
			t.Fatal(err)
		}
		after = recs[len(recs)-1].Seq
	}
	if d := cmp.Diff([]string{"1-2 a b", "3-3 c", "6-6 f"}, shown(t, q, Range{})); d != "" {
		t.Errorf("once the reader has met it (-want +got):\n%s", d)
	}
}

// TestWalkIsOvertaken stands still while the queue wraps: it goes on with what is there
// then, and never shows anything twice.
func TestWalkIsOvertaken(t *testing.T) {
	q := open(t, small(t.TempDir()))
	fill := func() {
		payload := strings.Repeat("x", 30*kib)
		for range 150 {
			add(t, q, payload)
		}
		if err := q.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	last, holes := uint64(0), 0
	first := q.Bounds().First
	err := q.Walk(t.Context(), Range{Last: q.Bounds().Last + 1000}, func(c *Chunk) bool {
		switch {
		case c.Err != nil:
			t.Errorf("chunk %d-%d: %v", c.First, c.Last, c.Err)
		case last == 0 && c.First != first:
			t.Errorf("begins with seq %d, want %d", c.First, first)
		case last > 0 && c.First > last+1:
			holes++
		case last > 0 && c.First <= last:
			t.Errorf("seq %d after %d", c.First, last)
		}
		if last == 0 {
			fill()
		}
		last = c.Last
		return true
	})
	if err != nil || holes != 1 || last < first+100 {
		t.Errorf("%d holes, up to seq %d of %+v, %v", holes, last, q.Bounds(), err)
	}
	closeQueue(t, q)
	if err := q.Walk(t.Context(), Range{First: 1}, func(*Chunk) bool { return true }); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

func TestInfo(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	if i := q.Info(); i.Chunks != 0 || !i.Oldest.IsZero() || i.Lost != nil || i.Aside != nil || i.Path != q.path {
		t.Errorf("empty: %+v", i)
	}
	start := time.Now()
	add(t, q, "a", "b")
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	between := time.Now()
	add(t, q, "c")
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	q.Forfeit(7, 9, "gone")
	now := time.Now()
	if err := errors.Join(q.Flush(t.Context()), quarantineChunk(q.path, now, 5, []byte("bad"))); err != nil {
		t.Fatal(err)
	}
	i := q.Info()
	if i.Oldest.Before(start) || i.Oldest.After(between) || i.Newest.Before(between) || i.Newest.After(now) {
		t.Errorf("oldest %v, newest %v, want them around %v, between %v and %v", i.Oldest, i.Newest, between, start, now)
	}
	if i.Chunks != 2 || i.Records != 3 || invariant(i.Stats) != nil {
		t.Errorf("%+v", i)
	}
	if d := cmp.Diff([]Loss{{"gone", 7, 9, 3}}, i.Lost); d != "" {
		t.Errorf("losses (-want +got):\n%s", d)
	}
	if len(i.Aside) != 1 || i.Aside[0].Chunk != 5 || !i.Aside[0].At.Equal(now) || i.Aside[0].Bytes <= 0 {
		t.Errorf("set aside: %+v, want one chunk of %v", i.Aside, now)
	}

	closeQueue(t, q)
	s, err := Inspect(t.Context(), o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	off := s.Info()
	off.Path, off.OldestUnsent, off.Quarantined, off.Compression = i.Path, i.OldestUnsent, i.Quarantined, i.Compression
	if d := cmp.Diff(i, off); d != "" {
		t.Errorf("the file says otherwise (-queue +file):\n%s", d)
	}
}

// TestWalkAfterRenew: records that another epoch had delivered are there without a seq.
func TestWalkAfterRenew(t *testing.T) {
	o := small(t.TempDir())
	q := open(t, o)
	add(t, q, "a", "b")
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	add(t, q, "c", "d", "e")
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	q.Ack(3)
	if _, err := q.Renew(t.Context(), q.Epoch()); err != nil {
		t.Fatal(err)
	}
	check := func(name string, walk func(context.Context, Range, func(*Chunk) bool) error) {
		t.Helper()
		for r, want := range map[Range][]string{
			{}:                  {"0-0: 0 a, 0 b", "0-2: 0 c, 1 d, 2 e"},
			{First: 1}:          {"0-2: 0 c, 1 d, 2 e"},
			{First: 2, Last: 9}: {"0-2: 0 c, 1 d, 2 e"},
			{First: 3}:          nil,
		} {
			var got []string
			err := walk(t.Context(), r, func(c *Chunk) bool {
				text := ""
				for rec := range c.Records() {
					text += fmt.Sprintf(", %d %s", rec.Seq, rec.Data)
				}
				got = append(got, fmt.Sprintf("%d-%d: %s", c.First, c.Last, strings.TrimPrefix(text, ", ")))
				return true
			})
			if d := cmp.Diff(want, got); d != "" || err != nil {
				t.Errorf("%s, %+v: %v (-want +got):\n%s", name, r, err, d)
			}
		}
	}
	check("queue", q.Walk)
	s, err := Inspect(t.Context(), o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	check("snapshot", s.Walk)
}
