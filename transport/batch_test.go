// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestSenderPacksBatches checks what a batch looks like in the stream, and what
// goes alone.
func TestSenderPacksBatches(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	q.add(5, buffer.Events, false)
	q.recs[2].Data = []byte("{\n\"metadata\":{\"uid\":\"lines\"},\"time_dt\":\"t\"}")
	big := `{"metadata":{"uid":"big"},"time_dt":"t","data":"` + strings.Repeat("x", 3<<20) + `"}`
	q.recs[4].Data = []byte(big)
	q.add(3, buffer.DecisionsSystem, false)
	q.add(2, buffer.Events, false)
	o := fast(srv.Addr())
	o.Encoding = ZstdBatch
	s := start(t, o, q)
	s.delivered(t, 10)
	xs, err := c.XRange(t.Context(), eventsKey, "-", "+").Result()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, x := range xs {
		got = append(got, fmt.Sprint(x.Values["seq"], "+", x.Values["n"], x.Values["codec"], x.Values["agent"], x.Values["epoch"]))
	}
	var want []string
	for _, b := range []string{"1+2", "3+1", "4+1", "5+1", "9+2"} {
		want = append(want, b+"z"+testAgent+testEpoch)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("entries (-want +got):\n%s", d)
	}
	es := entries(t, c, eventsKey)
	if len(es) != 7 || es[2].ID != "lines" || es[4].Data != big || es[5].Data != payload(9) {
		t.Errorf("%d records", len(es))
	}
	if es := entries(t, c, "decisions:system"); len(es) != 3 || es[0].ID != "uid-6" {
		t.Errorf("decisions %v", es)
	}
	if n := cap(s.batch.plain); n > keepPlain {
		t.Errorf("%d bytes are kept after a large record", n)
	}
}

// TestSenderChangesEncoding: a batch that was stored in one encoding and whose reply
// was lost is cut again in the other.
func TestSenderChangesEncoding(t *testing.T) {
	srv := redistest.Start(t, redistest.Options{})
	c := srv.Client()
	defer c.Close()
	q := newMemQueue()
	var last uint64
	for i, e := range []Encoding{JSON, ZstdBatch, JSON, ZstdBatch} {
		proxy := redistest.StartProxy(t, srv.Addr(), redistest.Faults{})
		o := fast(proxy.Addr())
		o.Encoding = e
		o.BatchRecords = 100
		s := start(t, o, q)
		s.reaches(t, Connected, ClassNone)
		last = q.add(100, buffer.Events, true)
		s.delivered(t, last)
		proxy.SetFaults(redistest.Faults{DropReply: 1})
		last = q.add(30, buffer.Events, true)
		await(t, text("a batch without a reply"), func() bool { return uint64(len(entries(t, c, eventsKey))) == last })
		s.stop(t)
		q.add(70, buffer.Events, false)
		if i == 0 {
			continue
		}
		if got := len(entries(t, c, eventsKey)); got < 100 {
			t.Errorf("round %d: %d records", i, got)
		}
	}
	s := start(t, fast(srv.Addr()), q)
	s.delivered(t, q.Bounds().Last)
	exactlyOnce(t, c, q.Bounds().Last)
}

func TestPace(t *testing.T) {
	p := pace{least: 50 * time.Millisecond, most: time.Second}
	for range 100 {
		p.observe(2 * time.Millisecond)
	}
	if got := p.linger(); got != p.least {
		t.Errorf("a quick server: %v", got)
	}
	p.observe(500 * time.Millisecond)
	if got := p.linger(); got != p.least {
		t.Errorf("one slow reply: %v", got)
	}
	for range 50 {
		p.observe(150 * time.Millisecond)
	}
	if got := p.linger(); got < 400*time.Millisecond || got > 600*time.Millisecond {
		t.Errorf("a slow server: %v", got)
	}
	for range 50 {
		p.observe(2 * time.Second)
	}
	if got := p.linger(); got != p.most {
		t.Errorf("a very slow server: %v", got)
	}
	for range 50 {
		p.observe(2 * time.Millisecond)
	}
	if got := p.linger(); got != p.least {
		t.Errorf("quick again: %v", got)
	}
}

func TestNewRefusesUnknownEncoding(t *testing.T) {
	o := fast("127.0.0.1:1")
	o.Encoding = "gzip"
	if _, err := New(o, newMemQueue()); err == nil || !strings.Contains(err.Error(), "zstd-batch") {
		t.Errorf("New: %v", err)
	}
}
