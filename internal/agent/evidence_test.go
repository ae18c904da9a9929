// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/evidence"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// evidenceHost is a buffer behind a control socket.
type evidenceHost struct {
	t         testing.TB
	queue     *buffer.Queue
	desk      *evidenceDesk
	decisions decisions
	stopping  atomic.Bool
	path      string
	seq       uint64
}

func newEvidenceHost(t testing.TB, capacity int64) *evidenceHost {
	t.Helper()
	q, err := buffer.Open(t.Context(), buffer.Options{Dir: t.TempDir(), Cap: capacity, CommitInterval: time.Millisecond, AllowUnsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := q.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	h := &evidenceHost{t: t, queue: q}
	h.desk = &evidenceDesk{source: q, flush: q.Flush, decide: h.decisions.add, stopping: h.stopping.Load, busy: make(chan struct{}, evidenceMost), rate: 1 << 40}
	c := newControl(uint32(os.Geteuid()), func() (uint32, bool) { return operator, true }, h.decisions.add)
	h.desk.mount(c)
	h.path = serveControl(t, c)
	return h
}

// fill appends n records of about size bytes.
func (h *evidenceHost) fill(n, size int) {
	h.t.Helper()
	pad := strings.Repeat("x", size)
	for range n {
		b := h.queue.NewBatch()
		h.seq++
		rec := fmt.Appendf(b.Begin(buffer.Events), `{"metadata":{"sequence":%d,"event_code":"process.exec"},"time_dt":"2026-11-29T08:00:00Z","pad":"%s"}`, h.seq, pad)
		if err := errors.Join(b.End(rec, false), h.queue.Append(h.t.Context(), b)); err != nil {
			h.t.Fatal(err)
		}
	}
	if err := h.queue.Flush(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
}

func (h *evidenceHost) get(conn net.Conn, path string) *http.Response {
	h.t.Helper()
	h.t.Cleanup(func() { conn.Close() })
	req, err := http.NewRequestWithContext(h.t.Context(), http.MethodGet, "http://sensor"+path, http.NoBody)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := req.Write(conn); err != nil {
		h.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 64<<10), req)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp
}

func (h *evidenceHost) dial() net.Conn {
	h.t.Helper()
	c, err := net.Dial("unix", h.path)
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

func summaryOf(t testing.TB, r *http.Response) (s evidence.Summary) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.Trailer.Get(ExportTrailer)), &s); err != nil {
		t.Fatalf("trailer %q: %v", r.Trailer, err)
	}
	return s
}

// waitDecisions waits until so many decisions were made, and returns their codes.
func (h *evidenceHost) waitDecisions(n int) []event.SelfInfo {
	h.t.Helper()
	deadline := time.After(30 * time.Second)
	for len(h.decisions.all()) < n {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-deadline:
			h.t.Fatalf("decisions %+v, want %d", h.decisions.all(), n)
		}
	}
	return h.decisions.all()
}

// TestExportIsOnRecord: what leaves is byte for byte what was appended, and who got it
// is known before and after, with a hash that proves which file it was.
func TestExportIsOnRecord(t *testing.T) {
	h := newEvidenceHost(t, 16<<20)
	h.fill(20, 100)
	h.queue.Ack(15)
	r := h.get(h.dial(), "/buffer/export?first=3&kind=exec&case=C-17&case=x")
	body, err := io.ReadAll(r.Body)
	if s := summaryOf(t, r); err != nil || r.StatusCode != http.StatusOK || len(body) > 0 || s.Records != 0 || s.First != 3 || s.Last != 20 || !s.Complete() {
		t.Errorf("%s, %q, %v, %+v", r.Status, body, err, s)
	}
	r = h.get(h.dial(), "/buffer/export?first=3&last=18")
	if body, err = io.ReadAll(r.Body); err != nil {
		t.Fatal(err)
	}
	s := summaryOf(t, r)
	sum := sha256.Sum256(body)
	if lines := strings.Count(string(body), "\n"); lines != 16 || s.Records != 16 || s.Bytes != int64(len(body)) || s.SHA256 != hex.EncodeToString(sum[:]) || !s.Complete() {
		t.Errorf("%d lines, %d bytes, %+v", lines, len(body), s)
	}
	all := h.waitDecisions(4)
	for n, code := range []string{"EXPORT_STARTED", "EVIDENCE_EXPORTED", "EXPORT_STARTED", "EVIDENCE_EXPORTED"} {
		i := all[n]
		if i.Code != code || i.Attrs["peer_uid"] != uint32(os.Geteuid()) || i.Stream != event.DecisionsApprovals || i.Failed || i.UserID == "" {
			t.Errorf("decision %d: %+v, want %s", n, i, code)
		}
	}
	if i := all[3]; i.Count != 16 || i.Attrs["sha256"] != s.SHA256 || i.Attrs["first"] != uint64(3) || i.Attrs["last"] != uint64(18) || i.Attrs["query"] != "first=3&last=18" {
		t.Errorf("%+v", i)
	}
	if r := h.get(h.dial(), "/buffer/export?frist=3"); r.StatusCode != http.StatusBadRequest {
		t.Errorf("a condition that is not known: %s", r.Status)
	}
}

func TestExportRights(t *testing.T) {
	requireRoot(t)
	h := newEvidenceHost(t, 16<<20)
	h.fill(1, 10)
	for _, tt := range []struct {
		name          string
		uid, gid      int
		want, exports int
	}{
		{"root", 0, 0, http.StatusOK, 1},
		{"a member of control.group", nobody, operator, http.StatusOK, 2},
		{"another user", nobody, nobody, http.StatusForbidden, 2},
	} {
		for _, path := range []string{"/buffer", "/buffer/verify", "/buffer/export"} {
			conn, err := dialAs(h.path, tt.uid, tt.gid)
			if err != nil {
				t.Fatal(err)
			}
			if code, text := ask(t, conn, http.MethodGet, path, ""); code != tt.want || strings.Contains(text, "event_code") != (code == http.StatusOK && path == "/buffer/export") {
				t.Errorf("%s, %s: %d %s", tt.name, path, code, text)
			}
		}
		exports := 0
		for _, i := range h.decisions.all() {
			if i.Code == "EVIDENCE_EXPORTED" {
				exports++
			}
		}
		if exports != tt.exports {
			t.Errorf("%s: %d exports on record, want %d", tt.name, exports, tt.exports)
		}
	}
}

// TestSlowExport has a client stand still while the queue wraps: appends go on, memory
// does not grow, and what has left meanwhile is named.
func TestSlowExport(t *testing.T) {
	h := newEvidenceHost(t, 16<<20)
	h.fill(200, 60<<10)
	first := h.queue.Bounds().First
	r := h.get(h.dial(), "/buffer/export")
	in := bufio.NewReader(r.Body)
	line, err := in.ReadString('\n')
	if err != nil || !strings.Contains(line, fmt.Sprintf(`"sequence":%d,`, first)) {
		t.Fatalf("%.80s, %v", line, err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	h.fill(400, 60<<10)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("%d bytes more are in use while a client waits", grown)
	}
	rest, err := io.ReadAll(in)
	if err != nil {
		t.Fatal(err)
	}
	s := summaryOf(t, r)
	left := uint64(0) // what was read meanwhile may lie between two parts of it
	for _, m := range s.Missing {
		left += m.Count()
		if m.Cause != evidence.CauseLeft {
			t.Errorf("%+v", m)
		}
	}
	if left == 0 || s.Missing[len(s.Missing)-1].Last != s.Last {
		t.Fatalf("%+v, want that the end has left", s)
	}
	lines := uint64(1 + strings.Count(string(rest), "\n"))
	if s.Records != lines || lines+left != s.Last-s.First+1 {
		t.Errorf("%d lines and %d missing of seq %d to %d", lines, left, s.First, s.Last)
	}
}

// TestExportEnds: a client that goes away, and a sensor that stops, end it, and both are
// on record.
func TestExportEnds(t *testing.T) {
	h := newEvidenceHost(t, 16<<20)
	h.fill(200, 60<<10)
	conn := h.dial()
	r := h.get(conn, "/buffer/export")
	if _, err := io.ReadFull(r.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if i := h.waitDecisions(2)[1]; i.Code != "EVIDENCE_EXPORTED" || !i.Failed || i.Count == 0 || i.Count >= 200 || i.Attrs["error"] == "" {
		t.Errorf("the client went away: %+v", i)
	}
	r = h.get(h.dial(), "/buffer/export")
	if _, err := io.ReadFull(r.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	h.stopping.Store(true)
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		t.Fatal(err)
	}
	if s := summaryOf(t, r); s.Complete() || s.Error != errStopping.Error() || s.Records == 0 {
		t.Errorf("the sensor stops: %+v", s)
	}
	if i := h.waitDecisions(4)[3]; !i.Failed || i.Attrs["error"] != errStopping.Error() {
		t.Errorf("the sensor stops: %+v", i)
	}
	if r := h.get(h.dial(), "/buffer/export"); r.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("asked while it stops: %s", r.Status)
	}
}

func TestEvidencePlaces(t *testing.T) {
	h := newEvidenceHost(t, 16<<20)
	h.fill(200, 60<<10)
	var held []*http.Response
	for range evidenceMost {
		r := h.get(h.dial(), "/buffer/export")
		if _, err := io.ReadFull(r.Body, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		held = append(held, r)
	}
	for _, path := range []string{"/buffer/export", "/buffer/verify"} {
		if r := h.get(h.dial(), path); r.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%s: %s", path, r.Status)
		}
	}
	if _, err := io.Copy(io.Discard, held[0].Body); err != nil {
		t.Fatal(err)
	}
	h.waitDecisions(evidenceMost + 1)
	r := h.get(h.dial(), "/buffer/verify")
	var report evidence.Report
	if err := json.NewDecoder(r.Body).Decode(&report); err != nil || !report.Clean() || report.Records != 200 {
		t.Errorf("%+v, %v", report, err)
	}
}

// TestEvidencePace: a walk takes as long as its bytes at the rate.
func TestEvidencePace(t *testing.T) {
	h := newEvidenceHost(t, 16<<20)
	h.fill(20, 60<<10)
	bytes := h.queue.Stats().Bytes
	h.desk.rate = bytes * 4 // a quarter of a second
	start := time.Now()
	err := (&paced{Source: h.queue, desk: h.desk, each: func() {}}).Walk(t.Context(), buffer.Range{}, func(*buffer.Chunk) bool { return true })
	if took := time.Since(start); err != nil || took < 250*time.Millisecond {
		t.Errorf("%v for %d bytes, %v", took, bytes, err)
	}
}

// TestExportThatNobodyTakes is dropped after its time, and leaves its place to others.
func TestExportThatNobodyTakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, err := buffer.Open(t.Context(), buffer.Options{Dir: t.TempDir(), Cap: 16 << 20, AllowUnsafe: true})
		if err != nil {
			t.Fatal(err)
		}
		for seq := range 10 {
			b := q.NewBatch()
			rec := fmt.Appendf(b.Begin(buffer.Events), `{"metadata":{"sequence":%d,"event_code":"process.exec"},"pad":"%s"}`, seq+1, strings.Repeat("x", 60<<10))
			if err := errors.Join(b.End(rec, false), q.Append(t.Context(), b)); err != nil {
				t.Fatal(err)
			}
		}
		var told decisions
		d := &evidenceDesk{source: q, flush: q.Flush, decide: told.add, stopping: func() bool { return false }, busy: make(chan struct{}, evidenceMost), rate: evidenceRate}
		l := &pipeListener{make(chan net.Conn), make(chan struct{})}
		s := newServer(t.Context(), http.HandlerFunc(d.serveExport))
		served := make(chan struct{})
		go func() { defer close(served); _ = s.Serve(l) }()
		client, server := net.Pipe()
		closed := &closeSignal{Conn: server, closed: make(chan struct{})}
		l.conns <- closed
		start := time.Now()
		if _, err := io.WriteString(client, "GET /buffer/export HTTP/1.1\r\nHost: s\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, make([]byte, 100)); err != nil { // and no more
			t.Fatal(err)
		}
		<-closed.closed
		took := time.Since(start)
		synctest.Wait() // the handler ends after its connection
		if took < controlWrite || took > controlWrite+5*time.Second {
			t.Errorf("dropped after %s, want %s", took, controlWrite)
		}
		all := told.all()
		if len(all) != 2 || !all[1].Failed || all[1].Count >= 10 || len(d.busy) != 0 {
			t.Errorf("%d places are taken; decisions %+v", len(d.busy), all)
		}
		if err := errors.Join(client.Close(), s.Close(), q.Close(context.Background())); err != nil {
			t.Error(err)
		}
		<-served
	})
}
