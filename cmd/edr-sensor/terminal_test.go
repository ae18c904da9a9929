// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/aurorasoc/edr-sensor/internal/ptytest"
)

// panicEnv has the test binary show a view that crashes.
const panicEnv = "EDR_PANIC"

// crash shows a view and panics in it.
func crash(where string) int {
	a := app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, environ: os.Environ()}
	draws := 0
	v := liveView{every: 10 * time.Millisecond, look: func() error { return nil }, draw: func(style) []string {
		if draws++; draws == 3 && where == "draw" {
			panic("in draw")
		}
		return []string{"still here"}
	}}
	if where == "beside" {
		v.beside = func(context.Context) { panic("in beside") }
	}
	if err := a.live(context.Background(), v, a.style("auto")); err != nil {
		return exitFailure
	}
	return exitOK
}

// demoSensor answers as one that runs since two and a half hours.
type demoSensor struct {
	socket string
	away   atomic.Bool
	tapped chan struct{} // a value for each tap that has been written
}

// demoStatus has times by which a screen is the same for a minute.
func demoStatus() string {
	then := func(d time.Duration) string {
		return time.Now().Add(-d).UTC().Format(time.RFC3339Nano)
	}
	const day = 24 * time.Hour
	return fmt.Sprintf(`{"version":"1.2.3","agent_id":"web-01","mode":"online","reason":"all events are seen, kept and delivered","since":%q,"scope":"all",
 "coverage":[{"event":"process.exec","hook":"tp_btf/sched_process_exec"},{"event":"file.create","hook":"raw_tp/sys_exit","blind":"io_uring"}],
 "sensor":{"events":{"process.exec":1204,"net.connect":77,"file.write":91234,"file.create":12},"lost":{"file.write":3},"suppressed":{"file.write":500},
  "rings":{"priority":{"used":4096,"size":16777216},"bulk":{"used":1048576,"size":8388608}}},
 "rates":{"events":{"process.exec":12.3,"file.write":410.2},"delivered":422.5,"fill_bytes":1000},
 "buffer":{"records":5000,"unsent":2,"last":92515,"bytes":104857600,"unsent_bytes":4096,"cap":536870912,"full_in_seconds":536866},
 "cases":[{"case_id":"C-17","scope":{"kind":"path","value":"/tmp/ä\u001b[31m日本"},"collect":"normal","until":%q,"tagged":12}],
 "transport":{"state":"connected","address":"redis:6379","since":%q,"acked":92515}}`,
		then(2*time.Hour+30*time.Minute+30*time.Second), then(-90*time.Minute-30*time.Second), then(3*day+time.Hour))
}

// nasty is what somebody calls his processes.
const nasty = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202e\r\nreset\x1bc日本"

func demoEvents() []string {
	process := func(pid int, argv, container string) string {
		p := map[string]any{"pid": pid, "uid": fmt.Sprint("u-", pid), "name": "x", "path": "/usr/bin/" + argv, "cmd_line": argv + " --all", "user": map[string]any{"name": "www-data"}}
		if container != "" {
			p["container"] = map[string]any{"uid": container, "runtime": "podman"}
		}
		b, _ := json.Marshal(p)
		return string(b)
	}
	var out []string
	add := func(n int, code, field, p string) {
		for range n {
			out = append(out, fmt.Sprintf(`{"metadata":{"event_code":%q},%s}`, code, fmt.Sprintf(field, p)))
		}
	}
	add(1, "process.exec", `"process":%s,"actor":{"process":{"pid":1,"uid":"u-1"}}`, process(4242, "curl", ""))
	add(30, "net.connect", `"actor":{"process":%s}`, process(4242, "curl", ""))
	add(20, "file.write", `"actor":{"process":%s}`, process(4343, "postgres", "4bf5122f344554c53bde2ebb8cd2b7e3"))
	add(9, "process.fork", `"process":{"pid":9,"uid":"u-9"},"actor":{"process":%s}`, process(4343, "postgres", "4bf5122f344554c53bde2ebb8cd2b7e3"))
	add(5, "file.rename", `"actor":{"process":%s}`, process(666, nasty, nasty))
	add(3, "sensor.mode_change", `"message":%s`, `"x"`)
	return append(out, "no event", `{"tap_dropped":7000}`)
}

func newDemo(t *testing.T) *demoSensor {
	t.Helper()
	d := &demoSensor{tapped: make(chan struct{}, 16)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		if d.away.Load() {
			http.Error(w, nasty, http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, demoStatus())
	})
	mux.HandleFunc("GET /tap", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, strings.Join(demoEvents(), "\n")+"\n")
		_ = http.NewResponseController(w).Flush()
		d.tapped <- struct{}{}
		<-r.Context().Done()
	})
	d.socket, _ = fakeControl(t, mux)
	return d
}

// ownProcess is edr-sensor as one of its own.
func ownProcess(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "edr-sensor" // what the test binary is by that name
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "TERM=xterm-256color", "TZ=UTC"}, env...)
	return cmd
}

// inTerminal starts edr-sensor in a terminal.
func inTerminal(t *testing.T, p *ptytest.Terminal, env []string, args ...string) {
	t.Helper()
	p.Start(ownProcess(env, args...))
}

func openTerminal(t *testing.T, width, height int) *ptytest.Terminal {
	t.Helper()
	if !ptytest.Exists() {
		if os.Getenv("EDR_REQUIRE_ALL") == "1" {
			t.Fatal("EDR_REQUIRE_ALL: no /dev/ptmx")
		}
		t.Skip("no /dev/ptmx")
	}
	return ptytest.Open(t, width, height)
}

var terminals = []struct {
	name          string
	width, height int
	env           []string
	colour, ascii bool
}{
	{"80x24", 80, 24, []string{"LANG=C.UTF-8"}, true, false},
	{"200x60", 200, 60, []string{"LANG=en_US.utf8"}, true, false},
	{"80x24-no-colour", 80, 24, []string{"LANG=C.UTF-8", "NO_COLOR=1"}, false, false},
	{"80x24-C", 80, 24, []string{"LANG=C.UTF-8", "LC_ALL=C"}, true, true},
	{"200x60-nothing-set", 200, 60, nil, true, true},
}

// TestStatusInTerminal compares what a terminal shows with golden files.
func TestStatusInTerminal(t *testing.T) {
	d := newDemo(t)
	for _, tt := range terminals {
		t.Run(tt.name, func(t *testing.T) {
			p := openTerminal(t, tt.width, tt.height)
			inTerminal(t, p, tt.env, "status", "--socket", d.socket)
			if code := p.Wait(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			p.Clean()
			s := p.State()
			if s.Painted != tt.colour {
				t.Errorf("painted: %t, want %t", s.Painted, tt.colour)
			}
			lines := strings.Split(strings.TrimRight(s.String(), "\n"), "\n")
			checkScreen(t, filepath.Join("testdata", "screens", "terminal-status-"+tt.name), lines, style{width: tt.width, height: tt.height, ascii: tt.ascii})
		})
	}
}

// TestTopInTerminal goes through all views, and compares them with golden files. What
// a rate is depends on the moment; that there is one does not.
func TestTopInTerminal(t *testing.T) {
	const keys = "[p]rocess  e[x]ecutable  [c]ontainer  [k]ind  [space] pause  [q]uit"
	rate := regexp.MustCompile(`(?m)^ +[0-9,]+(\.[0-9])? `)
	parts := func(s ptytest.State) (table []string, last string) {
		lines := strings.Split(rate.ReplaceAllString(s.String(), "    RATE "), "\n")
		return strings.Split(strings.TrimRight(strings.Join(lines[:len(lines)-1], "\n"), "\n"), "\n"), lines[len(lines)-1]
	}
	for _, tt := range terminals {
		t.Run(tt.name, func(t *testing.T) {
			d := newDemo(t)
			p := openTerminal(t, tt.width, tt.height)
			before := p.Settings()
			inTerminal(t, p, tt.env, "top", "--socket", d.socket, "--every", "100ms")
			<-d.tapped
			for _, view := range []struct{ key, name, shows string }{
				{"", "process", "COMMAND"}, {"x", "executable", "EXECUTABLE"}, {"c", "container", "(host)"}, {"k", "kind", "process.exec"}, {"p ", "process", "paused"},
			} {
				p.Type(view.key)
				s := p.Await(view.name, func(s ptytest.State) bool {
					text := s.String()
					counted := view.name == "kind" || strings.Contains(text, "7,000 events are not counted")
					return strings.Contains(text, view.shows) && counted && strings.HasPrefix(text, "edr-sensor top")
				})
				file := filepath.Join("testdata", "screens", "terminal-top-"+view.name+strings.Repeat("-paused", len(view.key)/2)+"-"+tt.name)
				golden, _ := os.ReadFile(file)
				table, last := parts(s)
				// Half of a screen may be there, and half of the one before.
				deadline := time.Now().Add(30 * time.Second)
				for !*update && (strings.Join(table, "\n")+"\n" != string(golden) || last != keys) && time.Now().Before(deadline) {
					<-time.After(5 * time.Millisecond)
					s = p.State()
					table, last = parts(s)
				}
				if !s.Alternate || !s.Hidden || !s.NoWrap {
					t.Errorf("%s: alternate screen %t, cursor hidden %t, no wrap %t", view.name, s.Alternate, s.Hidden, s.NoWrap)
				}
				checkScreen(t, file, table, style{width: tt.width, height: tt.height, ascii: tt.ascii})
				if last != keys {
					t.Errorf("last row: %s", last)
				}
			}
			p.Type("q")
			if code := p.Wait(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			restored(t, p, before)
			if s := p.State(); s.Painted != tt.colour {
				t.Errorf("painted: %t, want %t", s.Painted, tt.colour)
			}
		})
	}
}

// restored wants a terminal as it was before.
func restored(t *testing.T, p *ptytest.Terminal, before unix.Termios) {
	t.Helper()
	p.Clean()
	s := p.State()
	if s.Alternate || s.Hidden || s.NoWrap {
		t.Errorf("left with the alternate screen %t, the cursor hidden %t, no wrap %t", s.Alternate, s.Hidden, s.NoWrap)
	}
	if d := cmp.Diff(before, p.Settings()); d != "" {
		t.Errorf("settings (-before +after):\n%s", d)
	}
}

// TestTerminalIsRestored ends live views in every way in which they can end.
func TestTerminalIsRestored(t *testing.T) {
	d := newDemo(t)
	live := func(s ptytest.State) bool { return s.Alternate && strings.Contains(s.String(), "web-01") }
	for _, tt := range []struct {
		name string
		end  func(*ptytest.Terminal)
		code int
	}{
		{"q", func(p *ptytest.Terminal) { p.Type("q") }, 0},
		{"Ctrl-C", func(p *ptytest.Terminal) { p.Type("\x03") }, 0},
		{"Ctrl-C again and again", func(p *ptytest.Terminal) { p.Type("\x03\x03\x03\x03") }, 0},
		{"Ctrl-\\", func(p *ptytest.Terminal) { p.Type("\x1c") }, 0},
		{"SIGTERM", func(p *ptytest.Terminal) { p.Signal(syscall.SIGTERM) }, 0},
		{"SIGHUP", func(p *ptytest.Terminal) { p.Signal(syscall.SIGHUP) }, 0},
	} {
		for _, args := range [][]string{{"top", "--every", "1h"}, {"status", "--watch"}} {
			t.Run(args[0]+" "+tt.name, func(t *testing.T) {
				p := openTerminal(t, 80, 24)
				before := p.Settings()
				inTerminal(t, p, []string{"LANG=C.UTF-8"}, append(args, "--socket", d.socket)...)
				p.Await("the view", live)
				if s := p.Settings(); s.Lflag&unix.ICANON != 0 || s.Lflag&unix.ECHO != 0 {
					t.Errorf("keys wait for a line, or are echoed: %#x", s.Lflag)
				}
				tt.end(p)
				if code := p.Wait(); code != tt.code {
					t.Errorf("exit code %d", code)
				}
				restored(t, p, before)
			})
		}
	}

	for _, where := range []string{"draw", "beside"} {
		t.Run("panic in "+where, func(t *testing.T) {
			p := openTerminal(t, 80, 24)
			before := p.Settings()
			inTerminal(t, p, []string{"LANG=C.UTF-8", panicEnv + "=" + where})
			if code := p.Wait(); code != 2 {
				t.Errorf("exit code %d, want that of a panic", code)
			}
			s := p.State()
			if s.Alternate || s.Hidden || s.NoWrap {
				t.Errorf("left with the alternate screen %t, the cursor hidden %t, no wrap %t", s.Alternate, s.Hidden, s.NoWrap)
			}
			if d := cmp.Diff(before, p.Settings()); d != "" {
				t.Errorf("settings (-before +after):\n%s", d)
			}
		})
	}
}

// TestTopIsSuspended stops it by Ctrl-Z and has it go on.
func TestTopIsSuspended(t *testing.T) {
	d := newDemo(t)
	p := openTerminal(t, 80, 24)
	before := p.Settings()
	inTerminal(t, p, nil, "top", "--socket", d.socket, "--every", "1h")
	p.Await("the view", func(s ptytest.State) bool { return s.Alternate && strings.Contains(s.String(), "web-01") })
	for range 2 {
		p.Type("\x1a")
		p.Await("it stops", func(s ptytest.State) bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
			return err == nil && strings.Contains(string(stat), ") T ") && !s.Alternate
		})
		restored(t, p, before)
		p.Signal(syscall.SIGCONT)
		p.Await("it goes on", func(s ptytest.State) bool { return s.Alternate && s.Hidden && strings.Contains(s.String(), "web-01") })
	}
	p.Type("q")
	if code := p.Wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	restored(t, p, before)
}

// TestTopIsResized makes the terminal larger and smaller than all that is shown.
func TestTopIsResized(t *testing.T) {
	d := newDemo(t)
	p := openTerminal(t, 80, 24)
	inTerminal(t, p, []string{"LANG=C.UTF-8"}, "top", "--socket", d.socket, "--every", "1h", "--by", "kind")
	for _, size := range [][2]int{{200, 60}, {80, 24}, {40, 10}, {20, 5}, {7, 3}, {1, 1}, {100, 30}} {
		p.Resize(size[0], size[1])
		last := "[p]rocess  e[x]ecutable  [c]ontainer  [k]ind  [space] pause  [q]uit"
		if size[0] < len(last) {
			last = ""
		}
		p.Await(fmt.Sprintf("%d by %d", size[0], size[1]), func(s ptytest.State) bool {
			return len(s.Rows) == size[1] && strings.HasPrefix(s.Rows[0], "edr-sensor"[:min(10, size[0]-1)]) && (last == "" || s.Rows[size[1]-1] == last)
		})
	}
	p.Type("\x03")
	p.Wait()
	// A line of the size before may be on its way when the size changes.
	for _, f := range p.State().Findings {
		if !strings.Contains(f, "is longer than") {
			t.Error(f)
		}
	}
}

// TestWatchOutlivesTheSensor loses the sensor and gets it back.
func TestWatchOutlivesTheSensor(t *testing.T) {
	d := newDemo(t)
	p := openTerminal(t, 80, 24)
	inTerminal(t, p, []string{"LANG=C.UTF-8"}, "status", "-w", "--socket", d.socket)
	trouble := func(s ptytest.State) bool { return strings.Contains(s.String(), "503 Service Unavailable") }
	p.Await("the status", func(s ptytest.State) bool { return strings.Contains(s.String(), "web-01") && !trouble(s) })
	d.away.Store(true)
	p.Await("that the sensor does not answer", func(s ptytest.State) bool { return strings.Contains(s.String(), "web-01") && trouble(s) })
	d.away.Store(false)
	p.Await("the status again", func(s ptytest.State) bool { return strings.Contains(s.String(), "web-01") && !trouble(s) })
	p.Type("q")
	p.Wait()
	p.Clean()

	d.away.Store(true)
	p = openTerminal(t, 80, 24)
	before := p.Settings()
	inTerminal(t, p, nil, "status", "-w", "--socket", d.socket)
	if code := p.Wait(); code != exitFailure {
		t.Errorf("exit code %d without a sensor", code)
	}
	if d := cmp.Diff(before, p.Settings()); d != "" {
		t.Errorf("settings (-before +after):\n%s", d)
	}
}

// TestEventsInTerminal shows names that are sequences, in a line each.
func TestEventsInTerminal(t *testing.T) {
	for _, tt := range terminals {
		t.Run(tt.name, func(t *testing.T) {
			d := newDemo(t)
			p := openTerminal(t, tt.width, tt.height)
			inTerminal(t, p, tt.env, "events", "--socket", d.socket, "--kind", "rename,connect", "-n", "35")
			if code := p.Wait(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			p.Clean()
			s := p.State()
			if tt.ascii && strings.ContainsFunc(s.String(), func(r rune) bool { return r >= 0x80 }) {
				t.Errorf("not ASCII:\n%s", s)
			}
			if !strings.Contains(s.String(), "rename") {
				t.Errorf("shows:\n%s", s)
			}
		})
	}
}

// TestTopElsewhere writes plain tables where there is no terminal, or only a dumb one. It runs
// as processes: who shows this view has given way to all others for good.
func TestTopElsewhere(t *testing.T) {
	d := newDemo(t)
	top := func(args ...string) (code int, out, errs string) {
		t.Helper()
		cmd := ownProcess(nil, append([]string{"top"}, args...)...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
	}
	// A table has what was read until it was due.
	patiently := func(show func(every string) (done bool)) {
		for every := 100 * time.Millisecond; !show(every.String()) && every < 10*time.Second; every *= 4 {
		}
	}
	var code int
	var out, errs string
	patiently(func(every string) bool {
		code, out, errs = top("--socket", d.socket, "--every", every, "-n", "2")
		return strings.Count(out, " curl --all\n") == 2
	})
	if code != 0 || errs != "" || strings.Count(out, "edr-sensor top") != 2 || strings.Contains(out, "\x1b") || strings.Contains(out, "[q]uit") {
		t.Errorf("exit code %d: %s\n%s", code, errs, out)
	}
	if !strings.Contains(out, " curl --all\n") || !strings.Contains(out, `\x1b]0;owned\x07`) {
		t.Errorf("writes:\n%s", out)
	}

	var s ptytest.State
	patiently(func(every string) bool {
		p := openTerminal(t, 80, 24)
		before := p.Settings()
		inTerminal(t, p, []string{"TERM=dumb"}, "top", "--socket", d.socket, "--every", every, "-n", "1")
		if code := p.Wait(); code != 0 {
			t.Errorf("exit code %d", code)
		}
		restored(t, p, before)
		s = p.State()
		return strings.Contains(s.String(), "curl --all")
	})
	if !strings.Contains(s.String(), "curl --all") || s.Painted {
		t.Errorf("a dumb terminal shows (painted: %t):\n%s", s.Painted, s)
	}

	for _, args := range [][]string{{"--by", "pid"}, {"--every", "1ms"}, {"--number", "-1"}, {"now"}} {
		if code, _, errs := top(args...); code != exitUsage || !strings.Contains(errs, "Try: edr-sensor top --help") {
			t.Errorf("%v: exit code %d: %s", args, code, errs)
		}
	}
	if code, _, errs := top("--socket", filepath.Join(t.TempDir(), "none")); code != exitFailure || !strings.Contains(errs, "no sensor answers") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}
