// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

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

	control := overSocket(cfg.Control.Socket)
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

// TestHTTPConnectionsAreBounded has somebody take what it can get: what is beyond the
// bound is closed at once, and there is room as soon as one has gone.
func TestHTTPConnectionsAreBounded(t *testing.T) {
	a := &Agent{registry: prometheus.NewRegistry()}
	a.cfg.HTTP.Listen = "127.0.0.1:0"
	l := a.listenHTTP(t.Context())
	if l == nil {
		t.Fatal(*a.unserved.Load())
	}
	s := newServer(t.Context(), a.handler())
	s.ReadHeaderTimeout, s.ReadTimeout, s.IdleTimeout = 0, 0, 0 // what is silent is closed after a while: not here
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			err = c.SetDeadline(time.Now().Add(time.Minute))
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	const beyond = 16
	var held []net.Conn
	for range httpConns + beyond {
		held = append(held, dial())
	}
	closed := 0
	for _, c := range held[httpConns:] {
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
			closed++
		}
	}
	if closed != beyond {
		t.Errorf("%d connections closed, want %d", closed, beyond)
	}
	if err := held[0].Close(); err != nil {
		t.Fatal(err)
	}
	for limit := time.Now().Add(time.Minute); ; pass(10 * time.Millisecond) {
		c := dial()
		_, err := io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n")
		answer, _ := io.ReadAll(c)
		c.Close()
		if err == nil && strings.Contains(string(answer), "200 OK") {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("after one has gone: %q, %v", answer, err)
		}
	}
	for _, c := range held {
		c.Close()
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}

// TestHTTPAnswerThatNobodyTakes asks again and again, and reads nothing.
func TestHTTPAnswerThatNobodyTakes(t *testing.T) {
	for _, page := range []string{"/metrics", "/healthz"} {
		t.Run(page, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := &Agent{registry: prometheus.NewRegistry()}
				l := &pipeListener{make(chan net.Conn), make(chan struct{})}
				s := newServer(t.Context(), a.handler())
				served := make(chan struct{})
				go func() { defer close(served); _ = s.Serve(l) }()
				client, server := net.Pipe()
				closed := &closeSignal{Conn: server, closed: make(chan struct{})}
				l.conns <- closed
				start := time.Now()
				go func() {
					_, _ = io.WriteString(client, strings.Repeat("GET "+page+" HTTP/1.1\r\nHost: s\r\n\r\n", 1000))
				}()
				select {
				case <-closed.closed:
				case <-time.After(time.Hour):
				}
				if took := time.Since(start); took > 2*controlWrite {
					t.Errorf("held open for %s, want at most %s", took, 2*controlWrite)
				}
				if err := errors.Join(client.Close(), s.Close()); err != nil {
					t.Error(err)
				}
				<-served
			})
		})
	}
}

// failing is a listener of which the first connection fails.
type failing struct {
	net.Listener
	err  error
	once sync.Once
}

func (l *failing) Accept() (c net.Conn, err error) {
	l.once.Do(func() {
		err = &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: os.NewSyscallError("accept4", l.err)}
	})
	if err != nil {
		return nil, err
	}
	return l.Listener.Accept()
}

// TestFailingListeners: http.listen is opened anew, which is decided, the control socket
// goes on, and neither ends the other.
func TestFailingListeners(t *testing.T) {
	cfg := onlyThis(t, os.Getpid())
	cfg.HTTP.Listen = fmt.Sprintf("127.0.0.1:%d", redistest.FreePort(t))
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
	h, c := a.http.(*boundListener), a.control.(*peerListener)
	h.Listener = &failing{Listener: h.Listener, err: unix.EINVAL}
	c.Listener = &failing{Listener: c.Listener, err: unix.ENOMEM}
	view := a.tap.open(false)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()

	if said := decided(t, view, "HTTP_UNSERVED"); !strings.Contains(said, unix.EINVAL.Error()) {
		t.Errorf("the decision does not say why: %s", said)
	}
	decided(t, view, "HTTP_SERVED")
	get(t, http.DefaultClient, "http://"+cfg.HTTP.Listen+"/metrics")
	get(t, overSocket(cfg.Control.Socket), "http://sensor/status")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// overSocket is a client of a control socket.
func overSocket(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}}
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
