// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/buffer"
	"github.com/aurorasoc/edr-sensor/internal/agent"
	"github.com/aurorasoc/edr-sensor/internal/evidence"
)

// infos are what a buffer may say, at a quarter past five.
func infos() map[string]string {
	return map[string]string{
		"well": `{"path":"/var/lib/edr-sensor/buffer/q.db","live":true,"epoch":"019ac3f0d1e2a1b2c3d4","cap":536870912,"bytes":67108864,"unsent_bytes":262144,"chunks":300,"compression":"zstd","oldest_compression":"none","newest_compression":"zstd","records":60000,"unsent":12,
 "first":940001,"acked":999988,"last":1000000,"oldest":"2026-11-23T17:09:58Z","newest":"2026-11-23T17:14:59.9Z","oldest_unsent":"2026-11-23T17:14:59.5Z","reclaimed":940000}`,
		"empty": `{"path":"/b/q.db","epoch":"019ac3f0d1e2a1b2c3d4","cap":16777216,"first":1}`,
		"troubled": `{"path":"/var/lib/edr-sensor/buffer/q.db","live":true,"epoch":"019ac3f0d1e2a1b2c3d4","cap":536870912,"bytes":493921239,"unsent_bytes":493921239,"chunks":2001,"records":400000,"unsent":400000,
 "first":600001,"acked":500000,"last":1000000,"oldest":"2026-11-22T17:09:58Z","newest":"2026-11-23T17:14:59.9Z","oldest_unsent":"2026-11-22T17:09:58Z",
 "truncated":99000,"reclaimed":500000,"corrupt":300,"in_doubt":700,"salvaged":1234567,
 "losses":[{"cause":"corrupt","first":0,"last":0,"count":0},{"cause":"truncated","first":500701,"last":600000,"count":99300}],
 "recovery":{"at":"2026-11-20T17:15:00Z","cause":"buffer file is damaged: preflight: page 7: says it is page 9","set_aside":"x","exact":true,"salvaged":1234567,"lost":300},
 "set_aside":[{"path":"/var/lib/edr-sensor/buffer/q.db.bad-20261120T171500.000000000Z","at":"2026-11-20T17:15:00Z","bytes":536870912},{"path":"/var/lib/edr-sensor/buffer/q.db.bad-\u001b[2J","bytes":4096,"chunk":77}],
 "error":"no space left on device"}`,
		"damaged": `{"path":"/mnt/case/q.db","epoch":"019ac3f0d1e2a1b2c3d4","cap":2097152,"bytes":1000000,"unsent_bytes":1000000,"chunks":31,"oldest_compression":"s2","newest_compression":"s2","records":900,"unsent":900,"first":101,"acked":100,"last":1010,
 "size":2097152,"disk":1200000,"in_use":true,"holder":"pid 4711","damage":"buffer file is damaged: preflight: page 7: used twice","corrupt":10}`,
	}
}

func TestBufferInfoScreen(t *testing.T) {
	now := time.Date(2026, 11, 23, 17, 15, 0, 0, time.UTC)
	for name, text := range infos() {
		for look, st := range styles() {
			t.Run(name+"-"+look, func(t *testing.T) {
				var f fileInfo
				if err := json.Unmarshal([]byte(text), &f); err != nil {
					t.Fatal(err)
				}
				checkScreen(t, filepath.Join("testdata", "screens", "buffer-"+name+"-"+look), f.screen(now, time.UTC, st).lines, st)
			})
		}
	}
}

func TestParseSeqs(t *testing.T) {
	for text, want := range map[string][2]uint64{"": {0, 0}, "17": {17, 17}, "100-199": {100, 199}, "100-": {100, 0}, "-199": {0, 199}} {
		if first, last, err := parseSeqs(text); err != nil || [2]uint64{first, last} != want {
			t.Errorf("%q: %d to %d, %v", text, first, last, err)
		}
	}
	for _, text := range []string{"-", "0", "0-5", "x", "1-2-3", "1-x", "18446744073709551616", " 1"} {
		if first, last, err := parseSeqs(text); err == nil {
			t.Errorf("%q: %d to %d", text, first, last)
		}
	}
}

// TestExportSaysWhatIsMissing shows all that may be said on standard error.
func TestExportSaysWhatIsMissing(t *testing.T) {
	var errs strings.Builder
	a := &app{stderr: &errs}
	err := a.exported(&exportFlags{to: "e.ndjson"}, &evidence.Summary{
		Epoch: "019ac3f0d1e2a1b2c3d4", First: 1, Last: 5000, Records: 4321, Bytes: 5 << 20, SHA256: "ab12",
		Missing: []evidence.Missing{
			{Cause: evidence.CauseGone, First: 1, Last: 9},
			{Cause: buffer.CauseTruncated, First: 10, Last: 10},
			{Cause: buffer.CauseCorrupt, First: 20, Last: 29, Reason: "damaged chunk:\x1b[2J checksum"},
			{Cause: evidence.CauseLeft, First: 30, Last: 31},
			{Cause: "server_loss", First: 40, Last: 1040},
			{Cause: evidence.CauseFuture, First: 4000, Last: 5000},
		},
		More: 7, Unknown: 1, Begins: time.Unix(1000, 0),
	}, "the file is damaged")
	var e *exit
	if !errors.As(err, &e) || e.code != exitFailure {
		t.Errorf("%v", err)
	}
	want := `exported 4,321 records (5.0 MiB) of seq 1 to 5000, epoch 019ac3f0d1e2a1b2c3d4, to e.ndjson
sha256 ab12
missing: seq 1 to 9 (9 records): no longer in the buffer; delivered, or named in a RECORDS_LOST record
missing: seq 10: dropped undelivered, because the buffer was full
missing: seq 20 to 29 (10 records): damaged on disk: damaged chunk:\x1b[2J checksum
missing: seq 30 to 31 (2 records): left the buffer during the export
missing: seq 40 to 1040 (1,001 records): server_loss
missing: seq 4000 to 5000 (1,001 records): not there yet
missing: 7 records more, in other places
missing: 1 record that say nothing to select them by
missing: what is older than 1970-01-01T00:16:40Z, the oldest record in the buffer: it was delivered, or is named in a RECORDS_LOST record
missing: perhaps more: the file is damaged
`
	if d := cmp.Diff(want, errs.String()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// TestExportFromTheSensor has a sensor that sends what it should, one that breaks off, and
// one whose answer is not what it says.
func TestExportFromTheSensor(t *testing.T) {
	const body = "{\"a\":1}\n{\"a\":2}\n"
	sum := sha256.Sum256([]byte(body))
	asked := make(chan string, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /buffer/export", func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.RawQuery
		w.Header().Set("Trailer", agent.ExportTrailer)
		_, _ = io.WriteString(w, body)
		s := evidence.Summary{Epoch: "e", First: 1, Last: 2, Records: 2, Bytes: int64(len(body)), SHA256: hex.EncodeToString(sum[:])}
		switch r.URL.Query().Get("case") {
		case "cut":
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		case "ended":
			return
		case "other":
			s.SHA256 = "00"
		case "stops":
			s.Error = "the sensor is stopping"
		case "many":
			for n := range uint64(100) {
				s.Missing = append(s.Missing, evidence.Missing{Cause: "corrupt", First: 2 * n, Last: 2 * n, Reason: strings.Repeat("r", 200)})
			}
		}
		text, _ := json.Marshal(s)
		w.Header().Set(agent.ExportTrailer, string(text))
	})
	dir := t.TempDir()
	socket, stop := fakeControl(t, mux)
	for _, c := range []struct {
		name string
		code int
		want string
	}{
		{"good", exitOK, "exported 2 records (16 B) of seq 1 to 2, epoch e\nsha256 " + hex.EncodeToString(sum[:]) + "\n"},
		{"cut", exitFailure, "the sensor dropped the connection"},
		{"ended", exitFailure, "the sensor dropped the connection"},
		{"other", exitFailure, "is not what the sensor sent"},
		{"stops", exitFailure, "edr-sensor: the export is not complete: the sensor is stopping\n"},
		{"many", exitFailure, "missing: seq 198: damaged on disk: rrrr"},
	} {
		code, out, errs := run(t, "buffer", "export", "--socket", socket, "--case", c.name, "--kind", "exec,net", "--seq", "1-2")
		if code != c.code || out != body || !strings.Contains(errs, c.want) {
			t.Errorf("%s: exit code %d, %q, %q", c.name, code, out, errs)
		}
		if q, want := <-asked, "case="+c.name+"&first=1&kind=exec&kind=net&last=2"; q != want {
			t.Errorf("asked for %s, want %s", q, want)
		}
	}

	// A file is for its owner, and never written over.
	to := filepath.Join(dir, "evidence.ndjson")
	if code, out, errs := run(t, "buffer", "export", "--socket", socket, "--to", to); code != exitOK || out != "" || !strings.Contains(errs, ", to "+to) {
		t.Errorf("exit code %d, %q, %q", code, out, errs)
	}
	<-asked
	st, err := os.Stat(to)
	data, rerr := os.ReadFile(to)
	if err = errors.Join(err, rerr); err != nil || st.Mode() != 0o600 || string(data) != body {
		t.Errorf("%v, %v, %q", err, st.Mode(), data)
	}
	if code, _, errs := run(t, "buffer", "export", "--socket", socket, "--to", to); code != exitFailure || !strings.Contains(errs, "evidence is not overwritten") {
		t.Errorf("exit code %d, %q", code, errs)
	}
	stop()
	other := filepath.Join(dir, "other")
	if code, _, errs := run(t, "buffer", "export", "--socket", socket, "--to", other); code != exitFailure || !strings.Contains(errs, "no sensor answers") {
		t.Errorf("exit code %d, %q", code, errs)
	}
	if _, err := os.Stat(other); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an empty file is left: %v", err)
	}
}

// TestExportIsInterrupted: Ctrl-C ends it, even where nobody takes what it writes.
func TestExportIsInterrupted(t *testing.T) {
	dir := t.TempDir()
	q, err := buffer.Open(t.Context(), buffer.Options{Dir: dir, Cap: 16 << 20, AllowUnsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	b := q.NewBatch()
	for range 100 {
		if err := b.End(append(b.Begin(buffer.Events), strings.Repeat("x", 10<<10)...), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(q.Append(t.Context(), b), q.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var errs strings.Builder
	done := make(chan int, 1)
	go func() { done <- (&app{stdout: w, stderr: &errs}).run(ctx, []string{"buffer", "export", dir}) }()
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil { // and no more
		t.Fatal(err)
	}
	cancel()
	select {
	case code := <-done:
		if code != exitFailure || !strings.Contains(errs.String(), "the export is not complete: interrupted") {
			t.Errorf("exit code %d, %q", code, errs.String())
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it goes on")
	}
}

// makeBuffer makes a buffer of a stopped sensor in dir: seqs 1 to 9 in three chunks, of
// which the first is delivered.
func makeBuffer(dir string) error {
	ctx := context.Background()
	q, err := buffer.Open(ctx, buffer.Options{Dir: dir, Cap: 16 << 20, CommitInterval: time.Millisecond, AllowUnsafe: true})
	if err != nil {
		return err
	}
	for chunk := range 3 {
		b := q.NewBatch()
		for i := range 3 {
			seq, code, stream := 3*chunk+i+1, []string{"process.exec", "net.connect", "sensor.start"}[i], []buffer.Stream{buffer.Events, buffer.Events, buffer.DecisionsSystem}[i]
			rec := fmt.Appendf(b.Begin(stream), `{"metadata":{"sequence":%d,"event_code":%q,"tags":[{"name":"case_id","value":"C-%d"}]},"time_dt":"2026-11-29T08:0%d:00Z"}`, seq, code, chunk, seq)
			if err := b.End(rec, false); err != nil {
				return err
			}
		}
		if err := errors.Join(q.Append(ctx, b), q.Flush(ctx)); err != nil {
			return err
		}
	}
	q.Ack(3)
	return q.Close(ctx)
}

// harmBuffer changes a byte of each record chunk that has seq in dir.
func harmBuffer(dir string, seq uint64) error {
	s, err := buffer.Inspect(context.Background(), dir)
	if err != nil {
		return err
	}
	at := int64(0)
	err = s.Walk(context.Background(), buffer.Range{First: seq, Last: seq}, func(c *buffer.Chunk) bool { at = c.Offset + 100; return false })
	f, ferr := os.OpenFile(s.Path, os.O_RDWR, 0)
	if err = errors.Join(err, ferr, s.Close()); err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{0xff}, at)
	return errors.Join(err, f.Close())
}
