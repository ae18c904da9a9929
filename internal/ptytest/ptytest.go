// SPDX-License-Identifier: Apache-2.0

// Package ptytest runs programs in a pseudo-terminal, for tests: a real one, by which
// the kernel makes keys into signals, and behind it a screen that understands no more
// than what every terminal does. What a program sends beyond that is a finding, and so
// is a line that is longer than the screen is wide.
package ptytest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Terminal is one terminal and the program that runs in it.
type Terminal struct {
	t             testing.TB
	master, slave *os.File
	cmd           *exec.Cmd

	mu     sync.Mutex
	screen screen
}

// Open makes a terminal of that size. It is closed when the test ends.
func Open(t testing.TB, width, height int) *Terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	p := &Terminal{t: t, master: master, screen: newScreen(width, height)}
	fd := p.fd(master)
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	if p.slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.slave.Close() })
	p.Resize(width, height)
	go p.follow()
	return p
}

// fd is that of f, which Go still may wait on.
func (p *Terminal) fd(f *os.File) (fd int) {
	c, err := f.SyscallConn()
	if err == nil {
		err = c.Control(func(n uintptr) { fd = int(n) })
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return fd
}

// Start runs cmd with this as its controlling terminal. It is killed when the test
// ends.
func (p *Terminal) Start(cmd *exec.Cmd) {
	p.t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.slave, p.slave, p.slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.cmd = cmd
	p.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
}

// Wait waits for the end of the program, and until all it wrote is on the screen.
func (p *Terminal) Wait() (code int) {
	p.t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- p.cmd.Wait() }()
	select {
	case err := <-ended:
		if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
			p.t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		p.t.Fatalf("the program does not end; its screen:\n%s", p)
	}
	// What follows a mark on the same way is there when the mark is.
	p.mu.Lock()
	p.screen.marked = false
	p.screen.ended = true
	p.mu.Unlock()
	if _, err := p.slave.WriteString(mark); err != nil {
		p.t.Fatal(err)
	}
	p.Await("all of the output", func(s State) bool { return s.marked })
	return p.cmd.ProcessState.ExitCode()
}

// Signal sends a signal to the program.
func (p *Terminal) Signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// PID is that of the program.
func (p *Terminal) PID() int { return p.cmd.Process.Pid }

// Type sends keys.
func (p *Terminal) Type(keys string) {
	p.t.Helper()
	if _, err := p.master.WriteString(keys); err != nil {
		p.t.Fatal(err)
	}
}

// Resize changes the size, of which the kernel tells the program.
func (p *Terminal) Resize(width, height int) {
	p.t.Helper()
	p.mu.Lock()
	p.screen.resize(width, height)
	p.mu.Unlock()
	if err := unix.IoctlSetWinsize(p.fd(p.master), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(width), Row: uint16(height)}); err != nil {
		p.t.Fatal(err)
	}
}

// Settings are those of the terminal at the moment.
func (p *Terminal) Settings() unix.Termios {
	p.t.Helper()
	s, err := unix.IoctlGetTermios(p.fd(p.slave), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return *s
}

// State is what can be seen of a terminal.
type State struct {
	Rows      []string // from the top, without blanks at their end
	Alternate bool     // the other screen is shown
	Hidden    bool     // the cursor
	NoWrap    bool     // long lines do not go on in the next row
	Painted   bool     // something was ever shown in colour
	Findings  []string // sequences that not every terminal understands, and lines too long
	marked    bool
}

// String is the screen as text.
func (s State) String() string { return strings.Join(s.Rows, "\n") }

// State is the one of the moment.
func (p *Terminal) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.screen.state()
}

func (p *Terminal) String() string { return p.State().String() }

// Await waits until the screen is as it should be, and returns it.
func (p *Terminal) Await(what string, ok func(State) bool) State {
	p.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for {
		if s := p.State(); ok(s) {
			return s
		}
		select {
		case <-tick.C:
		case <-deadline:
			p.t.Fatalf("not within 30 s: %s; the screen:\n%s", what, p)
		}
	}
}

// follow puts on the screen what is written.
func (p *Terminal) follow() {
	var buf [4096]byte
	for {
		n, err := p.master.Read(buf[:])
		p.mu.Lock()
		p.screen.write(buf[:n])
		p.mu.Unlock()
		if err != nil {
			return // closed
		}
	}
}

// Clean reports what a program sent that it should not have sent.
func (p *Terminal) Clean() {
	p.t.Helper()
	if s := p.State(); len(s.Findings) > 0 {
		p.t.Errorf("%d findings, the first: %s; the screen:\n%s", len(s.Findings), s.Findings[0], s)
	}
}

// Exists tells whether this host has pseudo-terminals.
func Exists() bool {
	_, err := os.Stat("/dev/ptmx")
	return !errors.Is(err, fs.ErrNotExist)
}

// mark follows the last output of a program.
const mark = "\x05"

// blank is an empty cell; the second one of a wide character is 0.
const blank = ' '

type grid [][]rune

func newGrid(width, height int) grid {
	g := make(grid, height)
	for i := range g {
		g[i] = blankRow(width)
	}
	return g
}

func blankRow(width int) []rune { return slices.Repeat([]rune{blank}, width) }
