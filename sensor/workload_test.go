// SPDX-License-Identifier: Apache-2.0

package sensor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The root tests watch processes that they start themselves and nothing else. Such a
// process is this test binary again, an actor, which does what the test asks over a
// unix socket.

const (
	actorEnv  = "EDR_ACTOR"   // path of the test's socket
	memfdEnv  = "EDR_FEXECVE" // become a memfd of this program
	acceptEnv = "EDR_ACCEPT"  // accept a connection of the listener that is descriptor 3
	threadEnv = "EDR_THREADS" // end with so many threads alive
	patience  = time.Minute   // far more than anything here takes, on an emulated machine, too
)

func TestMain(m *testing.M) {
	if socket := os.Getenv(actorEnv); socket != "" {
		os.Exit(act(socket))
	}
	if program := os.Getenv(memfdEnv); program != "" {
		fmt.Fprintln(os.Stderr, becomeMemfd(program))
		os.Exit(1)
	}
	if os.Getenv(acceptEnv) != "" {
		os.Exit(acceptOne())
	}
	if n, err := strconv.Atoi(os.Getenv(threadEnv)); err == nil {
		endWithThreads(n)
	}
	if capabilities := os.Getenv(capabilitiesEnv); capabilities != "" && os.Getenv(agencyEnv) == "" {
		os.Exit(testAsUser(capabilities))
	}
	os.Exit(m.Run())
}

// request is what an actor can be asked to do.
type request struct {
	Op    string // see company.play
	Path  string
	Args  []string
	Env   []string
	Dir   string
	UID   uint32
	Count int
	PIDNS bool // in a pid namespace of its own
	TTY   bool // in a session of its own with a terminal

	Network  string // tcp4, tcp6
	Addr     string // to connect to
	Up, Down int    // bytes to send each way
	First    string // who closes first: client, server, or client-unread
	Shared   bool   // SO_REUSEPORT

	Multipath bool // MPTCP where the kernel has it, as Go's listeners are by default
	How       way
}

// reply is what became of it.
type reply struct {
	PID    int
	Err    string
	Output string
	Local  string
	Remote string

	Missing []string // what cannot be done in the way asked for
}

// actor is the test's end of the line to one.
type actor struct {
	t      testing.TB
	pid    int
	encode *json.Encoder
	decode *json.Decoder
	stage  *stage
}

// stage is where the actors of one test appear.
type stage struct {
	listener *net.UnixListener
	socket   string
}

// startActor starts an actor outside of any other, the root of a process tree. It
// ends with the test.
func startActor(t testing.TB) *actor {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "stage")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	s := &stage{listener: listener, socket: socket}
	end, err := start(socket)
	if err != nil {
		t.Fatal(err)
	}
	a := s.accept(t)
	t.Cleanup(func() {
		a.do(request{Op: "end"})
		if err := end(); err != nil {
			t.Errorf("actor: %v", err)
		}
	})
	return a
}

// start starts an actor, or has root do it. What is returned waits for its end.
func start(stage string) (end func() error, err error) {
	if agency := os.Getenv(agencyEnv); agency != "" {
		return engageAt(agency, stage)
	}
	cmd := actorFor(stage)
	return cmd.Wait, cmd.Start()
}

// actorFor is an actor that appears on a stage.
func actorFor(socket string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), actorEnv+"="+socket)
	cmd.Stderr = os.Stderr
	return cmd
}

func (s *stage) accept(t testing.TB) *actor {
	t.Helper()
	if err := s.listener.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	conn, err := s.listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() }) // and the actor ends
	a := &actor{t: t, encode: json.NewEncoder(conn), decode: json.NewDecoder(conn), stage: s}
	var hello reply
	if err := a.decode.Decode(&hello); err != nil {
		t.Fatal(err)
	}
	a.pid = hello.PID
	return a
}

// do asks and waits for the answer. Err of the answer is the test's business.
func (a *actor) do(r request) reply {
	a.t.Helper()
	if err := a.encode.Encode(r); err != nil {
		a.t.Fatal(err)
	}
	var answer reply
	if err := a.decode.Decode(&answer); err != nil {
		a.t.Fatal(err)
	}
	return answer
}

// must is do for what has to succeed.
func (a *actor) must(r request) reply {
	a.t.Helper()
	answer := a.do(r)
	if answer.Err != "" {
		a.t.Fatalf("%s %s: %s", r.Op, r.Path, answer.Err)
	}
	return answer
}

// spawn makes the actor start another one, its child.
func (a *actor) spawn() *actor {
	a.t.Helper()
	a.must(request{Op: "spawn"})
	return a.stage.accept(a.t)
}

// act is the actor's own side.
func act(socket string) int {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, "actor:", err)
		return 1
	}
	encode, decode := json.NewEncoder(conn), json.NewDecoder(conn)
	// With its first child Go forks another one, to try pidfds. Not in our counts.
	if _, err := run(request{Path: "/bin/true"}); err != nil {
		fmt.Fprintln(os.Stderr, "actor:", err)
		return 1
	}
	_ = encode.Encode(reply{PID: os.Getpid()})
	var troupe company
	for {
		var r request
		if err := decode.Decode(&r); err != nil {
			return 0 // the test is over
		}
		answer, err := troupe.play(r)
		if err != nil {
			answer.Err = err.Error()
		}
		_ = encode.Encode(answer)
		if r.Op == "end" {
			return 0
		}
	}
}

// company is what an actor holds between two requests.
type company struct {
	listener net.Listener
	conn     net.Conn
	file     *os.File
	rings    map[way]*uring
}

func (c *company) play(r request) (reply, error) {
	switch r.Op {
	case "spawn":
		cmd := exec.Command("/proc/self/exe")
		cmd.Env, cmd.Stderr = os.Environ(), os.Stderr
		if err := cmd.Start(); err != nil {
			return reply{}, err
		}
		go func() { _ = cmd.Wait() }()
		return reply{PID: cmd.Process.Pid}, nil
	case "run":
		return run(r)
	case "storm":
		for range r.Count {
			if _, err := run(request{Path: r.Path, Args: r.Args}); err != nil {
				return reply{}, err
			}
		}
		return reply{}, nil
	case "tcp":
		return converse(r)
	case "converse":
		for range r.Count {
			if _, err := converse(r); err != nil {
				return reply{}, err
			}
		}
		return reply{}, nil
	case "connect": // and hear what the server says
		conn, err := net.Dial(r.Network, r.Addr)
		if err != nil {
			return reply{}, err
		}
		defer conn.Close()
		said, err := io.ReadAll(conn)
		return reply{Local: conn.LocalAddr().String(), Output: string(said)}, err
	case "serve": // say the own pid to everybody who connects
		l, err := listen(r)
		if err != nil {
			return reply{}, err
		}
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprint(conn, os.Getpid())
				conn.Close()
			}
		}()
		return reply{Local: l.Addr().String()}, nil
	case "listen":
		l, err := listen(r)
		if err != nil {
			return reply{}, err
		}
		c.listener = l
		return reply{Local: l.Addr().String()}, nil
	case "stop listening":
		return reply{}, c.listener.Close()
	case "lend":
		return lend(r)
	case "accept":
		conn, err := c.listener.Accept()
		c.conn = conn
		return reply{}, err
	case "dial":
		conn, err := net.Dial(r.Network, r.Addr)
		if err != nil {
			return reply{}, err
		}
		c.conn = conn
		return reply{Local: conn.LocalAddr().String()}, nil
	case "file":
		return c.change(r)
	case "talk":
		return c.talk(r)
	case "ring":
		_, err := c.ring(r.How)
		return reply{}, err
	case "hold": // a file open for writing
		var err error
		if c.file, err = os.OpenFile(r.Path, os.O_WRONLY|os.O_CREATE, 0o600); err == nil {
			_, err = c.file.Write(make([]byte, r.Up))
		}
		return reply{}, err
	case "let go":
		_, err := c.file.Write(make([]byte, r.Up))
		return reply{}, errors.Join(err, c.file.Close())
	case "umask":
		unix.Umask(r.Count)
		return reply{}, nil
	case "chroot":
		return reply{}, errors.Join(unix.Chroot(r.Path), unix.Chdir("/"))
	case "shell": // without anything to say
		said, err := exec.Command("/bin/sh", append([]string{"-ec"}, r.Args...)...).CombinedOutput()
		if err == nil && len(said) > 0 {
			err = errors.New("it said something")
		}
		if err != nil {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return reply{}, err
	case "storm of files":
		for range r.Count {
			for _, what := range r.Args {
				if err := change(append([]string{what}, r.Env...)); err != nil {
					return reply{}, err
				}
			}
		}
		return reply{}, nil
	case "abandon":
		return abandon()
	case "drop":
		return reply{}, c.conn.Close()
	case "signal":
		pid, err := strconv.Atoi(r.Args[0])
		return reply{}, errors.Join(err, unix.Kill(pid, unix.Signal(r.Count)))
	case "control":
		return control(r)
	case "end":
		return reply{}, nil
	}
	return reply{}, errors.New("no such act")
}

// run starts a program and waits for it; how it ended is no error.
func run(r request) (reply, error) {
	var out bytes.Buffer
	cmd := exec.Command(r.Path, r.Args...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = r.Dir, r.Env, &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if r.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: r.UID, Gid: r.UID}
	}
	if r.PIDNS {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
	}
	var answer reply
	if r.TTY {
		master, slave, err := openTerminal()
		if err != nil {
			return answer, err
		}
		defer master.Close()
		defer slave.Close()
		cmd.Stdin = slave // descriptor 0, the default of Ctty
		cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
		answer.Local = strings.TrimPrefix(slave.Name(), "/dev/")
	}
	err := cmd.Run()
	if exit := (&exec.ExitError{}); errors.As(err, &exit) {
		err = nil
	}
	answer.Output = out.String()
	if cmd.Process != nil {
		answer.PID = cmd.Process.Pid
	}
	return answer, err
}

// openTerminal makes a pseudo terminal.
func openTerminal() (master, slave *os.File, err error) {
	if master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	if err == nil {
		slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, slave, nil
}

func listen(r request) (net.Listener, error) {
	host := "127.0.0.1:0"
	if r.Network == "tcp6" {
		host = "[::1]:0"
	}
	if r.Addr != "" {
		host = r.Addr
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) {
			if r.Shared {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			}
		}), err)
	}}
	config.SetMultipathTCP(r.Multipath)
	return config.Listen(context.Background(), r.Network, host)
}

// converse listens, connects to itself, sends Up and Down bytes, and closes.
func converse(r request) (reply, error) {
	l, err := listen(r)
	if err != nil {
		return reply{}, err
	}
	defer l.Close()
	addr := l.Addr().String()
	if r.Addr != "" {
		addr = r.Addr
	}
	client, err := net.Dial(r.Network, addr)
	if err != nil {
		return reply{}, err
	}
	server, err := l.Accept()
	if err != nil {
		return reply{}, errors.Join(err, client.Close())
	}
	answer := reply{Local: client.LocalAddr().String(), Remote: client.RemoteAddr().String()}
	var wg sync.WaitGroup
	var errs [4]error
	wg.Go(func() { _, errs[0] = client.Write(make([]byte, r.Up)) })
	wg.Go(func() { _, errs[1] = server.Write(make([]byte, r.Down)) })
	wg.Go(func() { _, errs[2] = io.CopyN(io.Discard, server, int64(r.Up)) })
	if r.First != "client-unread" {
		wg.Go(func() { _, errs[3] = io.CopyN(io.Discard, client, int64(r.Down)) })
	}
	wg.Wait()
	first, second := client, server
	if r.First == "server" {
		first, second = server, client
	}
	errs[0] = errors.Join(errs[0], first.Close())
	if r.First != "client-unread" {
		if _, err := second.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			errs[1] = errors.Join(errs[1], fmt.Errorf("read after close: %w", err))
		}
	} else {
		_, _ = second.Read(make([]byte, 1)) // the reset
	}
	return answer, errors.Join(append(errs[:], second.Close())...)
}

// lend gives a listener to a child and connects to it.
func lend(r request) (reply, error) {
	l, err := listen(r)
	if err != nil {
		return reply{}, err
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		return reply{}, err
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.ExtraFiles, cmd.Stderr = []string{acceptEnv + "=1"}, []*os.File{f}, os.Stderr
	if err := cmd.Start(); err != nil {
		return reply{}, err
	}
	var dialer net.Dialer
	dialer.SetMultipathTCP(r.Multipath)
	conn, err := dialer.Dial(r.Network, l.Addr().String())
	if err != nil {
		return reply{}, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	_, err = io.ReadAll(conn) // until the child closes it
	return reply{PID: cmd.Process.Pid, Local: conn.LocalAddr().String()}, errors.Join(err, conn.Close(), cmd.Wait())
}

func acceptOne() int {
	fd, _, err := unix.Accept4(3, unix.SOCK_CLOEXEC)
	for errors.Is(err, unix.EAGAIN) { // the parent had made it one that does not wait
		_, _ = unix.Poll([]unix.PollFd{{Fd: 3, Events: unix.POLLIN}}, int(patience.Milliseconds()))
		fd, _, err = unix.Accept4(3, unix.SOCK_CLOEXEC)
	}
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		fmt.Fprintln(os.Stderr, "accept:", err)
		return 1
	}
	return 0
}

// becomeMemfd copies a program into memory and executes it by file descriptor.
func becomeMemfd(program string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("edr-test", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	if _, err := unix.Write(fd, data); err != nil {
		return err
	}
	argv, err := syscall.SlicePtrFromStrings([]string{"in-memory", "argument"})
	if err != nil {
		return err
	}
	empty, envp := new(byte), []*byte{nil}
	_, _, errno := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(empty)),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0])), unix.AT_EMPTY_PATH, 0)
	return errno
}

// endWithThreads ends the process while n threads race to their end as well.
func endWithThreads(n int) {
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		os.Exit(1)
	}
	var ready sync.WaitGroup
	for range n {
		ready.Add(1)
		go func() {
			ready.Done()
			_, _ = unix.Read(pipe[0], make([]byte, 1)) // holds its thread until the end
		}()
	}
	ready.Wait()
	os.Exit(0)
}

// abandon connects to a listener whose queue is full, and gives up while the
// connection is neither made nor refused.
func abandon() (reply, error) {
	loopback := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	var fds [3]int // listener, the one that fills its queue, the one that waits
	for i := range fds {
		flags := 0
		if i == 2 {
			flags = unix.SOCK_NONBLOCK
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|flags, 0)
		if err != nil {
			return reply{}, err
		}
		fds[i] = fd
		defer unix.Close(fd)
	}
	if err := errors.Join(unix.Bind(fds[0], loopback), unix.Listen(fds[0], 0)); err != nil {
		return reply{}, err
	}
	address, err := unix.Getsockname(fds[0])
	if err != nil {
		return reply{}, err
	}
	if err := unix.Connect(fds[1], address); err != nil {
		return reply{}, err
	}
	if err := unix.Connect(fds[2], address); !errors.Is(err, unix.EINPROGRESS) {
		return reply{}, fmt.Errorf("connect to a full queue: %w", err)
	}
	return reply{Remote: fmt.Sprintf("127.0.0.1:%d", address.(*unix.SockaddrInet4).Port)}, nil
}
