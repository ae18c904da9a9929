// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

var update = flag.Bool("update", false, "write the golden files")

// goldenDecisions are the records of the encoder's golden files, by name, and some
// that the sensor would not write.
func goldenDecisions(t *testing.T) [][]byte {
	t.Helper()
	files, err := filepath.Glob("../../sensor/ocsf/testdata/sensor.*.json")
	if err != nil || len(files) < 8 {
		t.Fatalf("%d golden records, %v", len(files), err)
	}
	var out [][]byte
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := json.Compact(&b, text); err != nil {
			t.Fatal(err)
		}
		out = append(out, b.Bytes())
	}
	const reload = `{"metadata":{"log_name":"decisions:system"},"time":1795446000000,"severity_id":1,"status_code":"CONFIG_RELOADED","message":"two settings changed","count":2,` +
		`"unmapped":{"sensor":{"before":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","after":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",` +
		`"asked_by":"SIGHUP","applied":[{"key":"log.level","before":"info","after":"debug","live":true}],"needs_restart":[],"not_found":["exclude /x: no such file"],"seconds":1.25,"ok":true}}}`
	const hostile = `{"metadata":{"log_name":"decisions:system","tags":[{"name":"case_id","value":"\u001b[31mC"}]},"time":1,"status_code":"A\u0007B","message":"\u001b]0;owned\u0007","unmapped":{"sensor":{"x":"\u202ey"}}}`
	return append(out, []byte(reload), []byte(hostile), []byte(`{"id":1,"data":"of another producer"}`), []byte("no JSON"))
}

func TestDecisionLines(t *testing.T) {
	var b bytes.Buffer
	p := &decisionPrinter{out: bufio.NewWriter(&b), flags: &decisionsFlags{}, zone: time.UTC}
	for _, rec := range goldenDecisions(t) {
		if err := p.show(rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.flush(); err != nil {
		t.Fatal(err)
	}
	const file = "testdata/decisions.golden"
	if *update {
		if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

func TestDecisionsFromRedis(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	client := server.Client()
	defer client.Close()
	path := configFor(t, fmt.Sprintf("transport: {address: %q}\n", server.Addr()))
	rec := func(stream, code, caseID string) string {
		return fmt.Sprintf(`{"metadata":{"log_name":"decisions:%s","tags":[{"name":"case_id","value":%q}]},"time":1,"status_code":%q,"message":"m"}`, stream, caseID, code)
	}
	mode, opened, closed, left := rec("system", "MODE", ""), rec("approvals", "CASE_OPENED", "C-1"), rec("approvals", "CASE_CLOSED", "C-2"), rec("agents", "SUPPRESSED", "")
	now := time.Now().UnixMilli()
	add(t, client, "decisions:system", "1000-0", rec("system", "START", "")) // long ago
	add(t, client, "decisions:system", fmt.Sprintf("%d-0", now-4000), mode)
	add(t, client, "decisions:approvals", fmt.Sprintf("%d-0", now-3000), opened)
	add(t, client, "decisions:agents", fmt.Sprintf("%d-0", now-2000), left)
	add(t, client, "decisions:approvals", fmt.Sprintf("%d-0", now-1000), closed)
	add(t, client, eventsKey, fmt.Sprintf("%d-0", now), execOf(1))
	for _, c := range []struct {
		args []string
		want []string
	}{
		{nil, []string{mode, opened, left, closed}},
		{[]string{"--since", "1970-01-01T00:00:00Z", "--code", "start"}, []string{rec("system", "START", "")}},
		{[]string{"--code", "CASE_*"}, []string{opened, closed}},
		{[]string{"--case", "C-2,C-3"}, []string{closed}},
		{[]string{"--since", "1ms"}, nil},
	} {
		code, out, errs := run(t, append([]string{"decisions", "--config", path, "--json"}, c.args...)...)
		var got []string
		for line := range strings.Lines(out) {
			got = append(got, strings.TrimSuffix(line, "\n"))
		}
		if d := cmp.Diff(c.want, got); d != "" || code != 0 || errs != "" {
			t.Errorf("%q: exit code %d: %s (-want +got):\n%s", c.args, code, errs, d)
		}
	}
}

// TestDecisionsFromTheSensor has Redis away: what the sensor's buffer keeps is shown
// in its place, and that it is.
func TestDecisionsFromTheSensor(t *testing.T) {
	asked := make(chan string, 8)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /decisions", func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.RawQuery
		_, _ = io.WriteString(w, `{"metadata":{"log_name":"decisions:system"},"time":1,"status_code":"MODE","message":"kept"}`+"\n")
	})
	socket, stop := fakeControl(t, mux)
	path := configFor(t, fmt.Sprintf("transport: {address: \"unix://%s/no-redis\"}\ncontrol: {socket: %s}\n", t.TempDir(), socket))
	code, out, errs := run(t, "decisions", "--config", path, "--since", "2026-01-31T15:04:05Z")
	if code != 0 || !strings.Contains(out, "MODE                 kept\n") || !strings.Contains(errs, "what follows is what the sensor's buffer still has") {
		t.Errorf("exit code %d, %q, %q", code, out, errs)
	}
	if q := <-asked; q != "since=2026-01-31T15%3A04%3A05Z" {
		t.Errorf("asked with %s", q)
	}
	// A sensor that ends a view which follows is said; one that does not is no error.
	if code, _, errs := run(t, "decisions", "--config", path, "--tap", "--follow"); code != exitFailure || !strings.Contains(errs, "ended") {
		t.Errorf("follow: exit code %d, %q", code, errs)
	}
	if q := <-asked; q != "follow=1" {
		t.Errorf("asked with %s", q)
	}
	stop()
	if code, _, errs := run(t, "decisions", "--config", path); code != exitUnavailable || !strings.Contains(errs, "no-redis") || !strings.Contains(errs, "no sensor answers") {
		t.Errorf("neither answers: exit code %d, %q", code, errs)
	}
}

// TestCutDecisions has a sensor that cannot read its buffer to the end.
func TestCutDecisions(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") })
	mux.HandleFunc("GET /decisions", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"metadata":{"log_name":"decisions:system"},"time":1,"status_code":"MODE","message":"first"}`+"\n")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	socket, _ := fakeControl(t, mux)
	path := configFor(t, fmt.Sprintf("agent: {state_dir: %s}\ncontrol: {socket: %s}\n", t.TempDir(), socket))
	code, out, errs := run(t, "decisions", "--config", path)
	if code != exitFailure || !strings.Contains(out, "first") || !strings.Contains(errs, "not complete") {
		t.Errorf("exit code %d, %q, %q", code, out, errs)
	}
	code, out, errs = run(t, "report", "--config", path, "-o", "-")
	if code != 0 {
		t.Fatalf("report: exit code %d, %s", code, errs)
	}
	files, m := unpack(t, []byte(out))
	if !strings.Contains(files["decisions.ndjson"], "first") || !m.omits("the rest of decisions.ndjson", io.ErrUnexpectedEOF.Error()) {
		t.Errorf("report: %q, left out %v", files["decisions.ndjson"], m.LeftOut)
	}
}

func TestDecisionsExplain(t *testing.T) {
	code, out, _ := run(t, "decisions", "--explain", "fenced")
	want := `FENCED: Fenced, on the stream decisions:system

Another process writes under this agent's id, so delivery has stopped. A clone
or a restored buffer alone does not lead here, for the sensor then goes on in a
new epoch (IDENTITY_NEW); it stops when it is fenced again within ten minutes,
or cannot write down the new epoch.

What to do: Find both hosts by their agent id: two with the same ` + "`agent.id`" + ` in their
configuration, or a machine that is put back again and again. Give each its own
id, then restart the one that stopped: it goes on in a new epoch with all that
waits in its buffer.
`
	if d := cmp.Diff(want, out); d != "" || code != 0 {
		t.Errorf("exit code %d (-want +got):\n%s", code, d)
	}
	for _, args := range [][]string{{"--explain", "NO_SUCH"}, {"--since", "yesterday"}, {"--code", "["}, {"extra"}} {
		if code, _, errs := run(t, append([]string{"decisions"}, args...)...); code != exitUsage || errs == "" {
			t.Errorf("%q: exit code %d, %q", args, code, errs)
		}
	}
}
