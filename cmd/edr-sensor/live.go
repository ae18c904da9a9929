// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// liveView is a screen that is drawn again and again. Its functions are called from one
// goroutine.
type liveView struct {
	every  time.Duration
	settle bool                      // the first screen would say nothing yet
	number int                       // of screens; 0: until it is ended
	look   func() error              // once per screen
	draw   func(style) []string      // also when the size changed, or a key was pressed
	key    func(byte)                // nil: it knows none; q ends every view
	beside func(ctx context.Context) // runs along, if not nil
}

// live shows a view until it is ended: on a terminal by q or a signal, elsewhere by a
// signal, as plain text. A terminal is what it was before whichever way this ends.
//
// It talks to the terminal itself, in the few sequences that every one understands. A
// library for it would be the larger part of the program: they bring event loops,
// widgets and terminal databases for what is a table that changes.
func (a *app) live(ctx context.Context, v liveView, st style) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	crashed := make(chan any, 1)
	if v.beside != nil {
		done := make(chan struct{})
		defer func() { cancel(); <-done }()
		go func() {
			defer close(done)
			defer func() {
				// Where it would end the program, nobody would restore the terminal.
				if p := recover(); p != nil {
					crashed <- fmt.Sprintf("%v\n%s", p, debug.Stack())
				}
			}()
			v.beside(ctx)
		}()
	}
	if err := v.look(); err != nil {
		return err
	}
	out, ok := a.stdout.(*os.File)
	dumb := !ok || st.width == 0 || a.getenv("TERM") == "dumb"
	if v.settle && (dumb || v.number > 0) {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(v.every):
		}
		if err := v.look(); err != nil {
			return err
		}
	}
	if dumb {
		return v.plainly(ctx, a.stdout, st, crashed)
	}
	t := &terminal{out: out, in: a.stdin}
	signals := make(chan os.Signal, 8)
	// All that would end the program, and would leave the terminal as it is then.
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGTSTP, unix.SIGCONT, unix.SIGWINCH)
	defer signal.Stop(signals)
	if err := t.enter(); err != nil {
		return err
	}
	return errors.Join(v.onTerminal(ctx, t, st, signals, crashed), t.leave())
}

func (v *liveView) plainly(ctx context.Context, out io.Writer, st style, crashed <-chan any) error {
	tick := time.NewTicker(v.every)
	defer tick.Stop()
	for n := 1; ; n++ {
		text := strings.Join(v.draw(st), "\n") + "\n"
		if n > 1 {
			text = "\n" + text
		}
		if _, err := io.WriteString(out, text); err != nil {
			return err
		}
		if n == v.number {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case p := <-crashed:
			panic(p)
		case <-tick.C:
		}
		if err := v.look(); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

func (v *liveView) onTerminal(ctx context.Context, t *terminal, st style, signals <-chan os.Signal, crashed <-chan any) error {
	defer func() {
		if p := recover(); p != nil {
			_ = t.leave() // the panic is what matters
			panic(p)
		}
	}()
	keys := make(chan byte)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go t.keys(ctx, keys)
	tick := time.NewTicker(v.every)
	defer tick.Stop()
	trouble := ""
	for n := 1; ; {
		st.width, st.height = terminalSize(t.out)
		lines := v.draw(st)
		if trouble != "" {
			s := screen{style: st}
			s.row("", red, "%s", trouble)
			lines = append(s.lines, lines...)
		}
		if err := t.show(lines, st.height); err != nil {
			return fmt.Errorf("write to the terminal: %w", err)
		}
		if n == v.number {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case p := <-crashed:
			panic(p)
		case s := <-signals:
			switch s {
			case unix.SIGWINCH, unix.SIGCONT:
			case unix.SIGTSTP:
				if err := t.suspend(ctx, signals); err != nil {
					return err
				}
			default:
				return nil
			}
		case key := <-keys:
			switch {
			case key == 'q':
				return nil
			case v.key != nil:
				v.key(key)
			}
		case <-tick.C:
			n++
			// A sensor that is started again is worth waiting for.
			trouble = ""
			if err := v.look(); err != nil {
				trouble = safe(err.Error())
			}
		}
	}
}

// terminal is the one that standard output goes to.
type terminal struct {
	out   *os.File
	in    *os.File // keys are read from here, if it is a terminal
	saved *unix.Termios
}

const (
	// The other screen, on which no line runs over into the next, without a cursor.
	enterSequence = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
	leaveSequence = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
)

// enter has keys come at once and unseen. Those that make signals go on to.
func (t *terminal) enter() error {
	fd := int(t.out.Fd())
	saved, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return fmt.Errorf("settings of the terminal: %w", err)
	}
	raw := *saved
	raw.Lflag &^= unix.ICANON | unix.ECHO | unix.IEXTEN
	raw.Iflag &^= unix.IXON // Ctrl-S would have a write wait
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return fmt.Errorf("settings of the terminal: %w", err)
	}
	t.saved = saved
	_, err = t.out.WriteString(enterSequence)
	return err
}

// leave makes the terminal what it was. What was typed and not read is forgotten.
func (t *terminal) leave() error {
	if t.saved == nil {
		return nil
	}
	_, err := t.out.WriteString(leaveSequence)
	if e := unix.IoctlSetTermios(int(t.out.Fd()), unix.TCSETSF, t.saved); e != nil {
		err = errors.Join(err, fmt.Errorf("settings of the terminal: %w", e))
	}
	t.saved = nil
	if errors.Is(err, unix.EIO) {
		return nil // it is gone, and with it what was to be restored
	}
	return err
}

// suspend is what Ctrl-Z asks for.
func (t *terminal) suspend(ctx context.Context, signals <-chan os.Signal) error {
	if err := t.leave(); err != nil {
		return err
	}
	if err := unix.Kill(unix.Getpid(), unix.SIGSTOP); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-signals:
			if s == unix.SIGCONT { // other threads may run on a little before they stop
				return t.enter()
			}
		}
	}
}

// show draws lines from the first row on, in one write. Each row is cleared before it
// is written: behind its last column there is no place to clear from.
func (t *terminal) show(lines []string, height int) error {
	var b bytes.Buffer
	b.WriteString("\x1b[H")
	for i, l := range lines[:min(len(lines), height)] {
		if i > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString("\x1b[2K" + l)
	}
	if len(lines) < height {
		b.WriteString("\r\n\x1b[J")
	}
	_, err := t.out.Write(b.Bytes())
	if errors.Is(err, unix.EIO) {
		return nil // hung up: the signal follows
	}
	return err
}

// keys sends what is typed until ctx ends.
func (t *terminal) keys(ctx context.Context, to chan<- byte) {
	if t.in == nil {
		return
	}
	fd := int(t.in.Fd())
	if _, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil {
		return
	}
	var one [1]byte
	for ctx.Err() == nil {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(keyWait/time.Millisecond))
		switch {
		case errors.Is(err, unix.EINTR), n == 0 && err == nil:
			continue
		case err != nil || p[0].Revents&unix.POLLIN == 0:
			return
		}
		if n, err := unix.Read(fd, one[:]); n != 1 || err != nil {
			return
		}
		select {
		case to <- one[0]:
		case <-ctx.Done():
		}
	}
}

// keyWait is how long the end of a view may have to wait for who reads keys.
const keyWait = 200 * time.Millisecond
