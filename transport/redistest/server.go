// SPDX-License-Identifier: Apache-2.0

// Package redistest runs a real redis-server for tests, and a proxy that breaks
// connections to it in chosen ways. It ends only what it started.
package redistest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Options change how a [Server] runs. The zero value is a server on a unix
// socket without persistence.
type Options struct {
	// AOF turns the append-only file on, with this appendfsync policy.
	AOF string
	// TCP listens on a free loopback port instead of a unix socket.
	TCP bool
	// Config are further settings, as in redis.conf: "maxmemory" -> "8mb".
	Config map[string]string
	// Program is the server to run, where it is not redis-server or EDR_REDIS_SERVER.
	Program string
	// Username and Password are what [Server.Client] logs in with.
	Username, Password string

	sentinel string // the configuration of a sentinel, which has no other
}

// Server is one redis-server process with its data in a test's directory.
type Server struct {
	tb   testing.TB
	o    Options
	dir  string
	port int
	proc *os.Process
	gone chan struct{} // closed when proc has been reaped
}

// Start runs a server and waits until it answers. It is killed when the test
// ends. Without the redis-server program the test is skipped, or fails when
// EDR_REQUIRE_ALL=1.
func Start(tb testing.TB, o Options) *Server {
	tb.Helper()
	if _, err := exec.LookPath(o.program()); err != nil {
		if os.Getenv("EDR_REQUIRE_ALL") == "1" {
			tb.Fatalf("redis-server is required: %v", err)
		}
		tb.Skipf("redis-server is not installed (apt-get install redis-server): %v", err)
	}
	// Not tb.TempDir: a socket path is limited to 107 bytes, test names are not.
	dir, err := os.MkdirTemp("", "redis")
	if err != nil {
		tb.Fatal(err)
	}
	s := &Server{tb: tb, o: o, dir: dir}
	if o.TCP {
		s.port = FreePort(tb)
	}
	tb.Cleanup(func() {
		s.Kill9()
		os.RemoveAll(dir)
	})
	s.Restart()
	return s
}

// program is the server that is run: EDR_REDIS_SERVER names another one.
func (o Options) program() string {
	if o.Program != "" {
		return o.Program
	}
	if path := os.Getenv("EDR_REDIS_SERVER"); path != "" {
		return path
	}
	return "redis-server"
}

// Addr is the server's address as transport.Options takes it. It stays the same
// over restarts.
func (s *Server) Addr() string {
	if s.o.TCP {
		return fmt.Sprintf("127.0.0.1:%d", s.port)
	}
	return "unix://" + s.socket()
}

// Dir is the server's data directory.
func (s *Server) Dir() string { return s.dir }

// PID is the process id of the server, 0 while it is down.
func (s *Server) PID() int {
	if s.proc == nil {
		return 0
	}
	return s.proc.Pid
}

func (s *Server) socket() string { return filepath.Join(s.dir, "redis.sock") }

// Kill9 ends the server as a crash would and waits until it is gone.
func (s *Server) Kill9() {
	if s.proc == nil {
		return
	}
	if err := s.proc.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.tb.Errorf("kill redis-server %d: %v", s.proc.Pid, err)
	}
	<-s.gone
	s.proc = nil
}

// Stall stops the server from running; Resume lets it go on.
func (s *Server) Stall() { s.signal(syscall.SIGSTOP) }

// Resume ends a [Server.Stall].
func (s *Server) Resume() { s.signal(syscall.SIGCONT) }

func (s *Server) signal(sig syscall.Signal) {
	s.tb.Helper()
	if err := s.proc.Signal(sig); err != nil {
		s.tb.Fatalf("signal redis-server: %v", err)
	}
}

// Restart starts the server again, over the data that is there, after
// [Server.Kill9]; a server that runs is killed first.
func (s *Server) Restart() {
	s.tb.Helper()
	s.Launch()
	s.Ready()
}

// Launch is [Server.Restart] without waiting until the server answers.
func (s *Server) Launch() {
	s.tb.Helper()
	s.Kill9()
	args := []string{
		"--dir", s.dir, "--daemonize", "no", "--logfile", filepath.Join(s.dir, "redis.log"),
		"--save", "", "--port", fmt.Sprint(s.port), "--bind", "127.0.0.1",
	}
	if !s.o.TCP {
		args = append(args, "--unixsocket", s.socket(), "--unixsocketperm", "700")
	}
	if s.o.AOF != "" {
		args = append(args, "--appendonly", "yes", "--appendfsync", s.o.AOF)
	}
	for k, v := range s.o.Config {
		args = append(args, "--"+k)
		args = append(args, strings.Fields(v)...)
	}
	if s.o.sentinel != "" {
		// It writes its state into the file.
		file := filepath.Join(s.dir, "sentinel.conf")
		text := fmt.Sprintf("port %d\nbind 127.0.0.1\ndir %s\nlogfile %s\n%s", s.port, s.dir, filepath.Join(s.dir, "redis.log"), s.o.sentinel)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			s.tb.Fatal(err)
		}
		args = []string{file, "--sentinel"}
	}
	started := make(chan error, 1)
	gone := make(chan struct{})
	// A test binary that dies must not leave the server behind. The signal is
	// sent when the starting thread ends, so that thread waits for the server.
	go func() {
		defer close(gone)
		runtime.LockOSThread()
		cmd := exec.Command(s.o.program(), args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		s.proc = cmd.Process
		started <- err
		if err == nil {
			_ = cmd.Wait() // killed: the status says nothing
		}
	}()
	s.gone = gone
	if err := <-started; err != nil {
		s.tb.Fatalf("start redis-server: %v", err)
	}
}

// Ready waits until the server answers commands.
func (s *Server) Ready() {
	s.tb.Helper()
	deadline := time.NewTimer(3 * time.Minute) // a large log loads slowly on a busy machine
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.ping()
		if err == nil {
			return
		}
		select {
		case <-s.gone:
			s.tb.Fatalf("redis-server ended: %s", s.Log())
		case <-deadline.C:
			s.tb.Fatalf("redis-server does not answer: %v\n%s", err, s.Log())
		case <-tick.C:
		}
	}
}

// ping sends an inline PING: go-redis would log each refused dial.
func (s *Server) ping() error {
	network, addr := "unix", s.socket()
	if s.o.TCP {
		network, addr = "tcp", s.Addr()
	}
	c, err := net.DialTimeout(network, addr, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("PING\r\n")); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && strings.HasPrefix(answer, "-LOADING") {
		return errors.New(strings.TrimSpace(answer))
	}
	return err
}

// Log returns what the server wrote to its log.
func (s *Server) Log() string {
	b, err := os.ReadFile(filepath.Join(s.dir, "redis.log"))
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b))
}

// ClientName is what the connections of [Server.Client] call themselves, so that a test
// can tell them from those that it tests.
const ClientName = "redistest"

// Client returns a new plain client of the server; the caller closes it. It does
// not retry.
func (s *Server) Client() *redis.Client {
	o := &redis.Options{
		Network: "unix", Addr: s.socket(),
		Username: s.o.Username, Password: s.o.Password,
		MaxRetries: -1, DialerRetries: 1, PipelinePoolSize: -1, DisableIdentity: true, Protocol: 2,
		// After so many refused dials it would dial in a goroutine that outlives Close.
		PoolSize:    1 << 12,
		ReadTimeout: time.Minute, // a busy machine is no fault of the server
	}
	if s.o.Username == "" { // another user may not be allowed to
		o.ClientName = ClientName
	}
	if s.o.TCP {
		o.Network, o.Addr = "tcp", s.Addr()
	}
	return redis.NewClient(o)
}

// SetConfig changes a setting for the next [Server.Launch] or [Server.Restart].
func (s *Server) SetConfig(key, value string) {
	if s.o.Config == nil {
		s.o.Config = make(map[string]string)
	}
	s.o.Config[key] = value
}
