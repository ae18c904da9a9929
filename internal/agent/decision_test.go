// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/sensor/event"
	"github.com/aurorasoc/edr-sensor/transport"
)

// brief is a decision in one line, for comparing histories.
func brief(i event.SelfInfo) string {
	return fmt.Sprintf("%s %d %s>%s %v", i.Code, i.Count, i.Before, i.After, i.Failed)
}

func TestDeliveryDecisions(t *testing.T) {
	now := time.Unix(1000, 0)
	d := delivery{now: func() time.Time { return now }}
	for n, s := range []struct {
		state transport.State
		after time.Duration
		want  []string
	}{
		{transport.State{Phase: transport.Connected}, 0, nil},
		{transport.State{Phase: transport.Retrying, Class: transport.ClassDial}, 0, nil},
		{transport.State{Phase: transport.Connected, Rewinds: 2, Behind: transport.Behind{First: 7, Last: 9}}, awayGrace - 1, []string{"SERVER_BEHIND 3 > true"}},
		{transport.State{Phase: transport.Retrying, Class: transport.ClassDial, Rewinds: 2}, 0, nil},
		{transport.State{Phase: transport.Connected, Rewinds: 2}, awayGrace, []string{"DELIVERY_RESUMED 0 retrying>connected false"}},
		{transport.State{Phase: transport.Held, Class: transport.ClassOOM, Rewinds: 2}, 0, []string{"DELIVERY_HELD 0 connected>held true"}},
		{transport.State{Phase: transport.Held, Class: transport.ClassOOM, Rewinds: 2}, 0, nil},
		{transport.State{Phase: transport.Held, Class: transport.ClassAuth, Rewinds: 2}, 0, []string{"DELIVERY_HELD 0 held>held true"}},
		{transport.State{Phase: transport.Retrying, Class: transport.ClassDial, Rewinds: 2}, 0, nil},
		{transport.State{Phase: transport.Connected, Rewinds: 2, Rotations: 1}, 9 * time.Second, []string{"CREDENTIALS_ROTATED 0 > false", "DELIVERY_RESUMED 0 retrying>connected false"}},
		{transport.State{Phase: transport.Fenced, Class: transport.ClassFenced, Rewinds: 2, Rotations: 1}, 0, []string{"FENCED 0 connected>fenced true"}},
		{transport.State{Phase: transport.Connected, Risks: []transport.Risk{{Kind: transport.RiskEviction, Text: "w"}, {Kind: transport.RiskMemory, Text: "m"}}, Rewinds: 2, Rotations: 1}, 0, []string{"EVICTION_RISK 0 > true", "SERVER_AT_RISK 0 > true", "DELIVERY_RESUMED 0 fenced>connected false"}},
		{transport.State{Phase: transport.Connected, Risks: []transport.Risk{{Kind: transport.RiskEviction, Text: "w"}, {Kind: transport.RiskMemory, Text: "m"}}, Rewinds: 2, Rotations: 1}, 0, nil},
		{transport.State{Phase: transport.Connected, Rewinds: 2, Rotations: 1, Refusals: 1, Refused: transport.Refused{Seq: 9, Bytes: 70, Path: "/x", Error: "reset", Hint: "raise it"}}, 0, []string{"RECORD_REFUSED 1 > true"}},
		{transport.State{Phase: transport.Connected, Rewinds: 2, Rotations: 1, Refusals: 1}, 0, nil},
	} {
		now = now.Add(s.after)
		var got []string
		for _, i := range d.step(s.state) {
			got = append(got, brief(i))
			if i.Code == "DELIVERY_RESUMED" && (i.Attrs["away_seconds"] != s.after.Seconds() || i.To.Sub(i.From) != s.after) {
				t.Errorf("away for %v, from %v to %v", i.Attrs["away_seconds"], i.From, i.To)
			}
			if a := i.Attrs; i.Code == "RECORD_REFUSED" && (a["seq"] != uint64(9) || a["bytes"] != 70 || a["path"] != "/x" || a["remedy"] != "raise it") {
				t.Errorf("refused: %v", a)
			}
		}
		if diff := cmp.Diff(s.want, got); diff != "" {
			t.Errorf("state %d (-want +got):\n%s", n, diff)
		}
	}
}

func TestWatchTellsEpisodes(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(seconds int, stats buffer.Stats) moment {
		return moment{stats, start.Add(time.Duration(seconds) * time.Second), time.Duration(seconds) * time.Second}
	}
	stats := func(first, acked, last, truncated uint64) buffer.Stats {
		return buffer.Stats{Bounds: buffer.Bounds{First: first, Acked: acked, Last: last}, Truncated: truncated}
	}
	var w watch
	check := func(got []event.SelfInfo, want ...string) []event.SelfInfo {
		t.Helper()
		var have []string
		for _, i := range got {
			have = append(have, brief(i))
			if _, ok := event.Explain(i.Code); !ok {
				t.Errorf("%s is not in the table", i.Code)
			}
		}
		if diff := cmp.Diff(want, have); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		return got
	}
	fresh := buffer.Stats{Bounds: buffer.Bounds{First: 1}, Epoch: "e", Recovery: &buffer.Recovery{Cause: buffer.ErrDamaged, Aside: "/x/q.db.bad"}}
	check(w.begin(at(0, fresh)), "BUFFER_SET_ASIDE 0 > true", "BUFFER_NEW 0 >e false")
	w = watch{}
	check(w.begin(at(0, stats(5, 10, 100, 7))))

	check(w.step(at(1, stats(5, 10, 200, 7))))
	check(w.step(at(2, stats(31, 10, 300, 27))), "TRUNCATION_STARTED 20 keeping>truncating true")
	check(w.step(at(3, stats(61, 10, 400, 57))))
	check(w.step(at(12, stats(61, 10, 400, 57))))
	ended := check(w.step(at(13, stats(61, 400, 400, 57))), "TRUNCATION_ENDED 50 truncating>keeping true")
	if a := ended[0].Attrs; a["first"] != uint64(11) || a["last"] != uint64(60) {
		t.Errorf("range %v-%v, want 11-60", a["first"], a["last"])
	}
	check(w.step(at(14, stats(61, 400, 400, 57))))

	damaged := stats(61, 400, 400, 57)
	damaged.Corrupt = 3
	check(w.step(at(15, damaged)), "BUFFER_DAMAGED 3 > true")
	damaged.Err = errors.New("no space")
	check(w.step(at(16, damaged)), "BUFFER_FAILED 0 writing>failing true")
	damaged.Err = errors.New("still none")
	check(w.step(at(17, damaged)))
	damaged.Err = nil
	check(w.step(at(18, damaged)), "BUFFER_RECOVERED 0 failing>writing false")

	sized := damaged
	sized.Resized = &buffer.Resized{From: 64 << 20, To: 32 << 20, Dropped: 9}
	check(w.step(at(19, sized)), "BUFFER_RESIZED 9 64MiB>32MiB false")
	check(w.step(at(20, sized)))
	sized.Resized = &buffer.Resized{From: 32 << 20, To: 64 << 20, Err: errors.New("no space")}
	check(w.step(at(21, sized)), "BUFFER_RESIZE_REFUSED 0 32MiB>32MiB true")
	check((&watch{}).begin(at(0, sized)), "BUFFER_RESIZE_REFUSED 0 32MiB>32MiB true")

	moved := sized
	moved.Epoch, moved.Unsent = "e2", 4
	sized.Epoch = "e1"
	check(w.step(at(22, sized)))
	check(w.step(at(23, moved)), "BUFFER_NEW 4 e1>e2 false")
	damaged = moved

	// A suspended host is no jump, as the time since boot goes on; a set clock is.
	check(w.step(moment{damaged, start.Add(time.Hour), time.Hour}))
	check(w.step(moment{damaged, start.Add(time.Hour + clockSlack), time.Hour}))
	back := check(w.step(moment{damaged, start.Add(time.Minute), time.Hour + time.Second}), "CLOCK_JUMP 0 1970-01-01T01:16:42Z>1970-01-01T00:17:40Z false")
	if len(back) > 0 && back[0].Attrs["seconds"] != -3542.0 {
		t.Errorf("jump of %v s", back[0].Attrs["seconds"])
	}
}

// TestResize gives the buffer other bounds, as a reload does.
func TestResize(t *testing.T) {
	q, err := buffer.Open(t.Context(), buffer.Options{Dir: t.TempDir(), AllowUnsafe: true, Cap: 32 << 20})
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{queue: q}
	for _, capacity := range []int64{48 << 20, 24 << 20} {
		b := config.Default().Buffer
		b.Cap = capacity
		if err := a.resize(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		for q.Stats().Cap != capacity && t.Context().Err() == nil { // to shrink goes on without us
			runtime.Gosched()
		}
		for q.Resize(t.Context(), capacity) != nil && t.Context().Err() == nil { // it has the size before it is done
			runtime.Gosched()
		}
	}
	for a.shrinking.Load() != 0 && t.Context().Err() == nil {
		runtime.Gosched()
	}
	// While it is shrunk a reload that wishes the same has its wish, another one is told.
	b := config.Default().Buffer
	a.shrinking.Store(20 << 20)
	for capacity, want := range map[int64]string{20 << 20: "", 16 << 20: "being shrunk to 20971520 bytes", 32 << 20: "being shrunk to 20971520 bytes"} {
		b.Cap = capacity
		if err := a.resize(t.Context(), b); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%d bytes while it is shrunk: %v, want %q", capacity, err, want)
		}
	}
	a.shrinking.Store(0)
	b.Cap, b.RetainAge, b.RetainBytes = 1<<60, 0, 0
	if err := a.resize(t.Context(), b); err == nil || q.Stats().Cap != 24<<20 {
		t.Errorf("more than any disk has: %v", err)
	}
	// What came with the refused size is not applied either, but with one that fits.
	for i, first := range []uint64{1, 1, 3} {
		if i == 2 {
			b.Cap = 24 << 20
			if err := a.resize(t.Context(), b); err != nil {
				t.Fatal(err)
			}
		}
		batch := q.NewBatch()
		if err := errors.Join(batch.End(append(batch.Begin(buffer.Events), "x"...), false), q.Append(t.Context(), batch), q.Flush(t.Context())); err != nil {
			t.Fatal(err)
		}
		if got := q.Bounds().First; got != first {
			t.Errorf("after %d records the first is %d, want %d", i+1, got, first)
		}
		q.Ack(uint64(i + 1))
	}
	if err := q.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestReloadTellsWhatIsInForce: what waits for a restart is told as it is in use, its source
// included.
func TestReloadTellsWhatIsInForce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "edr-sensor.yaml")
	read := func(text string) (l Loaded) {
		t.Helper()
		err := os.WriteFile(path, []byte(text), 0o600)
		if err == nil {
			l.Config, l.Settings, err = config.Explain(path, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	old := read("transport:\n  password_file: /etc/old\nlog:\n  level: info\n")
	got := map[string]config.Setting{}
	for _, s := range old.adopt(read("log:\n  level: debug\ntransport:\n  password_file: /etc/new\nsensor:\n  fork_events: true\n")).Settings {
		got[s.Key] = s
	}
	for key, want := range map[string][2]string{
		"transport.password_file": {"/etc/old", path + ":2:18"}, "log.level": {"debug", path + ":2:10"}, "sensor.fork_events": {"false", "default"},
	} {
		if s := got[key]; s.Value != want[0] || s.Source != want[1] {
			t.Errorf("%s: %+v, want %v", key, s, want)
		}
	}
	if len(got) != len(config.Keys()) {
		t.Errorf("%d settings of %d", len(got), len(config.Keys()))
	}
}

// TestDecisionsAreServedFromTheBuffer asks for what is kept, then goes on with what
// comes: each decision once and in order, and no event.
func TestDecisionsAreServedFromTheBuffer(t *testing.T) {
	q, err := buffer.Open(t.Context(), buffer.Options{Dir: t.TempDir(), AllowUnsafe: true, Cap: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close(context.Background())
	a := &Agent{queue: q, tap: &tap{}, ending: make(chan struct{})}
	a.place.Store(&place{})
	s := newSink(q, a.tap, nil, &a.place)
	write := func(decision bool) {
		t.Helper()
		rec, seq := s.Begin(), s.Next()
		if decision {
			rec = s.BeginDecision(event.DecisionsApprovals)
		}
		if err := errors.Join(s.End(fmt.Appendf(rec, `{"metadata":{"sequence":%d}}`, seq), false, nil), s.Flush(t.Context(), []byte("mark"))); err != nil {
			t.Error(err)
		}
	}
	for i := range 6 {
		write(i%2 == 1)
	}
	if err := q.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	q.Ack(6) // delivered, and kept as the retention tail
	server := httptest.NewServer(http.HandlerFunc(a.serveDecisions))
	defer server.Close()
	ask := func(query string) *http.Response {
		t.Helper()
		r, err := server.Client().Get(server.URL + "/decisions?" + query)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Body.Close() })
		return r
	}
	body, err := io.ReadAll(ask("since=1970-01-01T00:00:00Z").Body)
	if want := "{\"metadata\":{\"sequence\":2}}\n{\"metadata\":{\"sequence\":4}}\n{\"metadata\":{\"sequence\":6}}\n"; err != nil || string(body) != want {
		t.Errorf("kept: %q, %v; want %q", body, err, want)
	}
	if body, err = io.ReadAll(ask("").Body); err != nil || len(body) > 0 {
		t.Errorf("without since: %q, %v", body, err)
	}
	if r := ask("since=yesterday"); r.StatusCode != http.StatusBadRequest {
		t.Errorf("a bad time: %s", r.Status)
	}
	lines := bufio.NewScanner(ask("since=1970-01-01T00:00:00Z&follow=1").Body)
	for _, want := range []uint64{2, 4, 6, 8, 10} {
		if want > 6 {
			write(false)
			write(true)
		}
		if !lines.Scan() || seqOf(lines.Bytes()) != want {
			t.Fatalf("got %q, %v; want seq %d", lines.Text(), lines.Err(), want)
		}
	}
	close(a.ending)
	if lines.Scan() {
		t.Errorf("after the end: %q", lines.Text())
	}
}
