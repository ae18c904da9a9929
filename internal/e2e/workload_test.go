// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// The workload is this test binary, started again: the root of the process tree
// that the sensor watches. It takes orders on standard input, one JSON document
// a line, and answers each with one line, so that the tree lives on while the
// sensor and Redis are killed.

const workloadEnv = "EDR_E2E_WORKLOAD"

type order struct {
	Op      string `json:"op"`
	From    int    `json:"from,omitempty"`
	N       int    `json:"n,omitempty"`
	Addr    string `json:"addr,omitempty"`
	Dir     string `json:"dir,omitempty"`
	PerSec  int    `json:"per_sec,omitempty"`
	ArgSize int    `json:"arg_size,omitempty"`
	Name    string `json:"name,omitempty"` // of a shell
	Script  string `json:"script,omitempty"`
}

type answer struct {
	Addr  string `json:"addr,omitempty"`
	PID   int    `json:"pid,omitempty"` // of the shell
	Error string `json:"error,omitempty"`
}

func TestMain(m *testing.M) {
	if os.Getenv(workloadEnv) != "" {
		runWorkload()
		return
	}
	code := m.Run()
	if dir, err := scratch(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// scratch is for what more than one test uses. It goes when all have ended.
var scratch = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "edr-e2e-") })

// scratchDir makes a directory in it.
func scratchDir() (string, error) {
	dir, err := scratch()
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(dir, "")
}

func marker(i int) string { return fmt.Sprintf("edr-e2e-%06d", i) }

// bigArg is the exec whose argv is 200 KiB long.
const bigArg = 100 << 10

func runWorkload() {
	in, out := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	shells := map[string]*shell{}
	for in.Scan() {
		var o order
		a := answer{}
		err := json.Unmarshal(in.Bytes(), &o)
		switch {
		case err != nil:
		case o.Op == "shell":
			a.PID, err = tell(shells, o)
		default:
			a.Addr, err = obey(o)
		}
		if err != nil {
			a.Error = err.Error()
		}
		_ = out.Encode(a)
	}
}

// shell is one that lives on between orders.
type shell struct {
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

// tell has the shell of that name run a script and waits until it has. The first
// order starts the shell; one whose script makes it exit ends it. Orphans are handed
// to the workload: elsewhere a sensor that starts later would not take them for its.
func tell(shells map[string]*shell, o order) (pid int, err error) {
	s := shells[o.Name]
	if s == nil {
		s = &shell{cmd: exec.Command("/bin/sh")}
		in, err1 := s.cmd.StdinPipe()
		out, err2 := s.cmd.StdoutPipe()
		err3 := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
		if err := errors.Join(err1, err2, err3, s.cmd.Start()); err != nil {
			return 0, err
		}
		s.in, s.out = in, bufio.NewScanner(out)
		shells[o.Name] = s
	}
	const done = "edr-e2e-done"
	if _, err := fmt.Fprintf(s.in, "%s\necho %s\n", o.Script, done); err != nil {
		return 0, err
	}
	for s.out.Scan() {
		if s.out.Text() == done {
			return s.cmd.Process.Pid, nil
		}
	}
	delete(shells, o.Name)
	return s.cmd.Process.Pid, s.cmd.Wait()
}

func obey(o order) (string, error) {
	switch o.Op {
	case "exec":
		return "", execs(o)
	case "container":
		// The shell moves itself, then becomes the marked process.
		return "", exec.Command("/bin/sh", "-c", `echo $$ >"$0/cgroup.procs" && exec /bin/true "$1"`, o.Dir, marker(o.From)).Run()
	case "connect":
		return "", connects(o)
	case "files":
		return "", changeFiles(o.Dir)
	case "create":
		return "", createFiles(o.Dir, o.N)
	case "listen":
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		go serveTraffic(l)
		return l.Addr().String(), nil
	}
	return "", fmt.Errorf("unknown order %q", o.Op)
}

func execs(o order) error {
	var pace *time.Ticker
	if o.PerSec > 0 {
		pace = time.NewTicker(time.Second / time.Duration(o.PerSec))
		defer pace.Stop()
	}
	for i := o.From; i < o.From+o.N; i++ {
		args := []string{marker(i)}
		if o.ArgSize > 0 {
			args = append(args, strings.Repeat("x", o.ArgSize))
		}
		if i == 0 {
			args = append(args, strings.Repeat("A", bigArg), strings.Repeat("B", bigArg))
		}
		name := "/bin/true"
		if i%10 == 9 {
			name = "/bin/false"
		}
		if pace != nil {
			<-pace.C
		}
		if err := exec.Command(name, args...).Run(); err != nil && name == "/bin/true" {
			return err
		}
	}
	return nil
}

// Each connection i carries its own byte counts, so that each can be told from
// all others.
func clientBytes(i int) int { return 100 + i }
func serverBytes(i int) int { return 5000 + 3*i }

// connects makes o.N connections, with o.PerSec at that rate: each has its moment, so
// that a slow one delays none, and a late start is caught up with.
func connects(o order) error {
	if o.PerSec == 0 {
		for i := o.From; i < o.From+o.N; i++ {
			if err := connect(o.Addr, i); err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
		}
		return nil
	}
	var g errgroup.Group
	g.SetLimit(8)
	start := time.Now()
	for i := range o.N {
		if wait := time.Until(start.Add(time.Duration(i) * time.Second / time.Duration(o.PerSec))); wait > 0 {
			<-time.After(wait)
		}
		g.Go(func() error {
			if err := connect(o.Addr, o.From+i); err != nil {
				return fmt.Errorf("connection %d: %w", o.From+i, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func connect(addr string, i int) error {
	// Plain TCP: where the kernel has MPTCP, Go would try that.
	c, err := dialer().Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(bytes.Repeat([]byte{'c'}, clientBytes(i))); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, c)
	if err != nil {
		return err
	}
	if n != int64(serverBytes(i)) {
		return fmt.Errorf("received %d bytes, want %d", n, serverBytes(i))
	}
	return nil
}

func dialer() *net.Dialer {
	d := &net.Dialer{Timeout: time.Minute}
	d.SetMultipathTCP(false)
	return d
}

// serveTraffic answers each connection by how much it sent.
func serveTraffic(l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			n, err := io.Copy(io.Discard, c)
			if err == nil {
				_, _ = c.Write(bytes.Repeat([]byte{'s'}, serverBytes(int(n)-100)))
			}
		})
	}
}

// workload is the test's end of it.
type workload struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startWorkload(t *testing.T) *workload {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), workloadEnv+"=1")
	return runWorkloadAs(t, cmd)
}

func runWorkloadAs(t *testing.T, cmd *exec.Cmd) *workload {
	t.Helper()
	w := &workload{t: t, cmd: cmd}
	w.cmd.Stderr = os.Stderr
	var err error
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.out = bufio.NewScanner(stdout)
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = w.in.Close()
		_ = w.cmd.Wait()
	})
	return w
}

func (w *workload) pid() int { return w.cmd.Process.Pid }

// do gives an order and waits until it is done.
func (w *workload) do(o order) answer {
	w.t.Helper()
	b, _ := json.Marshal(o)
	if _, err := w.in.Write(append(b, '\n')); err != nil {
		w.t.Fatalf("workload: %v", err)
	}
	var a answer
	if !w.out.Scan() {
		w.t.Fatalf("workload ended: %v", w.out.Err())
	}
	if err := json.Unmarshal(w.out.Bytes(), &a); err != nil {
		w.t.Fatalf("workload: %v", err)
	}
	if a.Error != "" {
		w.t.Fatalf("workload: %s: %s", o.Op, a.Error)
	}
	return a
}
