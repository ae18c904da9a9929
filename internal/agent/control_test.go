// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

const (
	nobody   = 65534
	operator = 4242 // gid of control.group in these tests
)

// dialAs connects as another user. Credentials belong to a thread, and this one
// ends with its goroutine, because it is never unlocked. The runtime never ends the main
// thread, whose credentials the process is known by: while that is held, another one does it.
func dialAs(path string, uid, gid int, groups ...int) (c net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			c, err = dialAs(path, uid, gid, groups...)
			runtime.UnlockOSThread()
			return
		}
		if err = become(uid, gid, groups); err == nil {
			c, err = net.Dial("unix", path)
		}
	}()
	<-done
	return c, err
}

// become uses raw system calls: those of the standard library change all threads.
func become(uid, gid int, groups []int) error {
	list := make([]uint32, len(groups)+1)
	for i, g := range groups {
		list[i] = uint32(g)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&list[0])), 0); errno != 0 {
		return fmt.Errorf("setgroups: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); errno != 0 {
		return fmt.Errorf("setresgid: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
		return fmt.Errorf("setresuid: %w", errno)
	}
	return nil
}

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("EDR_REQUIRE_ALL") != "" {
		t.Fatal("EDR_REQUIRE_ALL: connecting as other users needs root")
	}
	t.Skip("connecting as other users needs root")
}

// decisions collects what was decided.
type decisions struct {
	mu   sync.Mutex
	list []event.SelfInfo
}

func (d *decisions) add(_ context.Context, i event.SelfInfo) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.list = append(d.list, i)
}

func (d *decisions) all() []event.SelfInfo {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]event.SelfInfo(nil), d.list...)
}

// serveControl serves c on a socket that every user may connect to, so that only
// the credentials decide.
func serveControl(t testing.TB, c *control, edit ...func(*http.Server)) (path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "edr-control") // a socket path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "control.sock")
	l, err := listenControl(t.Context(), path, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	s := newServer(t.Context(), c)
	for _, e := range edit {
		e(s)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return path
}

// ask sends one request over conn and reads the answer's status and text.
func ask(t testing.TB, conn net.Conn, method, path, body string) (int, string) {
	t.Helper()
	defer conn.Close()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://sensor"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if err := req.Write(conn); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil && !errors.Is(err, unix.ECONNRESET) { // what the server did not read
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// testControl has one path for each right, and one that reads JSON.
func testControl(d *decisions) *control {
	c := newControl(uint32(os.Geteuid()), func() (uint32, bool) { return operator, true }, d.add)
	c.refuse = logging.NewLimiter(time.Hour) // however long the test takes
	for path, r := range map[string]right{"/status": rightStatus, "/tap": rightContent, "/cases": rightCases, "/change": rightChange} {
		c.handle("GET "+path, r, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "content") })
	}
	c.handle("POST /json", rightCases, func(w http.ResponseWriter, r *http.Request) {
		var v struct {
			Name string `json:"name"`
		}
		if readJSON(w, r, &v) {
			fmt.Fprint(w, v.Name)
		}
	})
	return c
}

func TestControlRights(t *testing.T) {
	requireRoot(t)
	var d decisions
	path := serveControl(t, testControl(&d))
	all := []string{"/status", "/tap", "/cases", "/change", "/nowhere"}
	for _, tt := range []struct {
		name     string
		uid, gid int
		groups   []int
		want     map[string]int // others: 403
	}{
		{"root", 0, 0, nil, map[string]int{"/status": 200, "/tap": 200, "/cases": 200, "/change": 200, "/nowhere": 404}},
		{"a member by its main group", nobody, operator, nil, map[string]int{"/status": 200, "/tap": 200, "/cases": 200, "/nowhere": 404}},
		{"a member by a supplementary group", nobody, nobody, []int{1, operator, 3}, map[string]int{"/status": 200, "/tap": 200, "/cases": 200, "/nowhere": 404}},
		{"a member of many groups", nobody, nobody, append(numbers(5000, 300), operator), map[string]int{"/status": 200, "/tap": 200, "/cases": 200, "/nowhere": 404}},
		{"another user", nobody, nobody, nil, nil},
		{"another user in the group 0", nobody, 0, []int{0}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, p := range all {
				conn, err := dialAs(path, tt.uid, tt.gid, tt.groups...)
				if err != nil {
					t.Fatal(err)
				}
				code, text := ask(t, conn, http.MethodGet, p, "")
				want := tt.want[p]
				if want == 0 {
					want = http.StatusForbidden
				}
				if code != want {
					t.Errorf("%s: %d %s, want %d", p, code, text, want)
				}
				if strings.Contains(text, "content") != (code == http.StatusOK) {
					t.Errorf("%s: %d shows %q", p, code, text)
				}
			}
		})
	}
	// Each refusal is known once in a while, with who it was.
	codes := map[string]int{}
	for _, i := range d.all() {
		codes[i.Code]++
		if i.Attrs["peer_uid"] != uint32(nobody) || i.Stream != event.DecisionsApprovals || !i.Failed {
			t.Errorf("decision %+v", i)
		}
	}
	if codes["CONTROL_REFUSED"] != 2 { // may not see the status, may not change the sensor
		t.Errorf("decisions %v, want two refusals", codes)
	}
}

// TestLastRefusalsAreTold: how many requests were refused is made known though no further
// one comes: after the interval, and what waits for it at a stop.
func TestLastRefusalsAreTold(t *testing.T) {
	cfg := onlyThis(t, os.Getpid())
	dir, err := os.MkdirTemp("", "edr-control") // a socket path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cfg.Control.Socket = filepath.Join(dir, "control.sock")
	a, err := New(t.Context(), Options{Loaded: Loaded{Config: cfg}, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(cfg.Control.Socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	view := a.tap.open(false)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	request := func(uid int, method, path, body string, want int) {
		t.Helper()
		conn, err := dialAs(cfg.Control.Socket, uid, uid)
		if err != nil {
			t.Fatal(err)
		}
		if code, text := ask(t, conn, method, path, body); code != want {
			t.Fatalf("%d %s", code, text)
		}
	}
	told := func(code string, want int) { // in as many decisions as it takes
		t.Helper()
		for sum, n := 0, 0; sum != want; sum += n {
			_, count, _ := strings.Cut(decided(t, view, code), `"count":`)
			if _, err := fmt.Sscan(strings.FieldsFunc(count, func(r rune) bool { return r < '0' || r > '9' })[0], &n); err != nil || sum+n > want {
				t.Fatalf("%d and %d more, %v; want %d", sum, n, err, want)
			}
		}
	}
	for range 4 {
		request(0, http.MethodPost, "/cases/close", `{"case_id":"none"}`, http.StatusNotFound)
	}
	told("CASE_REJECTED", 4)
	for range 3 {
		request(nobody, http.MethodGet, "/status", "", http.StatusForbidden)
	}
	cancel()
	told("CONTROL_REFUSED", 3)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func numbers(from, n int) (list []int) {
	for i := range n {
		list = append(list, from+i)
	}
	return list
}

func TestControlWithoutPeerRefuses(t *testing.T) {
	var d decisions
	c := testControl(&d)
	s := &fakeWriter{header: http.Header{}}
	c.ServeHTTP(s, &http.Request{Method: http.MethodGet, Host: "sensor"})
	if s.code != http.StatusForbidden {
		t.Errorf("a request of nobody: %d", s.code)
	}
}

type fakeWriter struct {
	header http.Header
	code   int
}

func (w *fakeWriter) Header() http.Header         { return w.header }
func (w *fakeWriter) WriteHeader(code int)        { w.code = code }
func (w *fakeWriter) Write(b []byte) (int, error) { return len(b), nil }

func TestControlRefusesBadInput(t *testing.T) {
	requireRoot(t)
	var d decisions
	path := serveControl(t, testControl(&d))
	for _, tt := range []struct {
		name, body string
		want       int
	}{
		{"good", `{"name":"x"}`, 200},
		{"no body", ``, 400},
		{"not JSON", `name=x`, 400},
		{"unknown field", `{"name":"x","admin":true}`, 400},
		{"wrong type", `{"name":1}`, 400},
		{"two values", `{"name":"x"}{"name":"y"}`, 400},
		{"rubbish behind", `{"name":"x"}]`, 400},
		{"deep", strings.Repeat("[", 20000), 400},
		{"too large", `{"name":"` + strings.Repeat("x", controlBody) + `"}`, 413},
		{"space too large", `{"name":"x"}` + strings.Repeat(" ", controlBody), 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			if code, text := ask(t, conn, http.MethodPost, "/json", tt.body); code != tt.want {
				t.Errorf("%d %s, want %d", code, text, tt.want)
			}
		})
	}
	t.Run("header too large", func(t *testing.T) {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if code, _ := ask(t, conn, http.MethodGet, "/status?"+strings.Repeat("x", 64<<10), ""); code != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("%d", code)
		}
	})
}

// TestControlConnectionsAreBounded has one user take what it can get: root is
// still answered, and so is another user.
func TestControlConnectionsAreBounded(t *testing.T) {
	requireRoot(t)
	var d decisions
	// What is silent is closed after a while, too: not here.
	path := serveControl(t, testControl(&d), func(s *http.Server) { s.ReadHeaderTimeout, s.ReadTimeout, s.IdleTimeout = 0, 0, 0 })
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for range controlConns {
		c, err := dialAs(path, nobody, operator)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	// Those beyond the bound are closed at once.
	closed, deadline := 0, time.Now().Add(time.Minute)
	for _, c := range held[controlUser:] {
		if err := c.SetReadDeadline(deadline); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
			closed++
		}
	}
	if want := controlConns - controlUser; closed != want {
		t.Errorf("%d connections closed, want %d", closed, want)
	}
	for _, uid := range []int{0, nobody - 1} {
		c, err := dialAs(path, uid, operator)
		if err != nil {
			t.Fatal(err)
		}
		if code, text := ask(t, c, http.MethodGet, "/status", ""); code != http.StatusOK {
			t.Errorf("uid %d: %d %s", uid, code, text)
		}
	}
}

// pipeListener accepts connections of net.Pipe, whose deadlines a bubble of synctest
// knows.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return &peerConn{boundConn: boundConn{Conn: c, gone: func() {}}}, nil // of root
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { close(l.done); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// TestControlDoesNotWaitForTheSlow has clients that stop in the middle: of a header, of
// a body, between two requests, and of taking an answer.
func TestControlDoesNotWaitForTheSlow(t *testing.T) {
	for _, tt := range []struct {
		name, send string
		take       bool // the answer
		within     time.Duration
		answer     string
	}{
		{"nothing sent", "", true, 10 * time.Second, ""},
		{"half a header", "GET /status HTTP/1.1\r\nHost:", true, 10 * time.Second, ""},
		{"half a body", "POST /json HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\n{", true, 20 * time.Second, "400 Bad Request"},
		{"idle", "GET /status HTTP/1.1\r\nHost: s\r\n\r\n", true, 2 * time.Minute, "200 OK"},
		{"answer not taken", "GET /tap HTTP/1.1\r\nHost: s\r\n\r\n", false, 2 * controlWrite, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var d decisions
				l := &pipeListener{make(chan net.Conn), make(chan struct{})}
				s := newServer(t.Context(), testControl(&d))
				served := make(chan struct{})
				go func() { defer close(served); _ = s.Serve(l) }()
				client, server := net.Pipe()
				closed := &closeSignal{Conn: server, closed: make(chan struct{})}
				start := time.Now()
				l.conns <- closed
				if _, err := client.Write([]byte(tt.send)); err != nil {
					t.Fatal(err)
				}
				var got []byte
				if tt.take {
					got, _ = io.ReadAll(client)
				}
				<-closed.closed
				if took := time.Since(start); took > tt.within {
					t.Errorf("held open for %s, want at most %s", took, tt.within)
				}
				if !strings.Contains(string(got), tt.answer) {
					t.Errorf("answer %q, want %q", got, tt.answer)
				}
				if err := errors.Join(client.Close(), s.Close()); err != nil {
					t.Error(err)
				}
				<-served
			})
		})
	}
}

type closeSignal struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *closeSignal) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// FuzzControl sends any bytes to the socket: the answer is one of HTTP, or none,
// and the next client is served.
func FuzzControl(f *testing.F) {
	requireRoot(f)
	for _, seed := range []string{
		"GET /status HTTP/1.1\r\nHost: sensor\r\n\r\n",
		"POST /json HTTP/1.1\r\nHost: sensor\r\nContent-Length: 12\r\n\r\n{\"name\":\"x\"}",
		"POST /json HTTP/1.1\r\nHost: sensor\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n{",
		"GET /../tap HTTP/1.0\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x16\x03\x01", "",
	} {
		f.Add([]byte(seed))
	}
	var d decisions
	path := serveControl(f, testControl(&d))
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(in) // the server may have closed already
		_ = c.(*net.UnixConn).CloseWrite()
		out, err := io.ReadAll(io.LimitReader(c, 1<<20))
		if err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("%q: %v", in, err)
		}
		if len(out) > 0 && !bytes.HasPrefix(out, []byte("HTTP/1.")) {
			t.Fatalf("%q answers %q", in, out)
		}
	})
}
