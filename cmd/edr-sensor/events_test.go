// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/redis/go-redis/v9"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// run executes a command line to its end.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := app{stdout: &out, stderr: &errs}
	code = a.run(t.Context(), args)
	return code, out.String(), errs.String()
}

func configFor(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "edr-sensor.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func execOf(pid int) string {
	return eventJSON("process.exec", fmt.Sprintf(`"process":{"pid":%d,"name":"x","path":"/bin/x","cmd_line":"x"}`, pid))
}

func add(t *testing.T, c *redis.Client, key, id, data string) {
	t.Helper()
	if err := c.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: id, Values: []any{"id", "u", "data", data}}).Err(); err != nil {
		t.Fatal(err)
	}
}

const (
	eventsKey    = "edr:{s000}:events"
	decisionsKey = "decisions:system"
)

func TestEventsFromRedis(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	client := server.Client()
	path := configFor(t, fmt.Sprintf("transport: {address: %q}\n", server.Addr()))
	mode := eventJSON("sensor.mode_change", `"message":"online"`)
	add(t, client, eventsKey, "1000-0", execOf(1))
	add(t, client, decisionsKey, "2000-0", mode)
	add(t, client, eventsKey, "3000-0", execOf(3))
	add(t, client, eventsKey, "4000-0", "not\x1b an event")
	add(t, client, eventsKey, "5000-0", eventJSON("process.exit", `"process":{"pid":3,"name":"x"},"exit_code":1`))

	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"both streams in order", []string{"--from-start", "-o", "json"}, []string{execOf(1), mode, execOf(3), "not\x1b an event", eventJSON("process.exit", `"process":{"pid":3,"name":"x"},"exit_code":1`)}},
		{"since a time", []string{"--since", "1970-01-01T00:00:03Z", "--kind", "process", "-o", "json"}, []string{execOf(3), eventJSON("process.exit", `"process":{"pid":3,"name":"x"},"exit_code":1`)}},
		{"since a moment ago", []string{"--since", "1h"}, nil},
		{"by pid", []string{"--from-start", "--pid", "1", "-o", "json"}, []string{execOf(1)}},
		{"by kind and executable", []string{"--from-start", "--kind", "exec,exit", "--exe", "/bin/*", "-o", "json"}, []string{execOf(1), execOf(3)}},
		{"the first two", []string{"--from-start", "-n", "2", "-o", "json"}, []string{execOf(1), mode}},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, out, errs := run(t, append([]string{"events", "--config", path}, c.args...)...)
			if code != 0 || errs != "" {
				t.Errorf("exit code %d: %s", code, errs)
			}
			var got []string
			for line := range strings.Lines(out) {
				got = append(got, strings.TrimSuffix(line, "\n"))
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("lines (-want +got):\n%s", d)
			}
		})
	}
	code, out, _ := run(t, "events", "--config", path, "--from-start")
	if code != 0 || !strings.Contains(out, `not\x1b an event`) || strings.Count(out, "\n") != 5 {
		t.Errorf("exit code %d, compact:\n%s", code, out)
	}
}

// TestEventsReadsAllOfALongStream has more entries than one read returns, in one
// stream, and few in the other.
func TestEventsReadsAllOfALongStream(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	client := server.Client()
	pipe := client.Pipeline()
	const n = 3*readCount + 7
	for i := range n {
		key := eventsKey
		if i%200 == 0 {
			key = decisionsKey
		}
		pipe.XAdd(t.Context(), &redis.XAddArgs{Stream: key, ID: fmt.Sprintf("%d-0", i+1), Values: []any{"data", fmt.Sprintf(`{"n":%d}`, i)}})
	}
	if _, err := pipe.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	code, out, errs := run(t, "events", "--config", configFor(t, fmt.Sprintf("transport: {address: %q}\n", server.Addr())), "--from-start", "-o", "json")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	var want strings.Builder
	for i := range n {
		fmt.Fprintf(&want, "{\"n\":%d}\n", i)
	}
	if d := cmp.Diff(want.String(), out); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

func TestMergeWaitsForTheOtherStream(t *testing.T) {
	full := make([]redis.XMessage, readCount)
	for i := range full {
		full[i] = redis.XMessage{ID: fmt.Sprintf("%d-0", i+1), Values: map[string]any{"data": fmt.Sprint(i + 1)}}
	}
	s := &streams{last: map[string]string{"b": "0-0"}}
	late := redis.XMessage{ID: fmt.Sprintf("%d-0", readCount+5), Values: map[string]any{"data": "late"}}
	got := s.merge([]redis.XStream{{Stream: "a", Messages: full}, {Stream: "b", Messages: []redis.XMessage{late}}})
	if len(got) != readCount || s.last["b"] != "0-0" || s.last["a"] != fmt.Sprintf("%d-0", readCount) {
		t.Errorf("%d entries, positions %v", len(got), s.last)
	}
}

func TestStreamIDOrder(t *testing.T) {
	ids := []string{"0-0", "1-0", "1-2", "1-10", "2-0", "10-0", fmt.Sprintf("10-%d", uint64(math.MaxUint64))}
	for i := range ids {
		for j := range ids {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := parseID(ids[i]).compare(parseID(ids[j])); got != want {
				t.Errorf("%s against %s: %d, want %d", ids[i], ids[j], got, want)
			}
		}
	}
}

// syncBuffer collects standard error of a command that runs.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestEventsFollowsAcrossARestart(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	path := configFor(t, fmt.Sprintf("transport: {address: %q, timeout: 30s}\n", server.Addr()))
	add(t, server.Client(), eventsKey, "*", execOf(1)) // before the start: not shown

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	var errs syncBuffer
	ended := make(chan int, 1)
	go func() {
		a := app{stdout: w, stderr: &errs}
		ended <- a.run(ctx, []string{"events", "--config", path, "-o", "json"})
		w.Close()
	}()
	lines := make(chan string)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			lines <- s.Text()
		}
	}()
	// The view starts at an unknown moment, so markers are added until it shows one.
	see := func(pid int) {
		t.Helper()
		timeout := time.After(time.Minute)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		client := server.Client()
		for {
			select {
			case line := <-lines:
				if strings.Contains(line, `"pid":1,`) {
					t.Error("shows what was there before")
				}
				if line == execOf(pid) {
					return
				}
			case <-tick.C:
				add(t, client, eventsKey, "*", execOf(pid))
			case code := <-ended:
				t.Fatalf("ended with %d: %s", code, errs.String())
			case <-timeout:
				t.Fatalf("no event of %d: %s", pid, errs.String())
			}
		}
	}
	see(2)
	server.Kill9()
	server.Restart()
	see(3)
	cancel()
	for range lines { // until it ends
	}
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d", code)
	}
	if got := errs.String(); !strings.Contains(got, "trying again\n") || !strings.Contains(got, "is back\n") {
		t.Errorf("says %q", got)
	}
}

func TestEventsExplainsRefusals(t *testing.T) {
	server := redistest.Start(t, redistest.Options{Config: map[string]string{"requirepass": "secret"}, Password: "secret"})
	path := configFor(t, fmt.Sprintf("transport: {address: %q}\n", server.Addr()))
	code, _, errs := run(t, "events", "--config", path, "--from-start")
	if code != exitFailure || !strings.Contains(errs, "unauthenticated") || !strings.Contains(errs, "Try: check transport.username and transport.password_file") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if err := server.Client().Do(t.Context(), "ACL", "SETUSER", "writer", "on", ">w", "~*", "+ping", "+xadd").Err(); err != nil {
		t.Fatal(err)
	}
	path = configFor(t, fmt.Sprintf("transport: {address: %q, username: writer, password_file: pw}\n", server.Addr()))
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "pw"), []byte("w\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, errs = run(t, "events", "--config", path, "--from-start")
	if code != exitFailure || !strings.Contains(errs, "NOPERM") || !strings.Contains(errs, "--tap") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

// fakeControl answers on a control socket as a sensor does, until the test ends or stop is
// called, and returns the socket's path, which is short: one has at most 107 bytes.
func fakeControl(t *testing.T, mux *http.ServeMux) (socket string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "edr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	stop = func() { _ = server.Close() }
	t.Cleanup(stop)
	go func() { _ = server.Serve(l) }()
	return socket, stop
}

// fakeSensor is one that has a status and events, and returns the path of its socket.
func fakeSensor(t *testing.T, status string, tap func(io.Writer)) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, status) })
	mux.HandleFunc("GET /tap", func(w http.ResponseWriter, _ *http.Request) {
		if tap == nil {
			http.Error(w, "all 16 live views are taken", http.StatusServiceUnavailable)
			return
		}
		tap(w)
	})
	socket, _ := fakeControl(t, mux)
	return socket
}

func TestEventsFromTheTap(t *testing.T) {
	socket := fakeSensor(t, "", func(w io.Writer) {
		fmt.Fprintf(w, "%s\n{\"tap_dropped\":7}\n%s\n", execOf(1), execOf(2))
	})
	code, out, errs := run(t, "events", "--socket", socket, "-o", "json")
	if code != exitFailure || out != execOf(1)+"\n"+execOf(2)+"\n" {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	want := "7 events left out: this view is slower than the sensor\nedr-sensor: the sensor on " + socket + " ended\nTry: systemctl status edr-sensor\n"
	if d := cmp.Diff(want, errs); d != "" {
		t.Errorf("stderr (-want +got):\n%s", d)
	}

	// Without Redis in the configuration the tap is what there is.
	path := configFor(t, "control: {socket: "+socket+"}\n")
	code, out, errs = run(t, "events", "--config", path, "-n", "1", "--pid", "2", "-o", "json")
	if code != 0 || out != execOf(2)+"\n" {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}

	code, _, errs = run(t, "events", "--socket", fakeSensor(t, "", nil))
	if code != exitFailure || !strings.Contains(errs, "all 16 live views are taken") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}
