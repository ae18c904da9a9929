// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/zap"
)

// TestStalledReader stops reading standard error, as a container runtime that
// hangs does. No line is cut, and the lines that are there and the numbers said
// to be missing add up.
func TestStalledReader(t *testing.T) {
	pipe := func(t *testing.T) (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		return r, w
	}
	socket := func(t *testing.T) (r, w *os.File) {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fds[0]), "reader"), os.NewFile(uintptr(fds[1]), "writer")
	}
	for name, open := range map[string]func(*testing.T) (r, w *os.File){"pipe": pipe, "socket": socket} {
		t.Run(name, func(t *testing.T) {
			r, w := open(t)
			defer r.Close()
			logs, err := New(Options{Format: FormatJSON, Level: "info"}, w)
			if err != nil {
				t.Fatal(err)
			}
			log := logs.logger
			const lines = 3000
			pad := strings.Repeat("x", 1000) // pages and buffers do not end where lines do
			for i := range lines {
				log.Info("line", zap.Int("n", i), zap.String("pad", pad[:i%1000]))
			}
			first := logs.Dropped()
			if first == 0 || first == lines {
				t.Errorf("%d of %d lines dropped while nobody read", first, lines)
			}
			read, said := make(chan int), uint64(0)
			go func() {
				n := 0
				s := bufio.NewScanner(r)
				for s.Scan() {
					var l struct {
						Msg   string
						Count uint64
					}
					if err := json.Unmarshal(s.Bytes(), &l); err != nil {
						t.Errorf("a line is cut: %q", s.Bytes())
					}
					if l.Msg == "line" {
						n++
					}
					said += l.Count
					if l.Msg == "end" {
						break
					}
				}
				read <- n
			}()
			eventually(t, "lines are taken again", func() bool {
				before := logs.Dropped()
				log.Info("end")
				return logs.Dropped() == before
			})
			if n := <-read; uint64(n)+first != lines || said < first {
				t.Errorf("of %d lines %d were read, %d dropped and %d said to be", lines, n, first, said)
			}
			// Not only ours: whoever shares the descriptor goes on as before.
			if fl, _, errno := syscall.Syscall(syscall.SYS_FCNTL, w.Fd(), syscall.F_GETFL, 0); errno != 0 || fl&syscall.O_NONBLOCK != 0 {
				t.Errorf("flags of standard error became %o (%v)", fl, errno)
			}
		})
	}
}
