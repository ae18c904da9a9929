// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/transport"
)

func needsRedis(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("EDR_REQUIRE_ALL") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// TestFleet measures a small fleet in each way, with TLS and its storm among them.
func TestFleet(t *testing.T) {
	needsRedis(t)
	events, size, err := loadEvents("../../sensor/ocsf/testdata")
	if err != nil {
		t.Fatal(err)
	}
	s := setup{events: events, rate: 50, spread: 500 * time.Millisecond, measure: time.Second, servers: 2, dir: t.TempDir()}
	var results []result
	for _, c := range []cell{
		{20, transport.JSON, 50 * time.Millisecond, false},
		{20, transport.ZstdBatch, 200 * time.Millisecond, true},
	} {
		r, err := s.bounded(t.Context(), c)
		if err != nil {
			t.Fatalf("%s: %v", c, err)
		}
		results = append(results, r)
		for name, v := range map[string]float64{
			"delivered": r.delivered, "wire": r.wire, "memory": r.memory, "CPU per event": r.perEvent, "CPU per call": r.perCall,
			"memory per connection": r.perConnection, "p50": r.p50, "p99": r.p99, "dials": r.dials, "back": r.back[0],
		} {
			if math.IsNaN(v) || v <= 0 && name != "back" {
				t.Errorf("%s: %s is %v", c, name, v)
			}
		}
		if r.connections < 1 || r.connections > 2 {
			t.Errorf("%s: %v connections per sensor", c, r.connections)
		}
	}
	if plain, packed := results[0], results[1]; packed.wire*2 > plain.wire || packed.memory*2 > plain.memory || plain.wire < float64(size) {
		t.Errorf("events of %d bytes take %.0f of the wire and %.0f of memory, packed %.0f and %.0f", size, plain.wire, plain.memory, packed.wire, packed.memory)
	}
	text, err := s.page(t.Context(), results, size)
	if err != nil {
		t.Fatal(err)
	}
	page := filepath.Join(t.TempDir(), "operations.md")
	if err := os.WriteFile(page, []byte("above\n"+tableBegin+"old\n"+tableEnd+"below\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeDocs(page, text); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(page); err != nil || string(got) != "above\n"+tableBegin+"\n"+text+"\n"+tableEnd+"below\n" || strings.Contains(text, "NaN") {
		t.Errorf("%v: %s", err, got)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// TestConnect: a server that was given is measured, and is afterwards as it was.
func TestConnect(t *testing.T) {
	needsRedis(t)
	srv, err := startServer(t.Context(), t.TempDir(), 20, ecdsaKey)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.kill()
	var out strings.Builder
	args := []string{"-events", "../../sensor/ocsf/testdata", "-sensors", "5", "-for", "500ms", "-rate", "50", "-rows", "json 50ms", "-connect", srv.plain}
	if err := run(t.Context(), args, &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "| 5 | json 50ms | 250 |") || strings.Contains(out.String(), "tls") {
		t.Errorf("says %s", &out)
	}
	if n, err := srv.number(t.Context(), "DBSIZE"); n != 0 || err != nil {
		t.Errorf("left %v keys, %v", n, err)
	}
}

// TestSource: what the source says is durable can be read, in whole commits and in order.
func TestSource(t *testing.T) {
	for _, every := range []time.Duration{7 * time.Millisecond, 50 * time.Millisecond, time.Second} {
		l := &load{events: [][]byte{[]byte("a"), []byte("b")}, every: every, commit: 50 * time.Millisecond, begin: make(chan struct{})}
		s := newSource(l)
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if recs, err := s.Read(ctx, 0, nil, 10, 10); len(recs) != 0 || err == nil || s.Bounds().Last != 0 {
			t.Errorf("before anything came: %v, %v, %+v", recs, err, s.Bounds())
		}
		l.begun = time.Now().Add(-time.Hour)
		close(l.begin)
		for seq := uint64(1); seq < 100; seq++ {
			at := s.durable(seq)
			if got := s.last(at.Add(-1)); got >= seq {
				t.Errorf("every %v: %d is there before %d", every, got, seq)
			}
			if got := s.last(at); got < seq || got >= seq+s.group() {
				t.Errorf("every %v: %d is there with %d", every, got, seq)
			}
			if wait := at.Sub(s.came(seq)); wait > l.commit || wait < 0 {
				t.Errorf("every %v: %d waits %v", every, seq, wait)
			}
		}
		recs, err := s.Read(t.Context(), 41, nil, 10, 3)
		if err != nil || len(recs) != 3 || recs[0].Seq != 42 || recs[2].Seq != 44 {
			t.Errorf("every %v: read %v, %v", every, recs, err)
		}
		s.Ack(3)
		if p := l.seen.quantile(.5); p < 3500 || p > 3800 {
			t.Errorf("an hour is %v s", p)
		}
	}
}
