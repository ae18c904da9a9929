// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/config"
)

func TestAgentIDStays(t *testing.T) {
	dir := t.TempDir()
	id, err := agentID("", dir)
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(id) {
		t.Errorf("%q is no version 4 UUID", id)
	}
	if again, err := agentID("", dir); err != nil || again != id {
		t.Errorf("second start: %q, %v; want %q", again, err, id)
	}
	if configured, err := agentID("web-01", dir); err != nil || configured != "web-01" {
		t.Errorf("configured: %q, %v", configured, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".new-*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestAgentIDErrorsNameTheFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "agent_id")
	for _, content := range []string{"", "\n", "two words\n", strings.Repeat("x", 129)} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if id, err := agentID("", dir); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "agent.id") {
			t.Errorf("file %q: %q, %v", content, id, err)
		}
	}
	if _, err := agentID("", filepath.Join(dir, "missing")); err == nil || !strings.Contains(err.Error(), "agent id") {
		t.Errorf("no directory: %v", err)
	}
}

func TestControlSocketIsTakenOverOnlyFromTheDead(t *testing.T) {
	dir, err := os.MkdirTemp("", "edr-control") // a socket path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "run", "control.sock")

	first, err := listenControl(t.Context(), path, "")
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", fi, err)
	}
	if _, err := listenControl(t.Context(), path, ""); err == nil || !strings.Contains(err.Error(), "another sensor answers") {
		t.Errorf("while one listens: %v", err)
	}
	// A killed sensor leaves the file behind.
	first.(*peerListener).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := listenControl(t.Context(), path, "root")
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("socket with a group: %v, %v; want mode 0660", fi, err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenControl(t.Context(), path, ""); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("over a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("the file is now %q, %v", b, err)
	}
	if _, err := listenControl(t.Context(), filepath.Join(dir, "other.sock"), "no-such-group"); err == nil || !strings.Contains(err.Error(), "control.group") {
		t.Errorf("unknown group: %v", err)
	}
}

func TestTapNeverWaits(t *testing.T) {
	a := &Agent{tap: &tap{}, ending: make(chan struct{})}
	a.tap.publish([]byte("nobody looks"), false)
	slow := a.tap.open(false)
	for i := range tapLines + 5 {
		a.tap.publish(fmt.Appendf(nil, "%d", i), false)
	}
	if got := slow.dropped.Load(); got != 5 {
		t.Errorf("%d lines dropped, want 5", got)
	}
	if got := string(<-slow.lines); got != "0\n" {
		t.Errorf("first line %q", got)
	}
	a.tap.close(slow)
	a.tap.close(slow)
	if n := a.tap.viewers.Load(); n != 0 {
		t.Errorf("%d viewers left", n)
	}

	for range tapViewers {
		if a.tap.open(false) == nil {
			t.Fatal("refused too early")
		}
	}
	w := httptest.NewRecorder()
	a.serveTap(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/tap", nil))
	if w.Code != http.StatusServiceUnavailable {
		t.Errorf("one viewer too many: %d", w.Code)
	}
}

// TestTapBacklogIsBoundedInBytes has a viewer stand still while records of a megabyte pass.
func TestTapBacklogIsBoundedInBytes(t *testing.T) {
	const size, passed = 1 << 20, 64
	a := &Agent{tap: &tap{}}
	slow := a.tap.open(false)
	for range passed {
		a.tap.publish(make([]byte, size), false)
	}
	queued := len(slow.lines)
	if queued*size > tapBytes+size || queued == 0 || slow.dropped.Load() != uint64(passed-queued) {
		t.Errorf("%d lines of %d bytes wait, and %d were dropped of %d", queued, size, slow.dropped.Load(), passed)
	}
	for range queued {
		slow.took(<-slow.lines)
	}
	if a.tap.publish(make([]byte, 4<<20), false); len(slow.lines) != 1 {
		t.Error("a viewer who has caught up does not get the largest record")
	}
}

func TestTapTellsWhatItDropped(t *testing.T) {
	a := &Agent{tap: &tap{}, ending: make(chan struct{})}
	s := httptest.NewServer(http.HandlerFunc(a.serveTap))
	defer s.Close()
	r, err := http.Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	a.tap.mu.Lock()
	for v := range a.tap.set {
		v.dropped.Store(3)
	}
	a.tap.mu.Unlock()
	a.tap.publish([]byte(`{"n":1}`), false)
	buf := make([]byte, 64)
	var got []byte
	for !bytes.Contains(got, []byte("tap_dropped")) {
		n, err := r.Body.Read(buf)
		if got = append(got, buf[:n]...); err != nil {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if want := "{\"n\":1}\n{\"tap_dropped\":3}\n"; string(got) != want {
		t.Errorf("%q, want %q", got, want)
	}
	close(a.ending)
}

// TestTapTellsOneWhoStaysBehind has more events come than a viewer takes, all the time.
func TestTapTellsOneWhoStaysBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Agent{tap: &tap{}, ending: make(chan struct{})}
		l := &pipeListener{make(chan net.Conn), make(chan struct{})}
		s := newServer(t.Context(), http.HandlerFunc(a.serveTap))
		served := make(chan struct{})
		go func() { defer close(served); _ = s.Serve(l) }()
		client, server := net.Pipe()
		l.conns <- server
		if _, err := io.WriteString(client, "GET /tap HTTP/1.1\r\nHost: s\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		r, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		buf, event := make([]byte, 4096), make([]byte, 1024)
		for start := time.Now(); !bytes.Contains(got, []byte("tap_dropped")); pass(10 * time.Millisecond) {
			if time.Since(start) > 10*time.Second {
				t.Error("nothing is said of what was dropped")
				break
			}
			for range 100 {
				a.tap.publish(event, false)
			}
			n, err := r.Body.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, buf[:n]...)
		}
		if err := errors.Join(client.Close(), s.Close()); err != nil {
			t.Error(err)
		}
		<-served
	})
}

func TestNewUndoesWhatItBuilt(t *testing.T) {
	cfg := config.Default()
	cfg.Agent.StateDir = filepath.Join(t.TempDir(), "state")
	cfg.Buffer.Dir = filepath.Join(cfg.Agent.StateDir, "buffer")
	cfg.Buffer.Cap = 16 << 20
	cfg.Sensor.Scope = config.Scope{Kind: config.ScopeTree, PID: 1<<31 - 1}
	for range 2 { // the second would find the buffer locked
		_, err := New(t.Context(), Options{Loaded: Loaded{Config: cfg}, Version: "test"})
		if err == nil || !strings.Contains(err.Error(), "sensor.scope: \"tree:2147483647\" is no process here") {
			t.Errorf("New: %v", err)
		}
	}
}

func TestCleanupsRunInReverseAndAllOfThem(t *testing.T) {
	a := &Agent{}
	var order []string
	for _, name := range []string{"one", "two", "three"} {
		a.defers(name, func(context.Context) error {
			order = append(order, name)
			if name == "two" {
				return os.ErrClosed
			}
			return nil
		})
	}
	if err := a.undo(t.Context()); err == nil || !strings.Contains(err.Error(), "close two") {
		t.Errorf("undo: %v", err)
	}
	if got := strings.Join(order, " "); got != "three two one" {
		t.Errorf("order %q", got)
	}
}

func TestStatusIsPlainJSON(t *testing.T) {
	b, err := json.Marshal(Status{})
	if err != nil {
		t.Fatal(err)
	}
	var back Status
	if err := json.Unmarshal(b, &back); err != nil {
		t.Errorf("status does not read back: %v", err)
	}
}
