// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// TestHeldPort starts a sensor whose http.listen another process holds: it watches, says so
// everywhere but there, and serves as soon as the port is free.
func TestHeldPort(t *testing.T) {
	cfg := onlyThis(t, os.Getpid())
	// None that the kernel gives to whoever connects to something between the holder's end and
	// the next attempt.
	holder, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", redistest.FreePort(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	cfg.HTTP.Listen = holder.Addr().String()
	dir, err := os.MkdirTemp("", "edr-control") // a socket path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg.Control.Socket = filepath.Join(dir, "control.sock")
	a, err := New(t.Context(), Options{Loaded: Loaded{Config: cfg}, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	view := a.tap.open(false)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()

	said := decided(t, view, "HTTP_UNSERVED")
	for _, want := range []string{cfg.HTTP.Listen, "address already in use", "ss -ltnp"} {
		if !strings.Contains(said, want) {
			t.Errorf("the decision does not say %q: %s", want, said)
		}
	}
	program := filepath.Join(dir, "seen-meanwhile")
	if err := os.Symlink("/bin/true", program); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command(program).Run(); err != nil {
		t.Fatal(err)
	}
	decided(t, view, program)

	control := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", cfg.Control.Socket)
	}}}
	await := func(what string, told bool) {
		t.Helper()
		limit := time.Now().Add(time.Minute)
		for {
			var s Status
			if err := json.Unmarshal([]byte(get(t, control, "http://sensor/status")), &s); err != nil {
				t.Fatal(err)
			}
			says := false
			for _, p := range s.Problems {
				says = says || strings.HasPrefix(p.Reason, "http.listen is not served: ") && strings.Contains(p.Reason, "address already in use")
			}
			if s.Ready && says == told {
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("%s: %+v", what, s.Problems)
			}
			pass(50 * time.Millisecond)
		}
	}
	await("the port is held", true)
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	decided(t, view, "HTTP_SERVED")
	if body := get(t, http.DefaultClient, "http://"+cfg.HTTP.Listen+"/metrics"); !strings.Contains(body, "agent_build_info") {
		t.Errorf("/metrics: %.300s", body)
	}
	await("the port is free", false)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if l, err := net.Listen("tcp", cfg.HTTP.Listen); err != nil {
		t.Errorf("the port is still held after the stop: %v", err)
	} else {
		l.Close()
	}
}

// get is the body of a page that must be there.
func get(t *testing.T, c *http.Client, url string) string {
	t.Helper()
	r, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", url, r.Status, err)
	}
	return string(b)
}
